"""What must hold in a repository after a fault, whatever the fault was.

Imports no pytest; the assertions are the laws of docs/protocol.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.distributed.launch import World
from tests.distributed.rank import Outcome, Strike, expected

from ckptcoord import open_repository
from ckptcoord.repo.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEADLINE_S = 3.0
GRACE_S = 2.0
ABORTED = "SaveAbortedError"


def check_whole(world: World, ref: str | None = None) -> int:
    """All ranks load the same checkpoint, each tensor of it of one and the same step."""
    steps = set()
    for rank, outcome in world.ask("load", ref=ref).items():
        step, contents = outcome.value
        assert contents == expected(rank, step), f"rank {rank} has a mixture: {contents}"
        steps.add(step)
    assert len(steps) == 1, f"ranks loaded different checkpoints: {steps}"
    return steps.pop()


def check_sound(repo: Path) -> list[int]:
    """Every byte of every checkpoint that exists; returns their steps."""
    repository = open_repository(repo)
    commits = repository.state().commits
    for commit in commits.values():
        report = verify_checkpoint(repository, commit)
        assert report.ok, report.findings
    return sorted(one.step for one in commits)


def check_aftermath(
    log_dir: Path, repo: Path, *, acknowledged: int, attempted: int, committed: bool = False
) -> int:
    """A fresh incarnation loads the last acknowledged checkpoint or the newer one, and saves on.

    Args:
        log_dir: for the fresh world.
        repo: the repository.
        acknowledged: the last step whose save returned before the fault.
        attempted: the step that the fault cut short.
        committed: whether some rank was told that the attempt succeeded.

    Returns:
        The step that was loaded.
    """
    with World(log_dir) as fresh:
        fresh.ask("open", output_dir=str(repo))
        found = check_whole(fresh)
        assert found in ((attempted,) if committed else (acknowledged, attempted))
        assert check_sound(repo)[-1] == found
        fresh.ask("save", step=attempted, overwrite=found == attempted)
        assert check_whole(fresh) == attempted
        fresh.ask("save", step=attempted + 1)
        assert check_whole(fresh) == attempted + 1
        assert check_whole(fresh, f"main@{acknowledged}") == acknowledged
        steps = check_sound(repo)
        assert steps[-3:] == [acknowledged, attempted, attempted + 1]
    return found


def check_survivors(
    heard: Mapping[int, Outcome],
    *,
    lost: tuple[int, ...],
    allowed_s: float = DEADLINE_S + GRACE_S,
) -> bool:
    """Those not struck came back in time, all with success or all with a failure that says who.

    Returns:
        Whether the save was reported as a success.
    """
    for rank, outcome in heard.items():
        assert outcome.waited_s <= allowed_s, f"rank {rank} took {outcome.waited_s:.2f} s"
    kinds = {outcome.kind for outcome in heard.values()}
    assert len(kinds) == 1, f"survivors disagree: { {r: o.error for r, o in heard.items()} }"
    if kinds == {""}:
        return True
    assert kinds == {ABORTED}, [outcome.error for outcome in heard.values()]
    for rank, outcome in heard.items():
        named = {int(one) for one in outcome.facts["failures"]}
        assert named & set(lost), f"rank {rank} is told {outcome.error}, and {lost} were struck"
        assert outcome.facts["phase"] in ("open", "vote")
    return False


def check_struck(heard: Mapping[int, Outcome], strike: Strike, size: int) -> None:
    """Who does not answer was struck; who was to be struck and answers never reached the step.

    Of several that were to be struck, the first may take the store along before the others are
    there.
    """
    silent = set(range(size)) - heard.keys()
    assert silent, f"nobody was struck: {strike}"
    assert silent <= set(strike.ranks), f"{silent} are silent, and struck was {strike}"
    for rank in heard.keys() & set(strike.ranks):
        assert strike.step not in heard[rank].steps, f"rank {rank} survived {strike}"


def begin(world: World, repo: Path, **settings: object) -> None:
    """Have step 1 acknowledged, in peace; from then on the deadline is short."""
    world.ask("open", output_dir=str(repo), **settings)
    world.ask("save", step=1)
    world.ask("hurry", timeout_s=DEADLINE_S)


def tear(log_dir: Path, repo: Path, strike: Strike) -> tuple[bool, int]:
    """Save step 1, strike in the save of step 2; whether that succeeded, and what a load gives."""
    with World(log_dir) as world:
        begin(world, repo)
        world.tell("save", step=2, strike=strike)
        heard = world.hear(DEADLINE_S + GRACE_S + 15)
        if strike.how == "kill":
            check_struck(heard, strike, world.size)
        # Where all are killed, one may have been told of the commit just before.
        committed = bool(heard) and check_survivors(heard, lost=strike.ranks)
    found = check_aftermath(log_dir, repo, acknowledged=1, attempted=2, committed=committed)
    return committed, found
