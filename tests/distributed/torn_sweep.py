"""Saves on four ranks that are torn at random: at a step of the protocol, or at any moment.

`python -m tests.distributed.torn_sweep 200 7`: 200 times, seed 7. Imports no pytest.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.distributed.aftermath import (
    ABORTED,
    DEADLINE_S,
    GRACE_S,
    begin,
    check_aftermath,
    tear,
)
from tests.distributed.launch import World
from tests.distributed.rank import OF_RANK_0, STEPS, Strike

# A save of the tiny state takes about so long; a random moment falls within.
_SAVE_S = 0.15


def sweep(folder: Path, count: int, rng: random.Random) -> Counter[str]:
    """Tear so many saves, each in a repository of its own; what came of them.

    Raises:
        AssertionError: a law of docs/protocol.md is broken.
    """
    tally: Counter[str] = Counter()
    for number in range(count):
        repo = folder / f"run{number}"
        if number % 2:
            strike = random_strike(rng)
            _, found = tear(folder, repo, strike)
            tally[f"at a step, {strike.how}"] += 1
        else:
            found = tear_at_any_moment(folder, repo, rng)
            tally["at a random moment"] += 1
        tally["the old checkpoint" if found == 1 else "the new checkpoint"] += 1
    return tally


def random_strike(rng: random.Random) -> Strike:
    """Any step, any ranks, one of them or all."""
    step = rng.choice(STEPS)
    ranks = (0,) if step in OF_RANK_0 else tuple(rng.sample(range(4), rng.randint(1, 3)))
    return Strike(step=step, ranks=ranks, how=rng.choice(("kill", "kill all")))


def tear_at_any_moment(folder: Path, repo: Path, rng: random.Random) -> int:
    """SIGKILL from outside, to some ranks or to all; the step that a load gives."""
    victims = rng.sample(range(4), rng.randint(1, 4))
    with World(folder) as world:
        begin(world, repo)
        world.tell("save", step=2)
        time.sleep(rng.random() * _SAVE_S)
        for rank in victims:
            world.signal(rank, signal.SIGKILL)
        survivors = [rank for rank in range(4) if rank not in victims]
        heard = world.hear(DEADLINE_S + GRACE_S + 15, survivors)
        assert set(heard) == set(survivors)
        for outcome in heard.values():
            assert outcome.kind in ("", ABORTED), outcome.error
            assert outcome.waited_s <= DEADLINE_S + GRACE_S
        committed = any(outcome.kind == "" for outcome in heard.values())
        assert committed == all(outcome.kind == "" for outcome in heard.values()) or not heard
    return check_aftermath(folder, repo, acknowledged=1, attempted=2, committed=committed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `with` is left
    with tempfile.TemporaryDirectory() as temporary:
        tally = sweep(Path(temporary), int(sys.argv[1]), random.Random(int(sys.argv[2])))
        total = f"{sys.argv[1]} torn saves on 4 ranks, each followed by a load and two saves"
        found = ", ".join(f"{what}: {times}" for what, times in sorted(tally.items()))
        print(f"{total}, no law broken ({found})")  # noqa: T201 (a script)
