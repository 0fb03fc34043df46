"""A job whose processes are forks of a warm one is killed, and dies, as one of fresh processes."""

from __future__ import annotations

import signal
import textwrap
import time
from pathlib import Path

import pytest
from tests.distributed.launch import Torchrun

pytestmark = pytest.mark.dist
RANKS, TIMEOUT_S = 2, 120.0


def start(folder: Path, program: str, *, warm: bool) -> Torchrun:
    script = folder / "program.py"
    script.write_text(f"import os, sys, time\n{textwrap.dedent(program)}")
    options = ["--standalone", f"--nproc_per_node={RANKS}"]
    return Torchrun([*options, str(script), str(folder)], folder / "log", warm=warm)


SAYS_ITS_PID = """
    name = f"{sys.argv[1]}/{os.environ['RANK']}"
    open(name, "w").close()
    os.rename(name, f"{name}-{os.getpid()}")
    time.sleep(600)
"""


def test_a_kill_finds_every_process_of_a_warm_job(tmp_path: Path) -> None:
    with start(tmp_path, SAYS_ITS_PID, warm=True) as job:
        until_s = time.monotonic() + TIMEOUT_S
        while len(pids := [path.name[2:] for path in tmp_path.glob("?-*")]) < RANKS:
            assert time.monotonic() < until_s, job.log.read_text()
            time.sleep(0.01)
        assert job.kill() == 2 * (1 + RANKS), "agent and ranks, each a client and a fork"
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_agent_hears_what_ended_a_rank(tmp_path: Path, *, warm: bool) -> None:
    kill = f"os.kill(os.getpid(), {int(signal.SIGKILL)}) if os.environ['RANK'] == '1' else None"
    with start(tmp_path, kill, warm=warm) as job:
        assert job.finish(TIMEOUT_S) == 1
    assert "Signal 9 (SIGKILL) received by PID" in job.log.read_text()
