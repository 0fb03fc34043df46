"""State that was saved in one layout, loaded into another (ADR 11)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ckptcoord
from ckptcoord import SharingPattern, StateComponent
from ckptcoord.core.box import Box
from ckptcoord.dist.sharded import Sharded
from ckptcoord.errors import CkptError, ConfigError, StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

GLOBAL, REPLICATED = SharingPattern.GLOBAL, SharingPattern.REPLICATED
PER_RANK, PER_GROUP = SharingPattern.PER_RANK, SharingPattern.PER_GROUP
SHAPE = (7, 5)
FULL = torch.arange(35.0).reshape(SHAPE)


def rows(rank: int, size: int) -> Box:
    """The rows of one of so many ranks; the last ones may have none."""
    each = -(-SHAPE[0] // size)
    start = min(rank * each, SHAPE[0])
    return Box(offset=(start, 0), size=(min(each, SHAPE[0] - start), SHAPE[1]))


def columns(rank: int, size: int) -> Box:
    each = -(-SHAPE[1] // size)
    start = min(rank * each, SHAPE[1])
    return Box(offset=(0, start), size=(SHAPE[0], min(each, SHAPE[1] - start)))


def grid(rank: int, size: int) -> Box:
    """Rows by pairs of ranks, columns within a pair."""
    down, across = rows(rank // 2, max(size // 2, 1)), columns(rank % 2, min(size, 2))
    found = down.meet(across)
    return found or Box(offset=(SHAPE[0], SHAPE[1]), size=(0, 0))


def replicated_pairs(rank: int, size: int) -> Box:
    return rows(rank // 2, max(size // 2, 1))


def part(box: Box, source: torch.Tensor = FULL) -> Sharded:
    data = source[box.seen_from(Box.whole(SHAPE))].clone()
    return Sharded(data, offset=box.offset, shape=SHAPE)


CUTS = {
    "rows": rows,
    "columns": columns,
    "grid": grid,
    "replicated pairs": replicated_pairs,
}


def save(step: int = 1, **more: object):
    return lambda coordinator, rank: coordinator.save_checkpoint(step=step, **more)


def load(**more: object):
    return lambda coordinator, rank: coordinator.load_checkpoint(**more)


def world(rank: int) -> dict[str, object]:
    return {}


def sharded(
    cut: Callable[[int, int], Box], size: int, source: torch.Tensor, kept: list[dict]
) -> Callable[[int], list[StateComponent]]:
    """A component in pieces; what each rank holds is put into `kept`."""
    kept[:] = [{} for _ in range(size)]

    def declare(rank: int) -> list[StateComponent]:
        kept[rank] = {"w": part(cut(rank, size), source), "n": 3, "bias": source[0].clone()}
        return [StateComponent("m", kept[rank], PER_RANK)]

    return declare


@pytest.mark.parametrize("after", CUTS)
@pytest.mark.parametrize("before", CUTS)
@pytest.mark.parametrize(("saved_on", "loaded_on"), [(4, 4), (4, 2), (2, 4), (3, 1), (1, 3)])
def test_any_cut_loads_into_any_other(job, before, after, saved_on, loaded_on):
    job.do(saved_on, sharded(CUTS[before], saved_on, FULL, []), save())
    kept: list[dict] = []
    declare = sharded(CUTS[after], loaded_on, torch.zeros(SHAPE), kept)
    memory: dict[int, int] = {}

    def check(coordinator, rank):
        memory[rank] = kept[rank]["w"].tensor.data_ptr()
        return coordinator.load_checkpoint()

    for rank, report in enumerate(job.do(loaded_on, declare, check)):
        assert report.loaded == ("m",)
        live = kept[rank]
        box = CUTS[after](rank, loaded_on)
        assert torch.equal(live["w"].tensor, FULL[box.seen_from(Box.whole(SHAPE))])
        assert live["w"].tensor.data_ptr() == memory[rank]
        assert torch.equal(live["bias"], FULL[0])


@pytest.mark.parametrize("pattern", [GLOBAL, REPLICATED])
def test_pieces_load_into_a_whole_and_a_whole_into_pieces(job, pattern):
    job.do(3, sharded(rows, 3, FULL, []), save(1))
    whole = {"w": torch.zeros(SHAPE), "n": 0, "bias": torch.zeros(SHAPE[1])}
    job.do(1, lambda _: [StateComponent("m", whole, pattern)], load())
    assert torch.equal(whole["w"], FULL)
    job.do(1, lambda _: [StateComponent("m", whole, pattern)], save(2))
    kept: list[dict] = []
    job.do(2, sharded(columns, 2, torch.zeros(SHAPE), kept), load())
    for rank, live in enumerate(kept):
        assert torch.equal(live["w"].tensor, FULL[columns(rank, 2).seen_from(Box.whole(SHAPE))])


def test_stages_of_a_model_load_into_fewer_and_into_one(job):
    def stages(size: int, fill: float, kept: list) -> Callable[[int], list[StateComponent]]:
        def declare(rank: int) -> list[StateComponent]:
            layers = range(4 // size * rank, 4 // size * (rank + 1))
            model = torch.nn.ModuleDict({str(i): torch.nn.Linear(3, 3) for i in layers})
            for i, layer in zip(layers, model.values(), strict=True):
                torch.nn.init.constant_(layer.weight, fill * (i + 1))
            kept.append((layers, model))
            return [StateComponent("model", model, PER_RANK)]

        return declare

    job.do(4, stages(4, 1.0, []), save())
    for size in (2, 1):
        kept: list = []
        job.do(size, stages(size, 0.0, kept), load())
        assert len(kept) == size
        for layers, model in kept:
            for i, layer in zip(layers, model.values(), strict=True):
                assert (layer.weight == i + 1).all()


def test_a_stage_that_was_not_saved_is_missed_by_name(job):
    def stage(names: str) -> list[StateComponent]:
        model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
        return [StateComponent("model", model, PER_RANK)]

    job.do(2, lambda rank: stage("ab"[rank]), save())
    (error,) = job.run(1, lambda _: stage("abc"), load()).errors
    assert isinstance(error, StateMismatchError)
    assert set(error.missing) == {"model.c.weight", "model.c.bias"}


@pytest.mark.parametrize("level", ["none", "tensor"])
def test_replicated_pieces_of_a_group_are_written_once(job, level):
    def declare(rank: int) -> list[StateComponent]:
        state = {"w": part(replicated_pairs(rank, 4))}
        return [
            StateComponent(
                "m",
                state,
                PER_GROUP,
                "all",
                validate_replication=level != "none",
                validation_level=level,
            )
        ]

    groups = {"groups": lambda _: {"all": (0, 1, 2, 3)}}
    (path, *_) = job.do(4, declare, save(), **groups)
    shards = list(Path(path).glob("m*.safetensors"))
    held = [name for shard in shards for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    assert sorted(held) == ["w[0:4,0:5]", "w[4:7,0:5]"]
    documents = sorted(p.name for p in Path(path).glob("m*.state.json"))
    assert documents == ["m.all00000.state.json"]
    kept: list[dict] = []
    job.do(2, sharded_only(rows, 2, kept), load())
    assert torch.equal(torch.cat([one["w"].tensor for one in kept]), FULL)


def sharded_only(cut, size, kept):
    kept[:] = [{} for _ in range(size)]

    def declare(rank: int) -> list[StateComponent]:
        kept[rank] = {"w": part(cut(rank, size), torch.zeros(SHAPE))}
        return [StateComponent("m", kept[rank], PER_RANK)]

    return declare


def test_state_that_differs_between_ranks_is_refused_skipped_or_each_ranks_own(job):
    class Own:
        derived: tuple[int, int] | None = None

        def __init__(self, rank: int) -> None:
            self.value = {"seed": rank}

        def state_dict(self) -> dict[str, int]:
            return self.value

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.value = state

        def derive_state(self, step: int, rank: int) -> None:
            self.derived = step, rank

    def declare(kept: dict[int, Own], way: str, first: int):
        def one(rank: int) -> list[StateComponent]:
            kept[rank] = Own(first + rank)
            return [
                StateComponent("rng", kept[rank], PER_RANK, on_world_size_change=way),
                StateComponent("m", {"w": torch.ones(1)}, REPLICATED),
            ]

        return one

    job.do(2, declare({}, "refuse", 0), save(5))
    for error in job.run(3, declare({}, "refuse", 10), load()).errors:
        assert isinstance(error, StateMismatchError)
        assert "rng" in error.missing[0]
        assert "differ at rng.seed" in error.missing[0]
    kept: dict[int, Own] = {}
    reports = job.do(3, declare(kept, "skip", 10), load())
    assert all("differ at rng.seed" in report.skipped["rng"] for report in reports)
    assert [kept[rank].value["seed"] for rank in range(3)] == [10, 11, 12]
    job.do(3, declare(kept, "own", 10), load())
    assert [kept[rank].value["seed"] for rank in range(3)] == [0, 1, 12]
    assert [kept[rank].derived for rank in range(3)] == [None, None, (5, 2)]


def test_entries_of_one_name_with_other_bytes_are_refused_by_name(job):
    def declare(rank: int) -> list[StateComponent]:
        return [StateComponent("m", {"w": torch.full((3,), float(rank))}, PER_RANK)]

    job.do(2, declare, save())
    for error in job.run(3, declare, load()).errors:
        assert isinstance(error, StateMismatchError)
        assert "its copies differ at m.w" in error.missing[0]


def test_a_tensor_whose_whole_shape_differs_is_refused(job):
    job.do(2, sharded_only(rows, 2, []), save())
    other = {"w": Sharded(torch.zeros(4, 5), offset=(0, 0), shape=(8, 5))}
    for size in (1, 2):
        outcome = job.run(size, lambda _: [StateComponent("m", other, PER_RANK)], load())
        for error in outcome.errors:
            assert isinstance(error, StateMismatchError)
            assert "saved F32[7, 5], live F32[8, 5]" in error.mismatched[0]


def test_a_part_that_no_piece_covers_is_refused(job):
    job.do(1, lambda _: [StateComponent("m", {"w": part(rows(0, 2))}, PER_RANK)], save())
    live = {"w": part(rows(1, 2), torch.zeros(SHAPE))}
    (error,) = job.run(1, lambda _: [StateComponent("m", live, PER_RANK)], load()).errors
    assert isinstance(error, StateMismatchError)
    assert "no saved pieces cover [3, 5] at [4, 0]" in error.mismatched[0]
    assert not live["w"].tensor.any()


@pytest.mark.parametrize("compression", ["off", "auto"])
def test_pieces_have_deltas_of_their_own_and_load_into_another_cut(job, compression):
    size = 2
    shape = (64, 1024)
    first = torch.randn(shape)
    second = first + 1e-4 * torch.randn(shape)

    def of(source: torch.Tensor, step: int) -> None:
        def declare(rank: int) -> list[StateComponent]:
            half = source[32 * rank : 32 * (rank + 1)].clone()
            return [StateComponent("m", {"w": Sharded(half, (32 * rank, 0), shape)}, PER_RANK)]

        job.do(size, declare, save(step), compression=compression)

    of(first, 1)
    of(second, 2)
    live = {"w": Sharded(torch.zeros(64, 512), (0, 512), shape)}
    job.do(1, lambda _: [StateComponent("m", live, PER_RANK)], load())
    assert torch.equal(live["w"].tensor, second[:, 512:])
    coded = list(job.output_dir.glob("checkpoint-2/*.delta.safetensors"))
    assert bool(coded) == (compression == "auto")


def test_damage_in_a_piece_is_found_before_anything_changes(job):
    (path, *_) = job.do(2, sharded_only(rows, 2, []), save())
    shard = next(Path(path).glob("m.rank00001*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    live = {"w": part(Box.whole(SHAPE), torch.zeros(SHAPE))}
    (error,) = job.run(1, lambda _: [StateComponent("m", live, PER_RANK)], load()).errors
    assert "w[4:7,0:5]" in str(error)
    assert not live["w"].tensor.any()


def test_stages_and_pieces_are_exported_as_one_plain_model(job, tmp_path):
    def declare(rank: int) -> list[StateComponent]:
        state = {"w": part(rows(rank, 2)), f"layer.{rank}": torch.full((3,), float(rank))}
        return [StateComponent("model", state, PER_RANK)]

    def refuse(coordinator, rank):
        with pytest.raises(CkptError, match="export_model"):
            coordinator.save_model()
        return coordinator.save_checkpoint(step=1)

    job.do(2, declare, refuse)
    folder = tmp_path / "plain"
    ckptcoord.export_model(job.output_dir, folder)
    found = load_file(folder / "model.safetensors")
    assert list(found) == ["layer.0", "layer.1", "w"]
    assert torch.equal(found["w"], FULL)
    assert found["layer.1"].tolist() == [1.0] * 3
    with pytest.raises(ConfigError, match="not empty"):
        ckptcoord.export_model(job.output_dir, folder)
    with pytest.raises(ConfigError, match="has no 'other', but model"):
        ckptcoord.export_model(job.output_dir, tmp_path / "new", component="other")
    whole = ckptcoord.load(job.output_dir)
    assert torch.equal(whole["model"]["w"], FULL)


def test_a_model_of_which_a_part_is_missing_is_not_exported(job, tmp_path):
    job.do(1, lambda _: [StateComponent("model", {"w": part(rows(0, 2))}, PER_RANK)], save())
    with pytest.raises(ConfigError, match=r"only a part of model\.w"):
        ckptcoord.export_model(job.output_dir, tmp_path / "plain")
    found = ckptcoord.load(job.output_dir)["model"]["w"]
    assert found.offset == (0, 0)
    assert found.shape == SHAPE
    assert torch.equal(found.tensor, FULL[:4])
