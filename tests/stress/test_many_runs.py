"""Many runs started at the same moment.

make test-stress
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CHECKOUT, TINY_FLAGS


@pytest.mark.stress
def test_twenty_runs_started_at_once_with_one_tag_get_twenty_run_directories(text_file):
    command = [sys.executable, str(CHECKOUT / "train.py"), "--data", str(text_file), *TINY_FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, "--run-tag=same"], env=environment, stdout=subprocess.DEVNULL)
        for _ in range(20)
    ]
    assert [process.wait(timeout=300) for process in started] == [0] * 20
    runs = list(Path("runs").iterdir())
    assert len(runs) == 20
    assert all((run / "artifacts" / "export" / "model.safetensors").exists() for run in runs)
