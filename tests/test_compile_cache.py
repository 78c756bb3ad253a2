"""utils/compile_cache.py: compiled loops are kept where others find them, and only if intact.

python -m pytest tests/test_compile_cache.py
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from utils.compile_cache import CompileCache

SOURCE = """
def double(x):
    return 2 * x
"""
OPTIONS = {"error_model": "numpy"}


def load_double(checkout: Path, source: str = SOURCE):
    """Return the function of a module in a checkout of its own."""
    checkout.mkdir(exist_ok=True)
    (checkout / "loops.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("loops", checkout / "loops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["loops"] = module
    return module.double


def open_cache(checkout: Path, **changes) -> CompileCache:
    return CompileCache(load_double(checkout, **changes), OPTIONS, "int64")


def compile_double(cache: CompileCache) -> bool:
    """Get the function; return whether it was compiled, as opposed to loaded."""
    double = cache.get(lambda function: function(1))
    assert double(21) == 42
    return not any(double.stats.cache_hits.values())


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    monkeypatch.delitem(sys.modules, "loops", raising=False)
    return tmp_path / "checkout"


def fail_to_write(*arguments, **options):
    raise PermissionError(13, "Permission denied")


def get_user_cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "folio" / "compiled"


def test_a_function_is_compiled_once_and_then_loaded(checkout):
    first = open_cache(checkout)
    assert not first.is_compiled
    assert compile_double(first)
    second = open_cache(checkout)
    assert second.is_compiled
    assert not compile_double(second)


def test_another_checkout_of_the_same_user_finds_it(checkout, tmp_path):
    compile_double(open_cache(checkout))
    assert not compile_double(open_cache(tmp_path / "another"))


def test_another_user_of_the_same_checkout_finds_it(checkout, tmp_path, monkeypatch):
    compile_double(open_cache(checkout))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    assert not compile_double(open_cache(checkout))


def test_a_change_of_the_source_is_compiled_anew(checkout):
    compile_double(open_cache(checkout))
    assert compile_double(open_cache(checkout, source=SOURCE.replace("2 * x", "x + x")))


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "a directory", "not a zip"])
def test_a_damaged_cache_is_replaced(checkout, damage):
    compile_double(open_cache(checkout))
    places = (get_user_cache(), checkout / "__pycache__")
    for path in [path for place in places for path in place.glob("*.zip")]:
        content = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "changed":  # one bit of the machine code
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "not a zip":
            path.write_bytes(b"PK\3\4" + bytes(100))
        else:
            path.unlink()
            path.mkdir()
    cache = open_cache(checkout)
    assert not cache.is_compiled
    assert compile_double(cache)
    if damage != "a directory":
        assert not compile_double(open_cache(checkout))


def test_no_changed_byte_is_ever_run(checkout):
    compile_double(open_cache(checkout))
    shutil.rmtree(get_user_cache())
    (path,) = (checkout / "__pycache__").glob("*.zip")
    content, files = path.read_bytes(), open_cache(checkout)._files
    for position in range(0, len(content), 97):
        changed = bytearray(content)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        assert open_cache(checkout)._files in (None, files)  # or a field that has no effect


@pytest.mark.parametrize("content", [{}, {"x.nbi": b"no pickle"}, {"double-2.nbi": b""}])
def test_a_whole_archive_of_something_else_does_no_harm(checkout, content):
    compile_double(open_cache(checkout))
    for place in (get_user_cache(), checkout / "__pycache__"):
        (path,) = place.glob("*.zip")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**content, **({names[0]: b"?"} if content else {})}.items():
                archive.writestr(name, data)
    assert compile_double(open_cache(checkout))


def test_a_directory_in_which_nothing_can_be_created_is_not_writable(checkout, monkeypatch):
    cache = open_cache(checkout)
    assert cache.is_writable
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr("tempfile.TemporaryFile", fail_to_write)
    assert not open_cache(checkout).is_writable


def test_a_directory_of_another_user_is_not_writable(checkout, monkeypatch):
    monkeypatch.setattr(Path, "exists", fail_to_write)  # pathlib raises it until Python 3.13
    assert not open_cache(checkout).is_writable


def test_an_archive_that_unpacks_to_gigabytes_is_not_read(checkout):
    cache = open_cache(checkout)
    compile_double(cache)
    for place in (get_user_cache(), checkout / "__pycache__"):
        (path,) = place.glob("*.zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("zeros", bytes(1 << 27))
    assert not open_cache(checkout).is_compiled


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can chown")
def test_machine_code_in_another_users_cache_is_not_run(checkout):
    compile_double(open_cache(checkout))
    shutil.rmtree(checkout / "__pycache__")
    os.chown(get_user_cache(), 12345, -1)
    cache = open_cache(checkout)
    assert not cache.is_compiled
    assert compile_double(cache)


def test_without_any_writable_place_it_compiles_each_time(checkout, monkeypatch):
    def fail(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("utils.compile_cache.write_atomic", fail)
    monkeypatch.setattr("utils.compile_cache._can_write_in", lambda directory: False)
    for _ in range(2):
        cache = open_cache(checkout)
        assert not cache.is_writable
        assert compile_double(cache)


def test_without_a_place_for_temporary_files_it_compiles_each_time(checkout, monkeypatch):
    def fail(**options):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", fail)
    assert compile_double(open_cache(checkout))


def test_two_first_starts_at_the_same_time_both_work(checkout):
    code = f"""
import sys; sys.path[:0] = [{str(Path.cwd())!r}, {str(checkout)!r}]
import loops
from utils.compile_cache import CompileCache
double = CompileCache(loops.double, {OPTIONS!r}, "int64").get(lambda function: function(1))
assert double(21) == 42
"""
    load_double(checkout)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert not compile_double(open_cache(checkout))
