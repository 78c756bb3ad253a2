"""utils/memory.py: models that cannot fit are refused, before anything is allocated.

python -m pytest tests/test_memory.py
"""

import platform
import subprocess
import sys

import pytest
from helpers import CHECKOUT

from model import LanguageModel
from parameters import ModelConfig
from utils.errors import UserError
from utils.memory import check_memory

SHAPES = {
    "modern": {"tie_weights": True},
    "gpt2": {"block_size": 500},
    "speedrun": {"ngram_rows": 5000},
}


@pytest.mark.parametrize("architecture", SHAPES)
def test_all_embeddings_and_tables_of_the_model_are_counted(architecture, monkeypatch):
    shape = {"n_embd": 192, "n_head": 4, "n_layer": 2, "block_size": 200, **SHAPES[architecture]}
    config = ModelConfig(architecture=architecture, **shape)
    model, V = LanguageModel(config, 65), 65
    size = 4 * sum(each.numel() for each in [*model.parameters(), *model.buffers()])
    for available, fits in ((1.02 * size, True), (0.97 * size, False)):
        monkeypatch.setattr("utils.memory._get_total_memory", lambda device, n=available: int(n))
        if fits:
            check_memory(config, V, None)
        else:
            with pytest.raises(UserError, match="memory"):
                check_memory(config, V, None)


def test_the_rows_of_n_grams_are_named_if_they_do_not_fit(monkeypatch):
    monkeypatch.setattr("utils.memory._get_total_memory", lambda device: 10**9)
    config = ModelConfig(architecture="speedrun", ngram_rows=1 << 24)
    with pytest.raises(UserError, match="ngram_rows 16777216"):
        check_memory(config, 65, None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory or not")
def test_freed_memory_is_used_again_without_asking_the_system():
    script = """
import resource, sys
from utils.memory import keep_freed_memory
keep_freed_memory()
def count_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [b"1" * (24 << 20) for _ in range(4)]  # 24,576 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = count_page_faults(), count_page_faults()
sys.exit(first < 1000 or second > 1000)
"""
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)
