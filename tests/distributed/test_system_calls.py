"""SIGKILL at every system call by which a save changes the disk, injected by strace."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest
from tests.distributed.aftermath import check_sound, check_whole
from tests.distributed.launch import World

from ckptcoord import open_repository

pytestmark = [pytest.mark.dist, pytest.mark.waits]

# One group for each way of changing the disk; "when" counts over the calls of a group together.
CALLS = {
    "pwrite64": "pwrite64",
    "fsync": "fsync",
    "link": "link,linkat",
    "rename": "rename,renameat,renameat2",
    "mkdir": "mkdir,mkdirat",
    "unlink": "unlink,unlinkat,rmdir",
}


@pytest.fixture(scope="module")
def strace():
    """strace, where it is installed and may trace."""
    command = shutil.which("strace")
    if command is None:
        pytest.skip("strace is not installed")
    if subprocess.run([command, "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace may not trace here")
    return command


class Traced:
    """strace on all threads of a process; a context manager that detaches.

    strace can wait for ever for the last thread of a process that it saw killed: it is killed too.
    """

    def __init__(self, strace, pid, log, *options):
        self.process = subprocess.Popen(
            [strace, "-f", "-p", str(pid), "-o", str(log), *options], stderr=subprocess.PIPE
        )
        assert b"attached" in self.process.stderr.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process.stderr.close()


def begin(folder, repo):
    """A world of one that has saved step 1."""
    world = World(folder, size=1)
    world.ask("open", output_dir=str(repo))
    world.ask("save", step=1)
    return world


def count_calls(strace, folder):
    """How many calls of each group one save makes."""
    with begin(folder, folder / "counted") as world:
        log = folder / "counted.strace"
        with Traced(strace, world.pid(0), log, "-e", f"trace={','.join(CALLS.values())}"):
            world.ask("save", step=2)
        lines = log.read_text().splitlines()
    return {
        group: sum(any(f" {name}(" in line for name in names.split(",")) for line in lines)
        for group, names in CALLS.items()
    }


def test_a_kill_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(strace, tmp_path):
    counts = count_calls(strace, tmp_path)
    assert counts["rename"] == 1
    assert counts["link"] == 1
    assert min(counts.values()) > 0, counts
    heads = []
    for group, count in counts.items():
        for when in points(count):
            repo = tmp_path / f"{group}{when}"
            inject = f"inject={CALLS[group]}:signal=KILL:when={when}"
            with begin(tmp_path, repo) as world:
                log = tmp_path / "strace"
                trace = f"trace={CALLS[group]}"
                with Traced(strace, world.pid(0), log, "-e", trace, "-e", inject):
                    world.tell("save", step=2)
                    assert world.hear(20) == {}, f"survived {inject}"
            heads.append((group, when, check(tmp_path, repo)))
    # The link is the commit. The signal kills before the call that it is injected into, so only
    # what comes after the link leaves the new one: the folder's fsync, and the temporary's unlink.
    before = [head for group, _, head in heads if group not in ("fsync", "unlink")]
    assert set(before) == {1}
    assert [head for group, _, head in heads if group == "fsync"][-1] == 2
    assert [head for group, _, head in heads if group == "unlink"][-1] == 2


def points(count):
    """Up to seven of the calls 1 to count, the first and the last among them."""
    return sorted({*range(1, count + 1, -(-count // 6)), count})


def check(folder, repo):
    """Old or new, whole, and the next saves work; which it was."""
    head = check_sound(repo)[-1]
    assert head in (1, 2)
    with World(folder, size=1) as fresh:
        fresh.ask("open", output_dir=str(repo))
        assert check_whole(fresh) == head
        fresh.ask("save", step=2, overwrite=head == 2)
        fresh.ask("save", step=3)
        assert check_whole(fresh) == 3
    assert check_sound(repo) == [1, 2, 3]
    return head


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("inject=pwrite64:error=EIO:when=2", "Input/output error"),
        ("inject=fsync:error=EIO:when=3", "Input/output error"),
        ("inject=pwrite64:error=EDQUOT:when=1", "Disk quota exceeded"),
        ("inject=rename,renameat,renameat2:error=EROFS:when=1", "Read-only file system"),
    ],
)
def test_an_error_of_the_system_is_typed_and_the_next_save_works(strace, tmp_path, fault, text):
    repo = tmp_path / "run"
    with begin(tmp_path, repo) as world:
        calls = fault.split("=")[1].split(":")[0]
        with Traced(strace, world.pid(0), tmp_path / "s", "-e", f"trace={calls}", "-e", fault):
            world.tell("save", step=2)
            (outcome,) = world.hear(20).values()
        assert text in outcome.error["what"]
        assert check_sound(repo) == [1]
        world.ask("save", step=2)
        assert check_whole(world) == 2


def test_short_writes_and_interruptions_and_a_slow_disk_do_not_stop_a_save(strace, tmp_path):
    repo = tmp_path / "run"
    with begin(tmp_path, repo) as world:
        for step, fault in (
            (2, "inject=pwrite64:retval=1:when=3"),
            (3, "inject=pwrite64:error=EINTR:when=2"),
            (4, "inject=pwrite64:error=EAGAIN:when=2+9"),
            (5, "inject=fsync:delay_enter=300000:when=1+5"),
        ):
            calls = fault.split("=")[1].split(":")[0]
            log = tmp_path / f"s{step}"
            with Traced(strace, world.pid(0), log, "-e", f"trace={calls}", "-e", fault):
                world.ask("save", step=step)
            assert "INJECTED" in log.read_text() or "DELAYED" in log.read_text()
    commits = open_repository(repo).state().commits
    assert max(one.step for one in commits) == 5
