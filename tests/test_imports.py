"""Importing without looking for garbage. utils/imports.py."""

import gc
import sys

import pytest

from utils.imports import pause_garbage_collection


@pytest.fixture(autouse=True)
def unfreeze():
    yield
    gc.unfreeze()


def test_garbage_is_collected_again_after_the_block_even_after_an_error():
    with pytest.raises(ImportError), pause_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_what_an_import_leaves_is_never_searched_again(monkeypatch):
    with pause_garbage_collection():
        monkeypatch.setitem(sys.modules, "made_up_module", None)
        left = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= 1000
    assert not any(each is left for each in gc.get_objects())


def test_a_block_that_imports_nothing_new_keeps_no_garbage_alive():
    before = gc.get_freeze_count()
    with pause_garbage_collection():
        import json  # noqa: F401  (imported long ago)
    assert gc.get_freeze_count() == before


def test_a_program_that_had_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with pause_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
