"""Ranks of a node share the checking: each byte once a node, never one that nobody checked."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as c10d

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.core.topology import Topology
from ckptcoord.dist import coordinator as coordinating
from ckptcoord.dist.nodecheck import NodeCheck
from ckptcoord.dist.sharded import Sharded
from ckptcoord.errors import CkptError, CorruptError
from ckptcoord.repo.readers import ShardReader
from ckptcoord.testing.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.dist.world import TorchWorld

REPLICATED, PER_RANK, PER_GROUP = (
    SharingPattern.REPLICATED,
    SharingPattern.PER_RANK,
    SharingPattern.PER_GROUP,
)


class Owned:
    """Takes its state itself: what it is given is read beside, not in place."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state


def weights(fill: float) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((50 + i,), fill + i) for i in range(8)}


def part(key: str, stateful: object, pattern: SharingPattern = REPLICATED) -> StateComponent:
    return StateComponent(key, stateful, pattern)


def save(coordinator: CheckpointCoordinator, rank: int) -> object:
    return coordinator.save_checkpoint(step=1)


def load(coordinator: CheckpointCoordinator, rank: int) -> object:
    return coordinator.load_checkpoint(strict=False)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each tensor's digest was checked on its own, or while it was read."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def counting(name: str) -> None:
        inner = getattr(ShardReader, name)

        def outer(self: ShardReader, entry: object, *rest: object) -> object:
            with lock:
                counts[entry.spec.name] += 1  # type: ignore[attr-defined]
            return inner(self, entry, *rest)

        monkeypatch.setattr(ShardReader, name, outer)

    counting("check")
    counting("read_into")
    return counts


@pytest.mark.parametrize("owned", [False, True], ids=["in place", "beside"])
def test_each_tensor_is_checked_once_on_a_node_whoever_needs_it(job, checked, owned):
    wrap = Owned if owned else dict
    job.run(4, lambda _: [part("model", wrap(weights(1)))], save).values  # noqa: B018
    live = [wrap(weights(0)) for _ in range(4)]
    job.run(4, lambda rank: [part("model", live[rank])], load).values  # noqa: B018
    assert checked == Counter(weights(0).keys())
    for one in live:
        state = one.state if owned else one
        assert all(torch.equal(state[name], value) for name, value in weights(1).items())


def test_each_node_checks_for_itself(job, checked, monkeypatch):
    nodes = Topology(nodes=((0, 1), (2, 3)))
    monkeypatch.setattr(coordinating, "agree_on_topology", lambda *_: nodes)
    job.run(4, lambda _: [part("model", weights(1))], save).values  # noqa: B018
    live = [weights(0) for _ in range(4)]
    job.run(4, lambda rank: [part("model", live[rank])], load).values  # noqa: B018
    assert checked == Counter(2 * list(weights(0)))


def test_what_only_one_rank_holds_it_checks_itself(job, checked):
    def declare(fill: int):
        return lambda rank: [part("own", {f"r{rank}": torch.full((3,), float(fill))}, PER_RANK)]

    job.run(3, declare(1), save).values  # noqa: B018
    job.run(3, declare(0), load).values  # noqa: B018
    assert checked == Counter(["r0", "r1", "r2"])


def test_groups_of_a_node_share_among_their_members_only(job, checked):
    groups = [(0, 1), (0, 1), (2, 3), (2, 3)]

    def declare(fill: float):
        return lambda rank: [
            StateComponent("tp", weights(fill + rank // 2), PER_GROUP, process_group_name="tp"),
            part("model", {"m": torch.full((9,), fill)}),
        ]

    group = lambda rank: {"tp": groups[rank]}  # noqa: E731
    job.run(4, declare(1), save, groups=group).values  # noqa: B018
    job.run(4, declare(0), load, groups=group).values  # noqa: B018
    assert checked == Counter([*2 * list(weights(0)), "m"])


def test_what_another_rank_was_to_check_and_did_not_want_is_checked_all_the_same(job, checked):
    job.run(2, lambda _: [part("model", weights(1))], save).values  # noqa: B018
    live: list[object] = [weights(0), []]  # a list cannot take it: rank 1 skips the component
    reports = job.run(2, lambda rank: [part("model", live[rank])], load).values
    assert reports[1].skipped
    assert checked == Counter(weights(0).keys())
    assert all(torch.equal(live[0][name], value) for name, value in weights(1).items())


def rows(rank: int, size: int, fill: float = 0.0) -> dict[str, Sharded]:
    """A rank's part of eight tensors of 24 rows, of which each element says its row."""
    each = 24 // size
    column = torch.arange(24.0).reshape(24, 1)[rank * each : (rank + 1) * each]
    return {
        f"w{i}": Sharded(column * fill + i * fill, offset=(rank * each, 0), shape=(24, 1))
        for i in range(8)
    }


@pytest.mark.parametrize("owned", [False, True], ids=["in place", "beside"])
@pytest.mark.parametrize(("saving", "loading"), [(2, 4), (4, 2), (3, 4), (4, 4)])
def test_pieces_that_several_ranks_of_a_node_want_parts_of_are_checked_once(
    job, checked, owned, saving, loading
):
    wrap = Owned if owned else dict
    save_part = lambda rank: [part("model", rows(rank, saving, 1.0), PER_RANK)]  # noqa: E731
    job.run(saving, save_part, save).values  # noqa: B018
    live = [wrap(rows(rank, loading)) for rank in range(loading)]
    job.run(loading, lambda rank: [part("model", live[rank], PER_RANK)], load).values  # noqa: B018
    assert len(checked) == 8 * saving
    assert set(checked.values()) == {1}
    for rank, one in enumerate(live):
        state = one.state if owned else one
        expected = rows(rank, loading, 1.0)
        assert all(torch.equal(state[n].tensor, expected[n].tensor) for n in expected)


def test_damage_in_a_piece_that_another_rank_checked_is_an_error_on_all(job):
    save_part = lambda rank: [part("model", rows(rank, 2, 1.0), PER_RANK)]  # noqa: E731
    job.run(2, save_part, save).values  # noqa: B018
    for shard in (job.output_dir / "checkpoint-1").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    live = [rows(rank, 4) for rank in range(4)]
    for error in job.run(4, lambda rank: [part("model", live[rank], PER_RANK)], load).errors:
        assert isinstance(error, CorruptError)
    assert not any(one.tensor.any() for state in live for one in state.values())


@pytest.mark.parametrize("owned", [False, True], ids=["in place", "beside"])
def test_damage_that_one_rank_finds_is_an_error_on_all_and_changes_nothing(job, owned):
    wrap = Owned if owned else dict
    job.run(3, lambda _: [part("model", wrap(weights(1)))], save).values  # noqa: B018
    shard = job.output_dir / "checkpoint-1" / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    live = [wrap(weights(0)) for _ in range(3)]
    for error in job.run(3, lambda rank: [part("model", live[rank])], load).errors:
        assert isinstance(error, CorruptError)
        assert shard.name in error.path
        assert "found by rank" in str(error)
    for one in live:
        state = one.state if owned else one
        assert all(torch.equal(state[name], value) for name, value in weights(0).items())


def test_a_file_that_changes_after_another_rank_checked_it_is_no_silent_value(job, monkeypatch):
    job.run(2, lambda _: [part("model", Owned(weights(1)))], save).values  # noqa: B018
    folder = Path(job.output_dir) / "checkpoint-1"
    hear = NodeCheck.hear

    def damage_and_hear(self: object, needed: object) -> None:
        for shard in folder.glob("*.safetensors"):
            with shard.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x01")
        hear(self, needed)

    monkeypatch.setattr(NodeCheck, "hear", damage_and_hear)
    live = [Owned(weights(0)) for _ in range(2)]
    for error in job.run(2, lambda rank: [part("model", live[rank])], load).errors:
        assert isinstance(error, CkptError)
        assert "changed between the check and the read" in str(error)
    assert not any(one.state["w0"].any() for one in live)


def test_what_the_ranks_told_each_other_is_forgotten(tmp_path):
    store = c10d.HashStore()

    def work(world: TorchWorld) -> list[int]:
        held = [part("model", weights(1))]
        with CheckpointCoordinator(held, {}, world, tmp_path / "run") as coordinator:
            coordinator.save_checkpoint(step=1)
            found = []
            for _ in range(6):
                coordinator.load_checkpoint()
                found.append(store.num_keys())
            return found

    for found in run_ranks(2, work, store=store).values:
        assert max(found[1:]) - min(found[1:]) <= 3  # a key or two come and go in a round
