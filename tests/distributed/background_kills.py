"""Trainings that save every step in the background, killed at random moments with a full queue.

`python -m tests.distributed.background_kills 20 7`: 20 kills, seed 7. Imports no pytest.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed.aftermath import check_sound
from tests.distributed.launch import World
from tests.distributed.trainee import STEPS, Record

from ckptcoord import open_repository
from ckptcoord.errors import RepositoryNotFoundError

RANKS = 4
TIMEOUT_S = 300.0


@dataclass(slots=True)
class Tally:
    """What a sweep did.

    Attributes:
        kills: for each, the newest committed step.
        lost: saves that were called for and not acknowledged when a kill came, together.
        acknowledged: saves that some rank knew to be committed when a kill came, together.
        loaded: checkpoints that were loaded and compared with the state at their call.
    """

    kills: list[int] = field(default_factory=list)
    lost: int = 0
    acknowledged: int = 0
    loaded: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.kills)} kills of 4 ranks that save each of {STEPS} steps in the background "
            f"(queue of 2, deferred), after the commits of steps {sorted(self.kills)}; "
            f"{self.acknowledged} saves were acknowledged, none of them lost, and {self.lost} "
            f"under way; {self.loaded} checkpoints loaded, each bit for bit the state at its call"
        )


def sweep(folder: Path, kills: int, rng: random.Random) -> Tally:
    """Kill so many times; each training is resumed until its end.

    Raises:
        AssertionError: an acknowledged save is not there, or a checkpoint is not as it was called.
    """
    tally = Tally()
    chain = 0
    while len(tally.kills) < kills:
        chain += 1
        home = folder / f"chain{chain}"
        home.mkdir()
        span_s = 4.0
        while len(tally.kills) < kills:
            with World(folder, RANKS) as world:
                began_s = time.monotonic()
                world.tell("train_in_background", folder=str(home))
                ended = run(world, home, began_s + 60, rng.random() * span_s)
                if not ended:
                    kill(world, rng)
            if ended:
                break
            tally.kills.append(newest(home))
            after(home, tally)
        finish(folder, home, tally)
    return tally


def run(world: World, home: Path, until_s: float, delay_s: float) -> bool:
    """Wait for the next commit and then so long; true when the training has ended by then."""
    before = newest(home)
    while newest(home) == before and before < STEPS:
        assert time.monotonic() < until_s, f"no commit after {before}"
        heard = world.hear(0.01, quiet=True)
        assert not heard, heard
    heard = world.hear(delay_s, quiet=True)
    assert not any(outcome.error for outcome in heard.values()), heard
    return bool(heard)


def kill(world: World, rng: random.Random) -> None:
    """All ranks, in any order, some a little later than others."""
    for rank in rng.sample(range(RANKS), RANKS):
        world.signal(rank, signal.SIGKILL)
        time.sleep(rng.choice((0.0, 0.0, 0.001, 0.01)))


def after(home: Path, tally: Tally) -> None:
    """What the ranks had heard is committed is in the log."""
    commits = {one.step for one in open_repository(home / "run").state().commits}
    for rank in range(RANKS):
        record = Record(home / f"record-{rank}")
        missing = record.committed() - commits
        assert not missing, f"rank {rank} was told that {missing} are committed: {sorted(commits)}"
    records = [Record(home / f"record-{rank}") for rank in range(RANKS)]
    told = set().union(*(record.committed() for record in records))
    called = set().union(*(record.called() for record in records))
    tally.acknowledged += len(told)
    tally.lost += len(called - told)


def finish(folder: Path, home: Path, tally: Tally) -> None:
    """Train to the end; load every checkpoint there is."""
    with World(folder, RANKS) as world:
        world.ask("train_in_background", folder=str(home), within_s=TIMEOUT_S)
        steps = check_sound(home / "run")
        assert steps == list(range(1, STEPS + 1)), steps
    with World(folder, RANKS) as world:
        heard = world.ask("check_records", folder=str(home), steps=steps, within_s=TIMEOUT_S)
        assert {outcome.value for outcome in heard.values()} == {STEPS}
    tally.loaded += len(steps)


def newest(home: Path) -> int:
    """The newest committed step, 0 before there is one."""
    try:
        return max((one.step for one in open_repository(home / "run").state().commits), default=0)
    except RepositoryNotFoundError:
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` is left
    with tempfile.TemporaryDirectory() as temporary:
        tally = sweep(Path(temporary), int(sys.argv[1]), random.Random(int(sys.argv[2])))
        print(tally)  # noqa: T201 (a script)
