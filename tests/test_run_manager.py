"""utils/run_manager.py: run ids, run directories, and the record of how a run was made.

python -m pytest tests/test_run_manager.py
"""

import json
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from parameters import ModelConfig
from utils import run_manager
from utils.errors import UserError
from utils.run_manager import (
    create_run_directory,
    create_run_id,
    describe_environment,
    describe_git,
    read_record,
    write_full_config,
    write_metadata,
)

NOW = datetime(2026, 1, 31, 23, 59, 58)


# The directory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        (None, "20260131_235958"),
        ("baseline", "20260131_235958_baseline"),
        ("a b/c\\d:e", "20260131_235958_a-b-c-d-e"),
        ("../../etc", "20260131_235958_etc"),
        ("...", "20260131_235958"),
        ("première", "20260131_235958_première"),
        ("x" * 300, "20260131_235958_" + "x" * 60),
        ("line\nbreak\x00", "20260131_235958_line-break"),
    ],
)
def test_a_run_id_is_the_time_and_the_sanitized_tag(tag, expected):
    assert create_run_id(tag, NOW) == expected


def test_a_taken_run_id_gets_a_number(tmp_path):
    names = [create_run_directory(tmp_path / "runs", "r").run_id for _ in range(3)]
    assert names == ["r", "r_2", "r_3"]


def _start(runs_dir: Path) -> str:
    return create_run_directory(runs_dir, "same").run_id


def test_processes_that_start_at_once_create_different_directories(tmp_path):
    with ProcessPoolExecutor(8) as pool:
        names = list(pool.map(_start, [tmp_path / "runs"] * 20))
    assert len(set(names)) == 20
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)


def test_a_run_directory_has_the_documented_structure(tmp_path):
    run = create_run_directory(tmp_path / "runs", "r")
    assert run.tensorboard.is_dir()
    assert run.meta.is_dir()
    assert run.export.parent.is_dir()
    assert {path.name for path in run.path.iterdir()} == {"artifacts", "logs", "meta"}


def test_a_runs_dir_of_thousands_of_characters_is_a_short_line():
    with pytest.raises(UserError, match="--runs-dir") as caught:
        create_run_directory(Path("x" * 5000), "r")
    assert len(str(caught.value)) < 400


def test_a_runs_dir_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "runs"
    for place in (tmp_path / "file", below, Path("/proc/runs"), Path("nul\0l")):
        with pytest.raises(UserError, match="--runs-dir"):
            create_run_directory(place, "r")


# The record -----------------------------------------------------------------------------------


def test_env_txt_has_no_environment_variables(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    record = describe_environment({"device": "CPU"})
    assert "hf_secret_value" not in record
    assert "HF_TOKEN" not in record
    assert "device: CPU" in record
    assert "python: 3." in record
    assert "pydantic==" in record


def test_full_config_has_the_sources_and_no_setting_of_the_run_itself(tmp_path):
    config = ModelConfig(run_tag="secret-plan", n_layer=3)
    sources = dict.fromkeys(ModelConfig.model_fields, "default") | {"n_layer": "--n-layer"}
    write_full_config(tmp_path / "c.json", config, sources, {"run_id": "r"})
    record = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert record["config"]["n_layer"] == 3
    assert record["sources"]["n_layer"] == "--n-layer"
    assert record["run"] == {"run_id": "r"}
    assert record["config"].keys() == record["sources"].keys()
    assert not {"run_tag", "runs_dir"} & record["config"].keys()


def test_a_record_is_read_back(repo, tmp_path):
    run = create_run_directory(tmp_path / "runs", "r")
    (repo / "code.py").write_text("changed\n", encoding="utf-8")
    config = ModelConfig(n_layer=3)
    sources = {"n_layer": "--n-layer"}
    write_metadata(run.meta, repo, config, sources, {"argv": []}, {})
    record = read_record(run.path)
    assert record["config"]["n_layer"] == 3
    assert record["sources"] == {"n_layer": "--n-layer"}
    assert record["run"] == {"argv": []}
    assert record["git"]["branch"] == "trunk"
    assert "+changed" in record["diff"]
    (run.meta / "git.txt").unlink()
    record = read_record(run.path)
    assert "unavailable" in record["git"]["git"]
    assert record["diff"] == ""


DAMAGED = [None, "{", "[]", "[" * 100_000, '{"config": {}, "sources": {}, "run": 5}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_missing_or_damaged_record_is_a_users_mistake(tmp_path, content):
    run = create_run_directory(tmp_path / "runs", "r")
    if content is not None:
        (run.meta / "full_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"full_config\.json"):
        read_record(run.path)


# Git ------------------------------------------------------------------------------------------


def git(directory: Path, *words: str) -> str:
    environment = {
        **os.environ,
        **{f"GIT_{who}_NAME": "test" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "t@example.org" for who in ("AUTHOR", "COMMITTER")},
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    done = subprocess.run(
        ["git", *words], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def repo(tmp_path) -> Path:
    """A repository with one commit of two files."""
    path = tmp_path / "repo"
    path.mkdir()
    git(path, "init", "-q", "-b", "trunk")
    (path / "code.py").write_text("one\ntwo\n", encoding="utf-8")
    (path / "blob.bin").write_bytes(bytes(range(256)))
    git(path, "add", ".")
    git(path, "commit", "-qm", "first")
    return path


def test_a_clean_checkout_is_its_commit(repo):
    record = describe_git(repo).decode()
    assert f"commit: {git(repo, 'rev-parse', 'HEAD').strip()}" in record
    assert "branch: trunk" in record
    assert "dirty: no" in record


SETTINGS = {
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "color.ui": "always",
    "diff.context": "0",
    "diff.external": "echo",
    "diff.renames": "copies",
    "core.quotePath": "false",
}


@pytest.mark.parametrize("setting", [None, *SETTINGS])
def test_git_apply_accepts_the_recorded_diff(repo, tmp_path, setting):
    if setting:
        git(repo, "config", setting, SETTINGS[setting])
    (repo / "code.py").write_bytes(b"one\ntwo and \xe9\nno newline at the end")
    (repo / "blob.bin").write_bytes(bytes(reversed(range(256))))
    (repo / "new.py").write_text("staged\n", encoding="utf-8")
    git(repo, "add", "new.py")
    (repo / "stray.txt").touch()
    record = describe_git(repo)
    assert b"dirty: yes (3 changed, 1 untracked)" in record
    assert b"untracked:\n  stray.txt" in record
    git(repo, "clone", "-q", ".", str(tmp_path / "clone"))
    (tmp_path / "git.txt").write_bytes(record)
    git(tmp_path / "clone", "apply", str(tmp_path / "git.txt"))
    for name in ("code.py", "blob.bin", "new.py"):
        assert (tmp_path / "clone" / name).read_bytes() == (repo / name).read_bytes()


def test_variables_that_select_another_repository_are_ignored(repo, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (repo / "code.py").write_text("changed\n", encoding="utf-8")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    record = describe_git(repo).decode()
    assert "branch: trunk" in record
    assert "+changed" in record


def test_the_record_does_not_write_the_index(repo):
    os.utime(repo / "code.py", (1, 1))  # git would note the new time in its index
    before = (repo / ".git" / "index").read_bytes()
    describe_git(repo)
    assert (repo / ".git" / "index").read_bytes() == before


def test_the_record_of_a_copy_inside_another_repository_has_no_changes_of_that_one(repo):
    (repo / "folio").mkdir()
    (repo / "folio" / "train.py").touch()
    (repo / "code.py").write_text("private\n", encoding="utf-8")
    record = describe_git(repo / "folio").decode()
    assert "private" not in record
    assert "dirty: no (0 changed, 1 untracked)" in record


def test_a_huge_diff_is_capped_with_a_note(repo, monkeypatch):
    monkeypatch.setattr(run_manager, "DIFF_LIMIT", 1000)
    (repo / "code.py").write_text("line\n" * 10_000, encoding="utf-8")
    record = describe_git(repo)
    assert b"diff: over 1000 bytes" in record
    assert len(record) < 2000


def test_names_of_untracked_files_are_quoted_as_git_does(repo):
    for name in ("a b", "tab\t", "plain"):
        (repo / name).touch()
    record = describe_git(repo).decode()
    assert 'untracked:\n  "a b"\n  plain\n  "tab\\t"\n' in record


def test_many_untracked_files_are_counted(repo, monkeypatch):
    monkeypatch.setattr(run_manager, "UNTRACKED_LIMIT", 3)
    for number in range(9):
        (repo / f"{number}.txt").touch()
    assert "and 6 more" in describe_git(repo).decode()


def test_a_detached_head_is_recorded(repo):
    git(repo, "checkout", "-q", "--detach")
    record = describe_git(repo).decode()
    assert "branch: (detached)" in record
    assert git(repo, "rev-parse", "HEAD").strip() in record


def test_a_repository_without_commits_is_recorded(tmp_path):
    git(tmp_path, "init", "-q", "-b", "trunk")
    (tmp_path / "new.py").touch()
    record = describe_git(tmp_path).decode()
    assert "commit: (none yet)" in record
    assert "new.py" in record


def test_a_worktree_is_recorded(repo, tmp_path):
    git(repo, "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    assert "branch: side" in describe_git(tmp_path / "side").decode()


def test_a_directory_inside_a_repository_is_recorded(repo):
    (repo / "inner").mkdir()
    assert "branch: trunk" in describe_git(repo / "inner").decode()


def test_code_outside_git_is_recorded_as_such(tmp_path):
    assert describe_git(tmp_path) == b"git: unavailable: the code is not in a git repository\n"


def test_a_repository_of_dubious_ownership_is_recorded_as_such(repo, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    record = describe_git(repo).decode()
    assert record.startswith("git: unavailable: ")
    assert "dubious ownership" in record


def test_a_machine_without_git_is_recorded_as_such(repo, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_git(repo).startswith(b"git: unavailable: git is not installed")


def test_a_git_command_that_hangs_is_stopped(repo, monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(run_manager, "GIT_SECONDS", 1)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    started = datetime.now()
    assert describe_git(repo).startswith(b"git: unavailable: ")
    assert (datetime.now() - started).total_seconds() < 20


def test_a_git_program_with_other_output_is_recorded_as_such(repo, monkeypatch, tmp_path):
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '# branch.head'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    assert describe_git(repo).startswith(b"git: unavailable: ")
