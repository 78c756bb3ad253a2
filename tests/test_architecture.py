"""The architecture: which module imports which, and what happens at import.

python -m pytest tests/test_architecture.py
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT

LIBRARY = (
    "parameters config tokenizer corpus data model engine decode_torch decode_loops decode_numba "
    "generate distributed optim bundle checkpoint resume callbacks run_record budget trainer"
).split()
COMMANDS = (
    "train inspect_model inference evaluate profile_model report tune export import_model"
).split()
ORDER = [*LIBRARY, *COMMANDS]  # the reading order of docs/: a module imports only earlier ones
WITHOUT_TORCH = [
    *("parameters", "config", "bundle", "resume", "callbacks"),
    *("engine", "generate", "decode_loops", "decode_numba"),
    *("train", "inference", "evaluate", "inspect_model", "report", "tune", "export"),
    "import_model",
    *("utils.data_files", "utils.output", "utils.command_line", "utils.ranks", "utils.pickles"),
]
FLAT = [CHECKOUT / f"{name}.py" for name in ORDER]
UTILS = sorted((CHECKOUT / "utils").rglob("*.py"))
EXPORTERS = sorted((CHECKOUT / "exporters").rglob("*.py"))
FILES = [*FLAT, *UTILS, *EXPORTERS]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


for_each_flat_module = pytest.mark.parametrize("path", FLAT, ids=name_of)
for_each_util = pytest.mark.parametrize("path", UTILS, ids=name_of)
for_each_file = pytest.mark.parametrize("path", FILES, ids=name_of)
for_each_command = pytest.mark.parametrize("name", COMMANDS)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def find_imports(node: ast.AST) -> set[str]:
    """Return the modules that are imported below `node`, except for type checking alone."""
    if is_type_checking(node):
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        # `from utils import output` imports a module, too.
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set().union(*map(find_imports, ast.iter_child_nodes(node)))


def find_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in find_imports(parse(path))}


# The order ------------------------------------------------------------------------------------


def test_every_flat_module_has_a_place_in_the_reading_order():
    assert sorted(path.stem for path in CHECKOUT.glob("*.py")) == sorted(ORDER)


@for_each_flat_module
def test_a_module_imports_only_from_those_before_it(path):
    later = set(ORDER[ORDER.index(path.stem) + 1 :])
    assert not find_packages(path) & later


@for_each_util
def test_utils_import_no_flat_module_but_parameters(path):
    assert find_packages(path) & set(ORDER) <= {"parameters"}


@pytest.mark.parametrize("path", [*FLAT, *UTILS, *EXPORTERS], ids=name_of)
def test_only_commands_import_exporters_and_exporters_import_no_command(path):
    if path in EXPORTERS:
        assert not find_packages(path) & set(COMMANDS)
    elif path.stem not in COMMANDS:
        assert "exporters" not in find_packages(path)


@for_each_file
def test_no_module_imports_itself(path):
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    assert ".".join(parts) not in find_imports(parse(path))


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_modules_that_run_before_training_do_not_import_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


def test_no_package_shadows_a_library():
    libraries = {"tensorboard", "aim", "torch", "onnx", "optuna"}
    assert not libraries & {path.stem for path in CHECKOUT.iterdir()}


def test_installing_puts_no_module_in_site_packages():
    assert "py-modules = []" in (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")


# The shape of a file --------------------------------------------------------------------------


@for_each_file
def test_nothing_happens_at_import(path):
    """Only imports, definitions, constants and the guard of a command are at a file's top level."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, *DEFINITIONS)
    for node in parse(path).body:
        is_allowed = isinstance(node, allowed) or is_docstring(node)
        is_allowed = is_allowed or is_main_guard(node) or is_type_checking(node)
        assert is_allowed, f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"


@for_each_file
def test_imports_are_at_the_top_of_a_file_or_late_in_a_function(path):
    body = parse(path).body
    top = [is_import(node) or is_type_checking(node) or is_docstring(node) for node in body]
    first_other = top.index(False) if False in top else len(body)
    for node in body[first_other:]:
        assert not is_import(node), f"{path.name}:{node.lineno}: an import in mid-file"
        assert not is_type_checking(node), f"{path.name}:{node.lineno}: an import in mid-file"


@for_each_file
def test_every_file_states_its_job_and_a_command_the_line_that_runs_it(path):
    tree = parse(path)
    docstring = ast.get_docstring(tree)
    assert docstring
    if any(is_main_guard(node) for node in tree.body):
        assert f"python {path.name}" in docstring


@for_each_command
def test_main_is_the_last_definition_of_a_command_before_the_guard(name):
    *_, main, guard = parse(CHECKOUT / f"{name}.py").body
    assert isinstance(main, ast.FunctionDef) and main.name == "main"
    assert is_main_guard(guard)


@for_each_command
def test_main_has_at_most_one_block_of_late_imports(name):
    (main,) = [
        node
        for node in parse(CHECKOUT / f"{name}.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    # A block is a run of imports that nothing interrupts.
    blocks = 0
    for parent in ast.walk(main):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(parent, field, None)
            if isinstance(statements, list):
                kinds = [is_import(statement) for statement in statements]
                blocks += sum(
                    now and not before for before, now in zip([False, *kinds], kinds, strict=False)
                )
    assert blocks <= 1


@for_each_file
def test_text_files_are_opened_as_utf8_and_pickles_never(path):
    source = path.read_text(encoding="utf-8")
    for call in re.findall(
        r"(?:(?<!os\.)(?<!webbrowser\.)\bopen|read_text|write_text)\((.*)\)", source
    ):
        assert "encoding=" in call or re.search(r'"[rw]b\+?"', call) or not call, call
    assert "weights_only=False" not in source
    # One module reads a pickle: it refuses all but plain values before the first is made.
    assert path.name == "pickles.py" or "import pickle" not in source
