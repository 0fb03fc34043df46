"""Two processes that commit to two branches, a third that forks and a fourth that collects garbage.

`python -m tests.distributed.branches 500 7`: 500 rounds, seed 7. In a round each of the four does
one thing at its own moment, all of them at once; then everything that exists is loaded and compared
with what was saved. Imports no pytest.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from tests.distributed.launch import ROOT

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord import open_repository as open_view
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import CheckpointInUseError, RefNotFoundError
from ckptcoord.plan.dropping import own_of
from ckptcoord.repo.history import retire
from ckptcoord.repo.maintenance import local_times, prepare_gc, run_gc
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT = 3
"""How many checkpoints the retention of a branch keeps."""
FORKS = 4
"""How many forked branches there are at most."""
WITHIN_S = 0.05
"""In a round, everybody begins at some moment within so many seconds."""
VERIFIED_EVERY = 20


def state_at(branch: str, step: int) -> torch.Tensor:
    """What is saved there: like its neighbours on the branch, so that deltas pay."""
    seed = int.from_bytes(branch.encode()[-3:], "big")
    tensor = torch.rand(40_000, generator=torch.Generator().manual_seed(seed))
    tensor[step % 1000 :: 1000] += step
    return tensor


class Held:
    """One tensor, and a coordinator that saves and loads it on a branch."""

    def __init__(self, folder: str, branch: str) -> None:
        self.branch = branch
        self.state = {"w": torch.zeros(40_000)}
        self.coordinator = CheckpointCoordinator(
            [StateComponent("m", self.state, SharingPattern.GLOBAL)],
            output_dir=folder,
            config=CoordinatorConfig(branch=branch, keep_last=KEPT, compression="auto"),
        )

    def save(self, step: int) -> None:
        self.state["w"].copy_(state_at(self.branch, step))
        self.coordinator.save_checkpoint(step=step)

    def load(self, ref: str, branch: str, step: int) -> None:
        """It has to be this one's state."""
        self.state["w"].zero_()
        self.coordinator.load_checkpoint(ref)
        assert torch.equal(self.state["w"], state_at(branch, step)), f"{ref} is not {branch}@{step}"


# --- the four -------------------------------------------------------------------------------------


def committer(folder: str, branch: str, rng: random.Random) -> Callable[[], Any]:
    """Commits the next step, and now and then loads the one before."""
    held, step = Held(folder, branch), 0

    def act() -> list[Any]:
        nonlocal step
        if step and rng.random() < 0.3:
            held.load(f"{branch}@latest", branch, step)
        step += 1
        held.save(step)
        return [branch, step]

    return act


def forker(folder: str, _: str, rng: random.Random) -> Callable[[], Any]:
    """Forks whatever there is, goes on there by a step, and drops its oldest branch."""
    names: list[str] = []
    repository, writer = open_repository(folder), os.urandom(16).hex()
    count = 0

    def act() -> list[Any] | None:
        nonlocal count
        count += 1
        name = f"fork{count}"
        source = rng.choice(sorted(repository.state().commits))
        try:
            repository.fork(BranchName(name), source, writer=writer)
        except RefNotFoundError:
            return None  # it was retired in that moment: said, and nothing done
        held = Held(folder, name)
        held.load(f"{name}@latest", str(source.branch), source.step)
        held.save(source.step + 1)
        held.coordinator.close()
        names.append(name)
        if len(names) > FORKS:
            drop(names[0])
        return [name, source.step + 1]

    def drop(name: str) -> None:
        state = repository.state()
        try:
            retire(repository, own_of(state, BranchName(name)), writer=writer, reason="test")
            names.pop(0)
        except CheckpointInUseError:
            names.append(names.pop(0))  # another fork begins there and has nothing else yet

    return act


def collector(folder: str, *_: object) -> Callable[[], Any]:
    """Collects all that may be, without grace."""
    repository = open_repository(folder)

    def act() -> list[Any]:
        gc = prepare_gc(
            repository, now=datetime.now(UTC), changed=local_times(repository), grace_s=0
        )
        result = run_gc(repository, gc, writer=os.urandom(16).hex())
        assert not result.failed, result.failed
        return ["gc", len(result.deleted)]

    return act


ROLES = {"commit": committer, "fork": forker, "gc": collector}


def serve(role: str, folder: str, branch: str, seed: int) -> None:
    """One of them: does one thing for each line that comes, and says what."""
    rng = random.Random(seed)
    act = ROLES[role](folder, branch, rng)
    for _ in sys.stdin:
        time.sleep(rng.random() * WITHIN_S)
        sys.stdout.write(json.dumps(act()) + "\n")
        sys.stdout.flush()


# --- the rounds -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What the rounds came to."""

    rounds: int = 0
    commits: int = 0
    forks: int = 0
    late: int = 0
    collected: int = 0
    loaded: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds of two committers, a forker and a collector: {self.commits} "
            f"commits, {self.forks} forks ({self.late} more of what had just been retired), "
            f"{self.collected} folders collected; {self.loaded} loads of what there was after a "
            "round, each as it was saved; no order broken"
        )


def sweep(folder: Path, rounds: int, rng: random.Random) -> Tally:
    """So many rounds.

    Raises:
        AssertionError: something was lost, is not as it was saved, or is out of order.
    """
    repo = str(folder / "run")
    tally = Tally()
    Held(repo, "main").coordinator.close()
    with ExitStack() as stack:
        start = lambda *words: stack.enter_context(_Worker(*words, rng.getrandbits(32)))  # noqa: E731
        committers = [start("commit", repo, name) for name in ("main", "other")]
        for one in committers:  # so that there is something to fork
            tally.commits += one.hear(one.go()) is not None
        others = [start("fork", repo, "-"), start("gc", repo, "-")]
        heads = {"main": 1, "other": 1}
        for number in range(rounds):
            for one in (*committers, *others):
                one.go()
            said = [one.hear() for one in (*committers, *others)]
            forked, collected = said[2:]
            heads |= dict(said[:2])
            tally.commits += 2 + (forked is not None)
            tally.forks += forked is not None
            tally.late += forked is None
            tally.collected += collected[1]
            tally.rounds += 1
            made = dict([*said[:2], *([forked] if forked else [])])
            tally.loaded += check(repo, heads, made, verified=number % VERIFIED_EVERY == 0)
    return tally


def check(repo: str, heads: dict[str, int], made: dict[str, int], *, verified: bool) -> int:
    """Nothing is lost, all is as it was saved, and in order; returns how many were loaded."""
    view = open_view(repo)
    state = view.state()
    live = {(str(one.branch), one.step) for one in state.commits}
    for branch, step in made.items():
        assert (branch, step) in live, f"{branch}@{step} was acknowledged, and is not there"
    for branch, step in heads.items():
        kept = {(branch, one) for one in range(max(1, step - KEPT + 1), step + 1)}
        assert kept <= live, f"of {branch}, {sorted(kept - live)} are gone"
    for one, commit in state.commits.items():
        found = view[one].load("m.w")
        assert torch.equal(found, state_at(str(one.branch), one.step)), f"{one} is something else"
        before = [other for other in own_of(state, one.branch) if other.step < one.step]
        numbers = [state.stamps[other].number for other in before]
        assert all(number < state.stamps[one].number for number in numbers), f"{one}: out of order"
        if commit.parent is not None and commit.parent.branch == one.branch:
            assert commit.parent.step < one.step, f"{one} comes after {commit.parent}"
        if verified:
            assert verify_checkpoint(view, commit).ok, one
    return len(state.commits)


class _Worker:
    """One of the four, in a process of its own."""

    def __init__(self, role: str, folder: str, branch: str, seed: int) -> None:
        words = ("-m", "tests.distributed.branches", role, folder, branch, str(seed))
        self._role = f"{role} {branch}"
        self._process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def go(self) -> None:
        """Let it do one thing."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def hear(self, _: None = None) -> Any:
        """What it did."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._role} has ended: see its error output"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:
            pass  # waited for, and its pipes closed


if __name__ == "__main__":
    if sys.argv[1] in ROLES:
        serve(*sys.argv[1:4], int(sys.argv[4]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print(sweep(Path(temporary), int(sys.argv[1]), random.Random(int(sys.argv[2]))))  # noqa: T201
