"""README.md and docs/: commands run, links resolve, named files exist.

python -m pytest tests/test_docs.py
"""

import gzip
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, LINES

from utils.tracking.metrics import METRICS, get_tag

# The pages whose commands run, in an order in which each finds the models that it needs.
PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            *("resume", "configuration", "generation", "export", "data", "tracking"),
            *("distributed", "search", "reproducibility", "benchmarks", "development", "teaching"),
        )
    ),
]
TEXTS = {
    path.relative_to(CHECKOUT).as_posix(): path.read_text(encoding="utf-8")
    for path in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")))
}
EXAMPLE_RUN = "20260131_235959_baseline"


def find_blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def find_commands(page: str) -> list[str]:
    """Return the commands of a page's bash blocks, without their comments."""
    return [
        line.partition("  #")[0].strip()
        for block in find_blocks(page, "bash")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def find_tree(page: str) -> list[str]:
    """Return the paths of the files and directories in a page's tree of the checkout."""
    (tree,) = (block for block in find_blocks(page, "text") if block.startswith("folio\n"))
    paths, parents = [], []
    for prefix, name in re.findall(r"^((?:│   |    |├── |└── )+)([\w./]+)", tree, re.MULTILINE):
        parents[len(prefix) // 4 - 1 :] = [name.rstrip("/")]
        paths.append("/".join(parents))
    return paths


def list_checkout_files() -> list[Path]:
    """Return the files that git tracks or would add, relative to the checkout."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(name) for name in names.stdout.splitlines() if (CHECKOUT / name).exists()]


def copy_checkout(target: Path) -> Path:
    """Copy the checkout's files."""
    for name in list_checkout_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, target / name)
    return target


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the checkout whose configs/ make a model that trains in a second."""
    target = copy_checkout(tmp_path / "folio")
    small = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 16, "batch_size": 2}
    small |= {"max_iters": 4, "warmup_iters": 1, "eval_interval": 2, "eval_iters": 1}
    for path in (target / "configs").glob("*.*"):
        if path.name != "schema.json":
            text = path.read_text(encoding="utf-8")
            for name, value in small.items():
                text = re.sub(rf'^(\s*"?{name}"?: )[^,\s]+', rf"\g<1>{value}", text, flags=re.M)
            path.write_text(text, encoding="utf-8")
    (target / "input.txt").write_text("ROMEO:\n" + LINES * 20, encoding="utf-8")
    return target


def write_data(path: Path) -> None:
    """Write the text that a command's --data names: a file, or the directory `texts`."""
    if "texts" in path.parts:
        directory = Path(*path.parts[: path.parts.index("texts") + 1])
        directory.mkdir(exist_ok=True)
        for name in ("one.txt", "two.txt"):
            (directory / name).write_text(LINES * 20, encoding="utf-8")
    else:
        content = (LINES * 20).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def prepare(command: str, clone: Path) -> list[str] | None:
    """Return a command's words, shortened to run in seconds; None for one that is not run."""
    words = shlex.split(command)
    if words[:2] == ["make", "train"]:
        words = ["python", "train.py"]
    if words[0] not in ("python", "torchrun") or words[1] == "-m":
        return None
    if "--aim-logging" in words and not importlib.util.find_spec("aim"):
        return None
    if "--max-iters" in words:
        index = words.index("--max-iters") + 1
        words[index] = str(max(1, int(words[index]) // 100))
    if "--vocab-size" in words:  # the text is short
        words[words.index("--vocab-size") + 1] = "280"
    if "--max-minutes" in words:
        words[words.index("--max-minutes") + 1] = "0.02"
    if "--data" in words:
        write_data(clone / words[words.index("--data") + 1])
    if words[1] == "profile_model.py":
        words += ["--steps", "3"]
    if "--interactive" in words:
        words += ["--max-new-tokens", "5"]
    if EXAMPLE_RUN in command:
        newest = max(path.parent.name for path in (clone / "runs").glob("*/artifacts"))
        words = [word.replace(EXAMPLE_RUN, newest) for word in words]
    return words


@pytest.mark.slow
def test_every_documented_command_and_snippet_works_in_its_order(clone):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(words: list[str]) -> str:
        done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    for page in PAGES:
        for command in find_commands(page):
            if words := prepare(command, clone):
                run(words)
        for snippet in find_blocks(page, "python"):
            if "import optuna" in snippet:  # it reads a study of an earlier version
                continue
            shorter = re.sub(r'(max_iters"?\W+\d+)00\b', r"\1", snippet)
            printed = run([sys.executable, "-c", shorter])
            if "generate_tokens" in snippet:
                assert printed.startswith("To be")
                assert len(printed) == len("To be") + 200 + 1 + 200


@pytest.mark.parametrize("page", TEXTS)
def test_every_other_documented_command_is_known(page):
    for command in find_commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            subprocess.run(["make", "-n", words[1]], cwd=CHECKOUT, check=True, capture_output=True)
        elif words[0] == "pip":
            files = [word for word in words if word.endswith(".txt")]
            assert files
            assert all((CHECKOUT / name).exists() for name in files)
        elif words[:2] == ["python", "-m"]:
            names = ("time_to_loss", "gpu", "exports", "page")
            assert words[2] in ("venv", "benchmarks", *(f"benchmarks.{name}" for name in names))
        elif words[0] in ("python", "torchrun"):
            scripts = [word for word in words if word.endswith(".py")]
            assert scripts
            assert (CHECKOUT / scripts[0]).exists(), command
        else:
            known = ("source", "tensorboard", "aim", "optuna-dashboard", "curl", "tail")
            assert words[0] in known, command


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_that_needs_tiny_shakespeare_has_the_command_that_downloads_it(page):
    blocks = "\n".join(find_blocks(page, "bash"))
    downloaded = re.findall(r"^curl .*--output (\S+) https://", blocks, re.MULTILINE)
    needed = re.findall(r"--data (\S*tinyshakespeare\S*\.txt)", blocks)
    assert set(needed) <= set(downloaded)


@pytest.mark.parametrize("page", TEXTS)
def test_every_relative_link_and_anchor_resolves(page):
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for target in re.findall(r'(?:\]\(|src(?:set)?=")([^)\s"]+)', prose):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (CHECKOUT / page).parent / name if name else CHECKOUT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
            assert anchor in slugs, target


def test_the_tracking_page_has_every_metric_as_it_is_declared():
    for name, metric in METRICS.items():
        tags = ", ".join(f"`{get_tag(name, subset)}`" for subset in metric.subsets)
        row = f"| {name} | {tags} | {metric.unit} | {metric.meaning} |"
        assert row in TEXTS["docs/tracking.md"], row


@pytest.mark.parametrize("page", ["README.md", "docs/development.md"])
def test_every_file_in_a_tree_exists(page):
    paths = find_tree(page)
    assert len(paths) >= 5
    for path in paths:
        assert (CHECKOUT / path).exists(), path


def test_every_module_stands_in_the_tree_of_the_development_page():
    files = [path.as_posix() for path in list_checkout_files()]
    modules = {path for path in files if re.fullmatch(r"\w+\.py", path)}
    packages = ("utils/", "exporters/")
    modules |= {"/".join(path.split("/")[:2]) for path in files if path.startswith(packages)}
    modules -= {"utils/__init__.py", "exporters/__init__.py", "exporters/templates"}
    assert modules <= set(find_tree("docs/development.md"))


def test_the_readme_is_short_and_has_every_topic_under_its_usual_word():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    topics = "Install, Quick start, Configuration, Resume, Fine-tuning, Generation, Evaluation, "
    topics += "Export, Tracking, Distributed, Hyperparameter search, Reproducibility, Benchmarks, "
    topics += "Development, Profiling, Report"
    for topic in topics.split(", "):
        assert re.search(rf"^(## |\| ){topic}\b", TEXTS["README.md"], re.MULTILINE), topic


def test_make_help_lists_the_targets():
    done = subprocess.run(["make"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for target in ("train", "test", "venv", "lint", "bench", "help"):
        assert re.search(rf"^{target}\s", done.stdout, re.MULTILINE), target


@pytest.mark.slow
def test_make_train_on_a_fresh_clone_does_everything(tmp_path):
    """Needs the package registry: it installs all that training needs."""
    target = copy_checkout(tmp_path / "fresh")
    flags = "ARGS=--run-tag fresh --max-iters 30 --eval-iters 2"
    keep = ("PATH", "HOME", "LANG")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in keep or name.startswith(("PIP_", "SSL_"))
    }
    done = subprocess.run(
        ["make", "train", flags], cwd=target, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (target / "runs").iterdir()
    assert (run_dir / "artifacts" / "export" / "model.safetensors").exists()
    (packages,) = (target / ".venv").glob("lib/*/site-packages")
    for name in ("config.py", "train.py", "utils", "data.py", "benchmarks", "tests"):
        assert not (packages / name).exists(), name
    next_command = done.stdout.partition("Next:\n")[2].splitlines()[0].strip()
    generated = subprocess.run(next_command, shell=True, cwd=target, capture_output=True, text=True)
    assert generated.returncode == 0, generated.stderr
    assert len(generated.stdout) > 100
