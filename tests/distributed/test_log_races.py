"""Writers in processes of their own race on one log while they are killed, stopped and resumed.

As a test it takes CKPTCOORD_RACE_SECONDS (15); as a script it takes the seconds and a seed:
`python tests/distributed/test_log_races.py 600 7`.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Claim, Commit, Entry, Snapshot
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CheckpointExistsError, FencedError
from ckptcoord.plan.commit import SNAPSHOT_EVERY, LogState, next_epoch, parent_of
from ckptcoord.repo.log import LOG, Log
from ckptcoord.store.local import LocalStore

WRITERS = 4
BRANCHES = (BranchName(), BranchName("exp"))


def clock():
    return datetime.now(UTC)


# --- a writer -------


def write(root: str, journal: str, seed: int) -> None:
    """Claim, commit until fenced, claim again as another; journal what was acknowledged."""
    rng = random.Random(seed)
    log = Log(LocalStore(root), clock=clock)
    with Path(journal).open("a", buffering=1) as acknowledged:
        while True:
            try:
                commit_until_fenced(log, rng.choice(BRANCHES), rng, acknowledged)
            except FencedError:
                acknowledged.write("fenced\n")
            time.sleep(rng.random() * 0.1)


def commit_until_fenced(log, branch, rng, acknowledged):
    writer = secrets.token_hex(16)

    def claim(state):
        return Claim(writer=writer, branch=branch, epoch=next_epoch(state, branch), world_size=1)

    epoch = log.append(claim).body.epoch
    for _ in range(rng.randint(1, 30)):
        attempt = secrets.token_hex(16)

        def commit(state, attempt=attempt):
            steps = [one.step for one in state.commits if one.branch == branch]
            checkpoint_id = CheckpointId(branch, max(steps, default=0) + 1)
            return Commit(
                writer=writer,
                checkpoint_id=checkpoint_id,
                path=str(checkpoint_id),
                manifest_digest=Digest(bytes.fromhex(attempt) * 2),
                epoch=epoch,
                attempt=attempt,
                parent=parent_of(state, checkpoint_id),
                size_bytes=1,
                stored_bytes=1,
            )

        try:
            entry = log.append(commit)
        except CheckpointExistsError:
            acknowledged.write("impossible\n")
            raise
        acknowledged.write(f"{entry.number} {attempt}\n")
        time.sleep(rng.random() * 0.01)


# --- the storm -------


class Storm:
    """Several writers, and the signals that they get."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.started = 0
        self.signals: Counter[str] = Counter()
        self.writers = [self.start() for _ in range(WRITERS)]

    def start(self) -> subprocess.Popen[bytes]:
        self.started += 1
        journal = self.folder / f"journal-{self.started}"
        seed = str(self.rng.getrandbits(32))
        argv = [sys.executable, __file__, "--writer", str(self.folder / "root"), str(journal), seed]
        with (self.folder / "stderr").open("ab") as stderr:
            return subprocess.Popen(argv, stderr=stderr)

    def blow(self, seconds: float) -> None:
        """Signals at random moments."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.rng.random() * 0.1)
            at = self.rng.randrange(WRITERS)
            assert self.writers[at].poll() is None, "a writer ended by itself"
            if self.rng.random() < 0.15:
                self.kill(at)
                self.writers[at] = self.start()
            else:
                self.pause(at)

    def pause(self, at: int) -> None:
        """Stopped for long enough that another can claim and commit."""
        self.signals["stopped"] += 1
        self.writers[at].send_signal(signal.SIGSTOP)
        time.sleep(self.rng.random() * 0.1)
        self.writers[at].send_signal(signal.SIGCONT)

    def kill(self, at: int) -> None:
        self.signals["killed"] += 1
        self.writers[at].kill()
        self.writers[at].wait()

    def end(self) -> None:
        for writer in self.writers:
            writer.kill()
            writer.wait()


def run(folder: Path, seconds: float, seed: int) -> Counter[str]:
    """Let it blow, then check every law; returns what happened."""
    with LocalStore(folder / "root", create=True) as store:
        store.make_dirs(LOG)
        storm = Storm(folder, seed)
        try:
            storm.blow(seconds)
        finally:
            storm.end()
        assert (folder / "stderr").read_text() == ""
        journal = [
            line
            for file in folder.glob("journal-*")
            for line in file.read_text().split("\n")[:-1]  # the last may have been cut by a kill
        ]
        entries = list(Log(store, clock=clock).entries())
        check(entries, [tuple(line.split()) for line in journal if " " in line])
        check_reading(store, entries)
        assert "impossible" not in journal
    kinds = Counter(entry.body.kind for entry in entries)
    return storm.signals + kinds + Counter({"fenced": journal.count("fenced")})


def check(entries: list[Entry], acknowledged: list[tuple[str, str]]) -> None:
    """The laws, from the entries alone and by other code than the log's."""
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    by_number = {entry.number: entry.body for entry in entries}
    for number, attempt in acknowledged:
        body = by_number[int(number)]
        assert isinstance(body, Commit), "an acknowledged commit is lost"
        assert body.attempt == attempt, "an acknowledged commit is lost"
    assert len({number for number, _ in acknowledged}) == len(acknowledged)
    holders: dict[BranchName, tuple[int, str]] = {}
    seen: set[str | CheckpointId] = set()
    for entry in entries:
        body = entry.body
        assert isinstance(body, Snapshot) == (entry.number % SNAPSHOT_EVERY == 0)
        if isinstance(body, Claim):
            assert body.epoch == holders.get(body.branch, (0, ""))[0] + 1
            holders[body.branch] = (body.epoch, body.writer)
        if isinstance(body, Commit):
            holder = holders[body.checkpoint_id.branch]
            assert holder == (body.epoch, body.writer), "a fenced writer has committed"
            assert not {body.attempt, body.checkpoint_id} & seen, "a commit stands twice"
            seen |= {body.attempt, body.checkpoint_id}


def check_reading(store: LocalStore, entries: list[Entry]) -> None:
    """Whoever starts at the snapshot reads the same as whoever starts at the beginning."""

    class Blind(LocalStore):
        def list(self, path):
            return ()

    from_snapshot = Log(store, clock=clock).refresh()
    with Blind(store.url) as blind:
        from_beginning = Log(blind, clock=clock).refresh()
    assert from_snapshot == from_beginning != LogState()
    assert from_snapshot.number == len(entries)


@pytest.mark.dist
def test_no_acknowledged_commit_is_lost_and_no_fenced_writer_commits(tmp_path):
    seconds = float(os.getenv("CKPTCOORD_RACE_SECONDS", "15"))
    seed = secrets.randbits(32)
    happened = run(tmp_path, seconds, seed)
    wanted = ("killed", "stopped", "claim", "commit", "fenced")
    assert min(happened[what] for what in wanted) > 0, f"seed {seed}: {happened}"


if __name__ == "__main__":
    if sys.argv[1] == "--writer":
        write(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    with tempfile.TemporaryDirectory() as folder:
        print(dict(run(Path(folder), float(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201 (a script)
