"""Pausing garbage collection. utils/garbage.py."""

import gc
import weakref

import pytest

from utils.garbage import pause_garbage_collection


class Cycle:
    def __init__(self):
        self.itself = self


def test_garbage_is_collected_again_after_the_block_even_after_an_error():
    with pytest.raises(ImportError), pause_garbage_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_what_was_created_is_in_the_oldest_generation_and_not_exempt_from_collection():
    with pause_garbage_collection():
        cycle = Cycle()
        reference = weakref.ref(cycle)
    assert any(each is cycle for each in gc.get_objects(generation=2))
    del cycle
    gc.collect()
    assert reference() is None


def test_a_program_that_had_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with pause_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
