"""README.md: what it tells people to type works.

python -m pytest tests/test_readme.py
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
from conftest import CHECKOUT, LINES

from utils.tracking.metrics import METRICS, get_tag

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLE_RUN = "20260131_235959_baseline"


def checked_out_files() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(name) for name in names.stdout.splitlines() if (CHECKOUT / name).exists()]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the checkout whose configs/ make a model that trains in a second."""
    target = tmp_path / "folio"
    for name in checked_out_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, target / name)
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


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_its_order(clone):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = 0
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] not in ("python", "torchrun") or words[1] == "-m":
            continue
        if "--aim-logging" in words and not importlib.util.find_spec("aim"):
            continue
        if "--max-iters" in words:  # a hundredth will do
            index = words.index("--max-iters") + 1
            words[index] = str(max(1, int(words[index]) // 100))
        if "--data" in words:
            text = clone / words[words.index("--data") + 1]
            if text.parts[len(clone.parts)] == "texts":
                (clone / "texts").mkdir(exist_ok=True)
                for name in ("one.txt", "two.txt"):
                    (clone / "texts" / name).write_text(LINES * 20, encoding="utf-8")
            else:
                content = (LINES * 20).encode()
                text.write_bytes(gzip.compress(content) if text.suffix == ".gz" else content)
        if words[1] == "profile_model.py":
            words += ["--steps", "3"]
        if "--interactive" in words:
            words += ["--max-new-tokens", "5"]
        if EXAMPLE_RUN in command:
            newest = max(path.parent.name for path in (clone / "runs").glob("*/artifacts"))
            words = [word.replace(EXAMPLE_RUN, newest) for word in words]
        done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 8
    snippet = next(each for each in SNIPPETS if "load_model" in each)
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("To be")
    assert len(done.stdout) == len("To be") + 200 + 1 + 200


def test_every_other_command_of_the_readme_is_known():
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            subprocess.run(["make", "-n", words[1]], cwd=CHECKOUT, check=True, capture_output=True)
        elif words[0] in ("tensorboard", "aim", "optuna-dashboard"):
            assert (
                words[0] != "tensorboard" or (Path(sys.executable).parent / "tensorboard").exists()
            )
        elif words[0] == "pip":
            files = [word for word in words if word.endswith(".txt")]
            assert all((CHECKOUT / name).exists() for name in files)
            assert files
        elif words[:2] == ["python", "-m"]:
            assert words[2] in ("venv", "benchmarks", "benchmarks.time_to_loss")
        else:
            assert words[0] in ("python", "torchrun", "git", "cd", "source"), command


def test_the_readme_tells_of_every_metric_as_it_is_declared():
    for metric in METRICS:
        tags = ", ".join(f"`{get_tag(metric.name, subset)}`" for subset in metric.subsets)
        assert f"| {metric.name} | {tags} | {metric.unit} | {metric.meaning} |" in README


def test_every_file_the_readme_names_exists():
    tree = re.search(r"```text\n(folio.*?)```", README, re.DOTALL)
    assert tree
    names = re.findall(r"^[├└│─ ]+([\w./]+)", tree[1], re.MULTILINE)
    assert len(names) > 15
    everything = {str(path) for path in checked_out_files()}
    for name in names:
        known = any(name.rstrip("/") in (path, *path.split("/")) for path in everything)
        assert known or (CHECKOUT / name).exists(), name


def test_the_help_of_make_lists_the_targets():
    done = subprocess.run(["make"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for target in ("train", "test", "venv", "lint", "bench", "help"):
        assert re.search(rf"^{target}\s", done.stdout, re.MULTILINE), target


@pytest.mark.slow
def test_make_train_on_a_fresh_clone_does_everything(tmp_path):
    """Needs the package registry: it installs all that training needs."""
    target = tmp_path / "fresh"
    for name in checked_out_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, target / name)
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
    told = done.stdout.partition("Next:\n")[2].splitlines()[0].strip()
    spoken = subprocess.run(told, shell=True, cwd=target, capture_output=True, text=True)
    assert spoken.returncode == 0, spoken.stderr
    assert len(spoken.stdout) > 100
