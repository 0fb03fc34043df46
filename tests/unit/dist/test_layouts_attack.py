"""Pieces and layouts beside odd names, odd trainers, strict=False and hostile files."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.core.box import Box, covers_once, parse_piece_name
from ckptcoord.core.leaf import LeafForm
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.dist.saved import SavedTensor
from ckptcoord.dist.sharded import Sharded
from ckptcoord.dist.union import SavedComponent
from ckptcoord.dist.world import Solo
from ckptcoord.errors import ConfigError, ManifestError, StateMismatchError, UnsupportedStateError
from ckptcoord.repo.repository import Repository

GLOBAL, REPLICATED = SharingPattern.GLOBAL, SharingPattern.REPLICATED
PER_RANK, PER_GROUP = SharingPattern.PER_RANK, SharingPattern.PER_GROUP
SHAPE = (8, 4)
FULL = torch.arange(32.0).reshape(SHAPE)


def save(step: int = 1, **more):
    return lambda coordinator, rank: coordinator.save_checkpoint(step=step, **more)


def load(**more):
    return lambda coordinator, rank: coordinator.load_checkpoint(**more)


def rows(first: int, stop: int, source: torch.Tensor = FULL) -> Sharded:
    return Sharded(source[first:stop].clone(), (first, 0), tuple(source.shape))


def one(state, pattern=PER_RANK, **more):
    return lambda rank: [
        StateComponent("m", state(rank) if callable(state) else state, pattern, **more)
    ]


def halves(rank: int, source: torch.Tensor = FULL) -> dict:
    return {"w": rows(4 * rank, 4 * rank + 4, source)}


# --- names


@pytest.mark.parametrize("first", ["w", "w[0:4,0:4]"])
def test_a_whole_tensor_that_is_called_as_a_piece_of_another_is_refused_at_the_save(job, first):
    def state(fill: float) -> dict:
        both = {
            "w": Sharded(torch.full((4, 4), fill), (0, 0), SHAPE),
            "w[0:4,0:4]": torch.full((4, 4), -fill),
        }
        return {first: both[first], **both}

    (error,) = job.run(1, one(state(1.0)), save()).errors
    assert isinstance(error, UnsupportedStateError)
    assert "m.w[0:4,0:4]" in str(error)


def test_a_part_of_a_tensor_without_dimensions_is_refused_at_the_save(job):
    (error,) = job.run(1, one({"w": Sharded(torch.tensor(1.0), (), ())}), save()).errors
    assert isinstance(error, UnsupportedStateError)
    assert "no dimensions" in str(error)


@pytest.mark.parametrize("other", [torch.zeros(3, dtype=torch.int32), torch.zeros(1, 3)])
def test_as_many_bytes_of_another_form_are_no_copy_of_a_members_tensor(job, other):
    def declare(rank: int) -> list[StateComponent]:
        state = {"w": torch.zeros(3) if rank == 0 else other, f"own{rank}": torch.ones(1)}
        return [StateComponent("m", state, PER_GROUP, "g")]

    errors = job.run(2, declare, save(), groups=lambda _: {"g": (0, 1)}).errors
    assert all("'w' on ranks 1 is not what rank 0 holds" in str(error) for error in errors)
    assert "against F32[3], 12 bytes" in str(errors[0])


# --- strict=False


def test_what_is_not_covered_keeps_its_live_bytes(job):
    job.do(1, one({"w": rows(0, 4), "b": torch.ones(1)}), save())
    live = {"w": rows(2, 8, torch.full(SHAPE, -1.0)), "b": torch.zeros(1)}
    (report,) = job.do(1, one(live), load(strict=False))
    assert (live["w"].tensor == -1).all()
    assert live["b"].item() == 1
    assert len(report.mismatched) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float64])
def test_bytes_of_another_dtype_are_not_taken_for_a_piece(job, dtype):
    saved = {
        torch.bfloat16: torch.float16,
        torch.int32: torch.float32,
        torch.float64: torch.float32,
    }[dtype]
    job.do(2, one(lambda r: {"w": rows(4 * r, 4 * r + 4, FULL.to(saved))}), save())
    for cut in ((0, 4), (0, 8), (1, 3)):
        live = {"w": rows(*cut, torch.full(SHAPE, -1.0).to(dtype))}
        (report,) = job.do(1, one(live), load(strict=False))
        assert live["w"].tensor.dtype == dtype
        assert (live["w"].tensor == -1).all()
        assert report.mismatched


@pytest.mark.parametrize("shape", [(16, 4), (32,), (4, 4)])
def test_a_tensor_of_another_shape_does_not_stop_the_rest(job, shape):
    job.do(2, one(lambda r: {**halves(r), "b": torch.ones(1)}), save())
    live = {"w": Sharded(torch.full(shape, -1.0), (0,) * len(shape), shape), "b": torch.zeros(1)}
    (report,) = job.do(1, one(live), load(strict=False))
    assert (live["w"].tensor == -1).all()
    assert live["b"].item() == 1
    assert report.mismatched


# --- no elements


def test_a_sharded_tensor_without_elements_keeps_its_dtype(job):
    def state(rank):
        return {
            "w": Sharded(torch.zeros(0, 4, dtype=torch.bfloat16), (0, 0), (0, 4)),
            "b": torch.ones(1),
        }

    job.do(2, one(state), save())
    live = {"w": torch.zeros(0, 4, dtype=torch.bfloat16), "b": torch.zeros(1)}
    job.do(1, one(live, REPLICATED), load())
    assert live["w"].dtype == torch.bfloat16
    live = state(0)
    job.do(1, one(live), load())
    assert live["w"].tensor.dtype == torch.bfloat16


# --- as many ranks, other parts


class Stage(torch.nn.Module):
    def __init__(self, names: str, fill: float = 0.0) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.full((2,), fill)))


def stepped(stage: Stage) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(stage.parameters())
    for name, parameter in stage.named_parameters():
        parameter.grad = torch.full((2,), float(ord(name)))
    optimizer.step()
    return optimizer


def test_stages_cut_otherwise_on_as_many_ranks_get_their_optimizers(job):
    def saving(rank):
        stage = Stage(["abc", "d"][rank], 1.0)
        return [
            StateComponent("model", stage, PER_RANK),
            StateComponent("optimizer", OptimizerState(stepped(stage), stage), PER_RANK),
        ]

    kept = {}

    def loading(rank):
        stage = Stage(["ab", "cd"][rank])
        optimizer = torch.optim.AdamW(stage.parameters())
        kept[rank] = stage, optimizer
        return [
            StateComponent("model", stage, PER_RANK),
            StateComponent("optimizer", OptimizerState(optimizer, stage), PER_RANK),
        ]

    job.do(2, saving, save())
    job.do(2, loading, load())
    for stage, optimizer in kept.values():
        for name, parameter in stage.named_parameters():
            moment = optimizer.state[parameter]["exp_avg"]
            assert torch.allclose(moment, torch.full((2,), 0.1 * ord(name)))


class Moments:
    """State that is made anew in the layout of this rank, as an optimizer's."""

    fills_in_place = True

    def __init__(self, first: int, stop: int, across: slice = slice(0, 4)) -> None:
        self.box = (first, stop), across
        self.state: dict = {}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def new_state(self, keys, dtype, shape):
        (first, stop), across = self.box
        part = torch.zeros(stop - first, across.stop - across.start, dtype=dtype)
        return Sharded(part, (first, across.start), shape)


def test_pieces_cut_otherwise_on_as_many_ranks_load_into_state_that_is_not_there_yet(job):
    def saving(rank):
        moments = Moments(4 * rank, 4 * rank + 4)
        moments.state = halves(rank)
        return [StateComponent("m", moments, PER_RANK)]

    job.do(2, saving, save())
    live = [Moments(0, 8, slice(2 * r, 2 * r + 2)) for r in range(2)]
    job.do(2, lambda rank: [StateComponent("m", live[rank], PER_RANK)], load())
    for rank, moments in enumerate(live):
        assert torch.equal(moments.state["w"].tensor, FULL[:, 2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("way", ["dtype", "shape", "dims"])
def test_memory_of_another_kind_than_was_asked_for_is_refused(job, way):
    class Wrong(Moments):
        def new_state(self, keys, dtype, shape):
            if way == "dtype":
                return torch.zeros(shape, dtype=torch.int32)
            return torch.zeros((16, 4) if way == "shape" else (32,), dtype=dtype)

    job.do(2, one(halves), save())
    wrong = Wrong(0, 8)
    (error,) = job.run(1, lambda _: [StateComponent("m", wrong, PER_RANK)], load()).errors
    assert isinstance(error, ConfigError), error
    assert "new_state" in str(error)
    assert not wrong.state


# --- own


@pytest.mark.parametrize("pattern", [REPLICATED, GLOBAL])
def test_own_state_that_was_not_saved_by_rank_is_not_left_out_in_silence(job, pattern):
    job.do(2, one({"n": 7}, pattern), save())
    live = {"n": 0}
    job.do(1, one(live, PER_RANK, on_world_size_change="own"), load())
    assert live["n"] == 7


# --- many ranks


def pieces_of(boxes: list[Box], shape: tuple[int, ...]) -> SavedTensor:
    spec = TensorSpec(name="w", dtype="F32", shape=shape)
    return SavedTensor(
        form=LeafForm(shape=shape), spec=spec, pieces=tuple((b, None) for b in boxes)
    )


def boxes_in(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    spans = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*spans).map(
        lambda ranges: Box(offset=tuple(a for a, _ in ranges), size=tuple(b - a for a, b in ranges))
    )


@given(st.data(), st.lists(st.integers(0, 5), max_size=3).map(tuple))
def test_the_pieces_that_meet_a_box_are_those_with_elements_of_it(data, shape):
    boxes = data.draw(st.lists(boxes_in(shape), max_size=5))
    box = data.draw(boxes_in(shape))
    saved = pieces_of(boxes, shape)
    assert saved.meeting(box) == [i for i, one in enumerate(boxes) if one.meet(box) and one.volume]
    assert saved.has(box) == covers_once(boxes, box)


def test_documents_that_all_ranks_have_alike_are_read_once(job, monkeypatch):
    def state(rank: int) -> dict:
        return {"w": Sharded(FULL[2 * rank : 2 * rank + 2].clone(), (2 * rank, 0), SHAPE)}

    job.do(4, one(state), save())
    read = []
    whole = Repository.read_document

    def counted(self, commit, record):
        read.append(record.path)
        return whole(self, commit, record)

    monkeypatch.setattr(Repository, "read_document", counted)
    live = {"w": rows(0, 8, torch.zeros(SHAPE))}
    job.do(1, one(live), load())
    assert torch.equal(live["w"].tensor, FULL)
    assert len(read) == 1


# --- hostile documents


@pytest.mark.parametrize(
    ("length", "kind", "why"),
    [
        (2**40, StateMismatchError, "do not cover all of it"),
        (2**62, ManifestError, "larger than 2**63 bytes"),
    ],
)
def test_a_shape_that_nothing_fills_is_refused(job, monkeypatch, length, kind, why):
    job.do(1, one(halves), save())
    forged = {"$": "sharded", "name": "w", "shape": [length, 4]}

    def forge(self, record):
        return {"w": forged, "v": forged | {"name": "v"}}

    monkeypatch.setattr(SavedComponent, "_tree", forge)
    for stateful in ({}, Moments(0, 8)):
        (error,) = job.run(1, one(lambda _, s=stateful: s), load(strict=False)).errors
        assert isinstance(error, kind)
        assert why in str(error)


def test_an_index_that_no_tensor_has_makes_no_piece():
    assert parse_piece_name(f"w[0:{2**63 - 1}]") is not None
    for text in (f"[0:{2**63}]", f"[{2**63}:{2**63}]", "[4:3]", "[00:1]", "[0:01]", "[]", "[0:1,]"):
        assert parse_piece_name(f"w{text}") is None
    assert parse_piece_name("[0:1]") is None


# --- torch's types


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_replicated_dtensor_of_another_shape_is_left_alone(process_group, tmp_path):
    def dtensor(data: torch.Tensor) -> DTensor:
        return DTensor.from_local(data, init_device_mesh("cpu", (1,)), [Replicate()])

    def coordinator(state: dict) -> CheckpointCoordinator:
        component = StateComponent("m", state, PER_RANK)
        return CheckpointCoordinator([component], dist=Solo(), output_dir=tmp_path / "run")

    with coordinator({"w": dtensor(FULL)}) as one_rank:
        one_rank.save_checkpoint(step=1)
    live = {"w": dtensor(torch.zeros(16, 4))}
    with coordinator(live) as one_rank:
        report = one_rank.load_checkpoint(strict=False)
    assert len(report.mismatched) == 1
    assert not live["w"].to_local().any()
    assert live["w"].shape == (16, 4)


def sharded_tensor(data: torch.Tensor) -> ShardedTensor:
    shard = ShardMetadata([0, 0], list(data.shape), "rank:0/cpu")
    whole = ShardedTensorMetadata([shard], data.shape, TensorProperties(dtype=data.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata([Shard(data, shard)], whole)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["in place", "read once", "set_state"])
def test_a_sharded_tensor_is_loaded_however_it_is_read(process_group, tmp_path, way):
    def coordinator(state: dict, **more) -> CheckpointCoordinator:
        component = StateComponent("m", state, PER_RANK, **more)
        return CheckpointCoordinator([component], dist=Solo(), output_dir=tmp_path / "run")

    with coordinator({"w": sharded_tensor(FULL.clone())}) as one_rank:
        one_rank.save_checkpoint(step=1)
    data = torch.zeros(SHAPE)
    live, taken = {"w": sharded_tensor(data)}, {}
    more = {"get_state": lambda: live, "set_state": taken.update} if way == "set_state" else {}
    with coordinator(live, **more) as one_rank:
        one_rank.load_checkpoint(read_once=way == "read once")
    assert torch.equal(data, FULL)
