"""Threads that compete with another program for the cores (utils/threads.py)."""

import os
import threading
import time

import pytest

from utils import threads
from utils.threads import CoreBinding

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_affinity = pytest.mark.skipif(len(CORES) < 2, reason="needs Linux and two cores")


class FakeSystem:
    """Threads that run and wait as a test says, and the cores that they are bound to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int = 2):
        self.now, self.times, self.bound = 0.0, {1: (0.0, 0.0), 2: (0.0, 0.0), 3: (0.0, 0.0)}, {}
        self.free = set(range(cores))
        monkeypatch.setattr(threads, "COMPETING", 0.2)
        monkeypatch.setattr(threads, "read_threads", lambda: dict(self.times))
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: self.free, raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", self.bind, raising=False)
        for name in threads.OPENMP_PLACES:
            monkeypatch.delenv(name, raising=False)

    def bind(self, thread: int, cores: set[int]) -> None:
        self.bound[thread] = set(cores)
        if self.bound[thread] == self.free:
            del self.bound[thread]

    def run(self, cores: CoreBinding, waiting: float, seconds: float = 2.0) -> None:
        """Let threads 1 and 3 compute, of which thread 3 waits for `waiting` of the time."""
        self.now += seconds
        for thread, (ran, waited) in ((1, (1.0, 0.0)), (2, (0.01, 0.0)), (3, (0.5, waiting))):
            before = self.times[thread]
            self.times[thread] = (before[0] + ran * seconds, before[1] + waited * seconds)
        cores.update()


def test_the_threads_that_compute_get_a_core_each_while_they_have_to_wait(monkeypatch):
    system, notes = FakeSystem(monkeypatch), []
    with CoreBinding(2, notes.append) as cores:
        system.run(cores, waiting=0.0)
        assert not system.bound
        system.run(cores, waiting=0.7)
        assert system.bound == {1: {0}, 3: {1}}
        system.run(cores, waiting=0.5)  # the other program goes on
        assert system.bound == {1: {0}, 3: {1}}
        system.run(cores, waiting=0.0)
        assert not system.bound
        system.run(cores, waiting=0.7)
        assert system.bound
    assert not system.bound
    assert len(notes) == 1
    assert "70%" in notes[0]


@pytest.mark.parametrize("name", threads.OPENMP_PLACES)
def test_a_binding_that_the_user_has_set_stays(monkeypatch, name):
    system, notes = FakeSystem(monkeypatch), []
    monkeypatch.setenv(name, "true")
    with CoreBinding(2, notes.append) as cores:
        system.run(cores, waiting=0.7)
    assert not system.bound
    assert len(notes) == 1


@pytest.mark.parametrize(("num_threads", "cores"), [(2, 4), (3, 2), (1, 1)])
def test_threads_are_not_bound_if_there_is_a_core_to_choose(monkeypatch, num_threads, cores):
    system, notes = FakeSystem(monkeypatch, cores), []
    with CoreBinding(num_threads, notes.append) as binding:
        system.run(binding, waiting=0.7)
    assert not system.bound
    assert ("threads" in notes[0]) == (num_threads > 1)


def test_fewer_threads_than_cores_and_a_lost_proc_do_not_end_a_run(monkeypatch):
    system, notes = FakeSystem(monkeypatch, cores=4), []
    with CoreBinding(4, notes.append) as binding:
        system.run(binding, waiting=0.7)  # of three threads
        assert len(system.bound) == 3
        system.times = {}
        system.now += 2
        binding.update()


def test_threads_that_were_started_while_bound_are_released_too(monkeypatch):
    system = FakeSystem(monkeypatch)
    with CoreBinding(2, print) as binding:
        system.run(binding, waiting=0.7)
        system.times[4] = (0.0, 0.0)
        system.bound[4] = {0}
    assert not system.bound


def test_more_threads_than_cores_are_not_blamed_on_another_program(monkeypatch):
    system, notes = FakeSystem(monkeypatch), []
    with CoreBinding(3, notes.append) as binding:
        system.run(binding, waiting=0.7)
    assert "another program" not in notes[0]
    assert "num_threads" in notes[0]


def test_nothing_is_read_or_bound_between_two_looks_or_without_threads(monkeypatch):
    system, notes = FakeSystem(monkeypatch), []
    with CoreBinding(2, notes.append) as cores:
        system.run(cores, waiting=0.7, seconds=0.5)
    with CoreBinding(0, notes.append) as cores:
        system.run(cores, waiting=0.7)
    system.times = {}
    with CoreBinding(2, notes.append) as cores:  # a system without schedstat
        system.now += 2
        cores.update()
    assert not system.bound
    assert not notes


@needs_affinity
def test_real_threads_are_bound_and_released(monkeypatch):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(10,))
    thread.start()
    own = {threading.get_native_id(), thread.native_id}
    assert own <= threads.read_threads().keys()
    with CoreBinding(len(CORES), print) as cores:
        cores._bind([threading.get_native_id(), thread.native_id, *([10**9] * (len(CORES) - 2))])
        assert {tuple(os.sched_getaffinity(each)) for each in own} == {(CORES[0],), (CORES[1],)}
    assert all(sorted(os.sched_getaffinity(each)) == CORES for each in own)
    stop.set()
    thread.join()
