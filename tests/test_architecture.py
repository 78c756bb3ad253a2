"""The house: who may import whom, and what may happen at import.

python -m pytest tests/test_architecture.py
"""

import ast
import re
import subprocess
import sys

import pytest
from conftest import CHECKOUT

# The reading order. A module imports only from those before it.
ORDER = [
    *(
        "parameters",
        "corpus",
        "config",
        "tokenizer",
        "store",
        "data",
        "sampling",
        "model",
        "decoding",
        "distributed",
        "optim",
        "bundle",
        "checkpoint",
        "start",
        "callbacks",
        "step",
        "prepare",
        "report",
    ),
    *("train", "inference", "evaluate", "inspect_model", "profile_model", "tune"),
]
UTILS = sorted((CHECKOUT / "utils").rglob("*.py"))
FLAT = [CHECKOUT / f"{name}.py" for name in ORDER]


def imported(path) -> set[str]:
    """The first parts of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_every_flat_module_has_its_place_in_the_order():
    assert sorted(path.stem for path in CHECKOUT.glob("*.py")) == sorted(ORDER)


@pytest.mark.parametrize("path", FLAT, ids=lambda path: path.name)
def test_a_module_imports_only_from_those_before_it(path):
    later = set(ORDER[ORDER.index(path.stem) + 1 :])
    assert not imported(path) & later


@pytest.mark.parametrize("path", UTILS, ids=lambda path: path.name)
def test_utils_are_leaves(path):
    assert imported(path) & set(ORDER) <= {"parameters"}


@pytest.mark.parametrize(
    "name",
    [
        *("parameters", "corpus", "config", "store", "bundle", "start", "inspect_model", "report"),
        "tune",
    ],
)
def test_what_runs_before_training_never_imports_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


@pytest.mark.parametrize("path", [*FLAT, *UTILS], ids=lambda path: path.name)
def test_nothing_happens_at_import(path):
    """Only imports, definitions, constants and the guard of a command stand at a file's top."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guards = ("TYPE_CHECKING", "__name__ == '__main__'")
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in guards
        definitions = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
        allowed = isinstance(node, (*definitions, ast.AnnAssign)) or is_docstring or is_guard
        assert allowed, f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"


@pytest.mark.parametrize("path", [*FLAT, *UTILS], ids=lambda path: path.name)
def test_every_file_says_its_job_and_every_command_the_line_that_runs_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
        assert f"python {path.name}" in docstring


@pytest.mark.parametrize("path", [*FLAT, *UTILS], ids=lambda path: path.name)
def test_text_files_are_opened_as_utf8_and_pickles_never(path):
    source = path.read_text(encoding="utf-8")
    for call in re.findall(r"(?:(?<!os\.)\bopen|read_text|write_text)\((.*)\)", source):
        assert "encoding=" in call or re.search(r'"[rw]b\+?"', call) or not call, call
    assert "weights_only=False" not in source
    assert "import pickle" not in source


def test_no_package_shadows_a_real_one():
    assert not {"tensorboard", "aim", "torch"} & {path.stem for path in CHECKOUT.iterdir()}


def test_installing_puts_no_module_in_site_packages():
    assert "py-modules = []" in (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
