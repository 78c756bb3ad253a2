"""Exports in environments without Folio: the code of each card runs there, as its reader would.

python -m pytest tests/test_export_clients.py -m slow
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, save_random_model
from test_export import SHAPE, TEXT, run_export

from tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

LIBRARIES = {
    "hf": ["torch", "transformers"],
    "onnx": ["onnxruntime", "tokenizers"],
    "gguf": ["xllamacpp"],
}


def create_environment(place: Path, libraries: list[str]) -> Path:
    """Create a virtual environment with libraries, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", CHECKOUT / "constraints.txt"]
    subprocess.run([python, *words, *constraints, *libraries], check=True)
    return python


@pytest.mark.parametrize("format", LIBRARIES)
def test_the_code_of_the_card_generates_text_without_folio(format, tmp_path):
    save_random_model(tmp_path / "model", CharTokenizer(sorted(set(TEXT))), **SHAPE)
    directory = run_export(tmp_path / "model", f"--format={format}")
    card = (directory / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 5
    python = create_environment(tmp_path / "venv", LIBRARIES[format])
    options = {"cwd": directory, "capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run([python, "-I", "-c", code], **options)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.removesuffix("\n")
    assert printed and set(printed) <= set(TEXT)
