"""Faults while saves are in the background: each has a deadline and a name, the last commit stands.

`python -m tests.distributed.test_background_faults FOLDER STEP` is what torchrun runs on each rank.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.aftermath import (
    ABORTED,
    begin,
    check_aftermath,
    check_sound,
    check_survivors,
    check_whole,
)
from tests.distributed.launch import Torchrun, World
from tests.distributed.rank import (
    IN_A_WRITE,
    PAIRS,
    Filler,
    Strike,
    components,
    contents,
    fill,
    make_state,
)
from tests.distributed.rank import expected as contents_of
from tests.distributed.test_full_disks import NOBODY, public_dir, small_disk
from tests.distributed.test_stops import PATIENCE_S

from ckptcoord import CheckpointCoordinator, CkptError, CoordinatorConfig, open_repository
from ckptcoord.core.entries import Commit

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = [pytest.mark.dist, pytest.mark.waits]
__all__ = ["public_dir", "small_disk"]  # fixtures
ALL = (0, 1, 2, 3)


def kinds(world: World, order: str, ranks: Iterable[int] = ALL, **arguments: Any) -> set[str]:
    """What an order raised, on any of these ranks; all must come back."""
    ranks = tuple(ranks)
    world.tell(order, ranks, **arguments)
    heard = world.hear(PATIENCE_S, ranks)
    assert set(heard) == set(ranks)
    return {outcome.kind for outcome in heard.values()}


def staged(repo: Path) -> list[str]:
    """What is left in staging."""
    return [one.name for one in (repo / ".ckptcoord/staging").iterdir()]


@pytest.mark.parametrize("step", [IN_A_WRITE, "vote"])
def test_a_rank_that_stops_in_the_background_is_named_in_time_and_all_go_on_when_it_resumes(
    tmp_path, step
):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        begin(world, repo, deferred=True)
        strike = Strike(step=step, ranks=(2,), how="stop")
        world.tell("save_later", steps=[2, 3], strike=strike)
        others = (0, 1, 3)
        assert set(world.hear(PATIENCE_S, others)) == set(others)
        for number in (2, 3):  # the second one in the queue waits for the stopped rank as well
            world.tell("result", others, step=number)
            heard = world.hear(PATIENCE_S, others)
            assert set(heard) == set(others)
            assert not check_survivors(heard, lost=(2,))
        world.signal(2, signal.SIGCONT)
        assert world.hear(PATIENCE_S, [2])[2].kind == ""
        for number in (2, 3):
            world.tell("result", [2], step=number)
            (resumed,) = world.hear(PATIENCE_S, [2]).values()
            assert resumed.kind == ABORTED
            assert resumed.facts["silent"] == [2]
        assert kinds(world, "save_later", steps=[4]) == {ABORTED}
        assert kinds(world, "save_later", steps=[4]) == {""}
        assert kinds(world, "wait") == {""}
        assert check_whole(world) == 4
        assert check_sound(repo) == [1, 4]


@pytest.mark.parametrize(("victim", "store_apart"), [(3, False), (0, False), (0, True)])
def test_when_a_rank_dies_with_saves_in_the_queue_the_others_raise_at_their_next_call(
    tmp_path, victim, store_apart
):
    repo = tmp_path / "run"
    with World(tmp_path, store_apart=store_apart) as world:
        begin(world, repo, deferred=True)
        slow = Strike(step="written", ranks=ALL, how="sleep", seconds=1.0)
        world.ask("save_later", steps=[2, 3], strike=slow)
        world.signal(victim, signal.SIGKILL)
        others = [rank for rank in ALL if rank != victim]
        for number in (2, 3):
            world.tell("result", others, step=number)
            heard = world.hear(PATIENCE_S, others)
            assert set(heard) == set(others)
            assert not check_survivors(heard, lost=(victim,))
        assert kinds(world, "save_later", others, steps=[4]) == {ABORTED}
        assert kinds(world, "close", others) == {""}
    assert check_aftermath(tmp_path, repo, acknowledged=1, attempted=2) == 1


def same_calls(world: World, orders: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """What each of these calls raised, the same on all ranks, two of which are late."""
    orders = tuple(orders)
    world.tell("nap", [1, 3], seconds=0.4)
    for order, arguments in orders:
        world.tell(order, **arguments)
    world.hear(PATIENCE_S, [1, 3])
    said: dict[int, list[str]] = {rank: [] for rank in ALL}
    for _ in orders:
        for rank, outcome in world.hear(PATIENCE_S).items():
            said[rank].append(outcome.kind)
    assert all(one == said[0] for one in said.values()), said
    assert len(said[0]) == len(orders)
    return said[0]


def test_a_full_disk_is_raised_by_the_same_call_on_all_ranks_and_later_saves_work(
    tmp_path, small_disk
):
    repo = small_disk / "run"
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo), deferred=True)
        world.ask("save", step=1)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(2 << 20))
        for rank in (1, 2):
            world.tell("grow", [rank], numbers=1 << 17)  # 1 MiB each
        world.hear(10, [1, 2])
        world.ask("save_later", steps=[2])
        calls = [("save_later", {"steps": [step]}) for step in (3, 4)]
        said = same_calls(world, [*calls, ("wait", {}), ("wait", {})])
        assert set(said) == {"", ABORTED}
        assert said[-1] == "", "what wait has raised is not raised again"
        world.tell("result", step=2)
        for outcome in world.hear(PATIENCE_S).values():
            assert "No space left" in str(outcome.facts["failures"])
        assert check_sound(repo) == [1]
        assert staged(repo) == []
        filler.unlink()
        assert same_calls(world, [("save_later", {"steps": [5]}), ("wait", {})]) == ["", ""]
        assert check_whole(world) == 5
    assert check_sound(repo) == [1, 5]


def test_a_revoked_permission_is_raised_by_the_same_call_on_all_ranks(tmp_path, public_dir):
    repo = public_dir / "run"
    repo.mkdir()
    os.chown(repo, NOBODY, NOBODY)
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo), uid=NOBODY, deferred=True)
        world.ask("save", step=1)
        for number, folder in enumerate((repo, repo / ".ckptcoord" / "staging")):
            folder.chmod(0o555)
            world.ask("save_later", steps=[2])
            said = same_calls(world, [("save_later", {"steps": [3]}), ("wait", {})])
            assert any(said), number
            folder.chmod(0o755)
            world.tell("result", step=2)
            for outcome in world.hear(PATIENCE_S).values():
                assert "Permission denied" in outcome.error["what"]
            assert check_sound(repo) == [1]
            assert staged(repo) == []
        world.ask("save_later", steps=[2])
        assert kinds(world, "wait") == {""}
        assert check_whole(world) == 2


def test_a_job_that_is_fenced_with_saves_in_the_queue_hears_so_and_deletes_nothing(tmp_path):
    repo = tmp_path / "run"
    with World(tmp_path) as old, World(tmp_path) as new:
        old.ask("open", output_dir=str(repo), deferred=True)
        old.ask("save", step=1)
        stop = Strike(step="append", ranks=(0,), how="stop")
        old.tell("save_later", steps=[2, 3], strike=stop)
        old.await_file(repo / "checkpoint-2")
        new.ask("open", output_dir=str(repo), deferred=True)
        assert check_whole(new) == 1
        new.ask("save_later", steps=[2, 3])
        assert kinds(new, "wait") == {""}
        before = {path for path in repo.rglob("*") if ".tmp" not in path.name}
        old.signal(0, signal.SIGCONT)
        assert {outcome.kind for outcome in old.hear(PATIENCE_S).values()} == {""}
        for number in (2, 3):
            assert kinds(old, "result", step=number) == {"FencedError"}
        assert before <= set(repo.rglob("*")), "a fenced job deleted something"
        assert kinds(old, "save_later", steps=[4]) == {"FencedError"}
        assert kinds(old, "close") <= {"", "FencedError"}
        assert check_whole(new) == 3
        new.ask("save", step=4)
    assert check_sound(repo) == [1, 2, 3, 4]


# --- elastic restart ------------------------------------------------------------------------------

PROGRAM = "tests.distributed.test_background_faults"
VERIFY = (
    "import sys; from ckptcoord.cli import main; sys.exit(main(['verify', '--all', sys.argv[1]]))"
)
RANKS = 2
JOB_TIMEOUT_S = 120.0


@pytest.mark.alone
@pytest.mark.parametrize("step", ["write", pytest.param("append", marks=pytest.mark.slow)])
def test_after_an_elastic_restart_the_save_of_an_old_worker_that_lives_on_is_fenced(tmp_path, step):
    """Rank 1 dies with saves in the queue; rank 0 is out of its launcher's reach, and slow."""
    repo = tmp_path / "run"
    options = ["--standalone", f"--nproc_per_node={RANKS}", "--max-restarts=1"]
    # Else torchrun keeps its store, with the keys of the old incarnation (pytorch issue 135712).
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    program = ["-m", PROGRAM, str(tmp_path), step]
    with Torchrun([*options, *program], tmp_path / "log", **fresh) as job:
        until_said(job, tmp_path, "new-0")
        until_said(job, tmp_path, "new-1")
        before = [entry.body for entry in open_repository(repo).log.entries()]
        say(tmp_path / "go")
        until_said(job, tmp_path, "old-0")
        say(tmp_path / "released")
        job.succeed(JOB_TIMEOUT_S)
    assert read(tmp_path / "old-0")["kinds"] == ["FencedError"] * 2
    for rank in range(RANKS):
        assert read(tmp_path / f"new-{rank}") == {"loaded": 1}
    assert check_sound(repo) == [1, 2, 3]
    repository = open_repository(repo)
    after = [entry.body for entry in repository.log.entries()]
    assert after == before, "the old incarnation wrote to the log"
    commits = [body for body in after if isinstance(body, Commit)]
    assert [one.checkpoint_id.step for one in commits] == [1, 2, 3], "one was committed twice"
    assert [one.epoch for one in commits] == [1, 2, 2]
    told = subprocess.run(
        [sys.executable, "-c", VERIFY, str(repo)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr


def until_said(job: Torchrun, folder: Path, name: str) -> None:
    """Wait for a file of the job."""
    until_s = time.monotonic() + JOB_TIMEOUT_S
    while not (folder / name).exists():
        assert job.running, job.log.read_text()[-4000:]
        assert time.monotonic() < until_s, f"no {name}: {job.log.read_text()[-4000:]}"
        time.sleep(0.01)


def say(path: Path, **facts: Any) -> None:
    """A file that is seen whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(facts))
    draft.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What was said."""
    return dict(json.loads(path.read_text()))


def work(folder: Path, slow_at: str) -> None:
    """One rank of one incarnation."""
    env = os.environ  # noqa: TID251 (torchrun's)
    rank, restarts = int(env["RANK"]), int(env["TORCHELASTIC_RESTART_COUNT"])
    if rank == 0 and not restarts and "OUT_OF_REACH" not in env:
        # As where a launcher kills a wrapper, and what runs under it lives on.
        command = [sys.executable, "-m", PROGRAM, str(folder), slow_at]
        real = subprocess.Popen(command, env={**env, "OUT_OF_REACH": "1"}, start_new_session=True)
        sys.exit(real.wait())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state = make_state(rank, 0)
    optimizer = Filler(state)
    reached: set[str] = set()

    def probe(step: str) -> None:
        reached.add(step)
        if rank == 0 and not restarts and step == slow_at and armed:
            armed.clear()
            say(folder / "slow")
            until(folder / "go")  # slow storage

    armed: list[bool] = []
    with CheckpointCoordinator(
        components(state, optimizer),
        {PAIRS: list(range(RANKS))},
        output_dir=folder / "run",
        config=CoordinatorConfig(probe=probe, deferred=True, timeout_s=60.0 if restarts else 8.0),
    ) as coordinator:

        def save(step: int) -> Any:
            optimizer.step_to(step, rank)
            fill(state, rank, step)
            return coordinator.save_checkpoint_async(step=step)

        if restarts:
            report = coordinator.load_checkpoint()
            assert contents(state) == contents_of(rank, report.step)
            save(2)
            save(3)
            coordinator.wait()
            say(folder / f"new-{rank}", loaded=report.step)
            until(folder / "released")
            return
        save(1)
        coordinator.wait()
        reached.clear()
        armed.append(True)
        pending = [save(2), save(3)]
        if rank == 1:
            until(folder / "slow")
            while "vote" not in reached:
                time.sleep(0.01)
            time.sleep(0.5)  # its vote is said
            os.kill(os.getpid(), signal.SIGKILL)
        calls = [pending[0].result, lambda: save(4)]
        say(folder / "old-0", kinds=[kind(call) for call in calls])
        os._exit(0)


def kind(call: Any) -> str:
    """What a call raises."""
    try:
        call()
    except CkptError as error:
        return type(error).__name__
    return ""


def until(path: Path) -> None:
    """Wait for a file."""
    until_s = time.monotonic() + JOB_TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < until_s, path
        time.sleep(0.01)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
