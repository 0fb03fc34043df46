"""One flipped bit on one rank is found, and said where and how far apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ckptcoord import SharingPattern, StateComponent, ValidationLevel, open_repository
from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.core.tree import LeafKind
from ckptcoord.dist.capture import CapturedTensor, capture
from ckptcoord.dist.devicesums import device_checksum
from ckptcoord.dist.distance import describe_distance, first_difference
from ckptcoord.dist.replication import (
    content_digest,
    sample_offsets,
    structure_digest,
    tensor_digest,
)
from ckptcoord.errors import ReplicationError

if TYPE_CHECKING:
    from collections.abc import Callable

NONE, QUICK, TENSOR, FULL = ValidationLevel
LARGE = 1 << 16  # elements: more than QUICK reads in full


def state() -> dict:
    own = torch.Generator().manual_seed(3)
    return {
        "embed": torch.randn(LARGE, generator=own),
        "head": {"weight": torch.randn(4, 4, generator=own).bfloat16(), "step": torch.tensor(5)},
        "lr": 0.125,
    }


def flip(tensor: torch.Tensor, byte: int, bit: int = 0) -> None:
    tensor.view(-1).view(torch.uint8)[byte] ^= 1 << bit


def replicas(job, level: ValidationLevel, spoil: Callable[[dict, int], None], size: int = 4):
    def declare(rank: int) -> list[StateComponent]:
        held = state()
        spoil(held, rank)
        return [
            StateComponent(
                "model",
                held,
                SharingPattern.REPLICATED,
                validate_replication=True,
                validation_level=level,
            )
        ]

    return job.run(size, declare, lambda c, _: c.save_checkpoint(step=1))


def only(rank: int, spoil: Callable[[dict], None]) -> Callable[[dict, int], None]:
    return lambda held, at: spoil(held) if at == rank else None


@pytest.mark.parametrize("level", list(ValidationLevel))
def test_equal_replicas_pass_at_every_level(job, level):
    paths = replicas(job, level, lambda held, rank: None).values
    assert len(set(paths)) == 1
    repository = open_repository(job.output_dir)
    manifest = repository.manifest(repository.resolve("latest"))
    assert manifest.components["model"].validation is level


@pytest.mark.parametrize("level", [TENSOR, FULL])
@pytest.mark.parametrize("byte", [0, 4 * LARGE - 1, 123_457])
def test_one_flipped_bit_is_found_named_and_measured(job, level, byte):
    spoil = only(2, lambda held: flip(held["embed"], byte))
    for error in replicas(job, level, spoil).errors:
        assert isinstance(error, ReplicationError)
        assert (error.component, error.tensor) == ("model", "embed")
        assert tuple(error.minority) == (2,)
        assert error.reference == 0
        assert "1 of" in error.apart
        assert "differ, by at most" in error.apart
        assert "1 of 64 blocks differ" in error.apart
    assert not open_repository(job.output_dir).state().commits


def test_quick_finds_a_flip_in_a_byte_that_it_samples_and_only_there(job):
    offsets = sample_offsets(4 * LARGE)
    sampled = int(offsets[len(offsets) // 2])
    unsampled = int(np.setdiff1d(np.arange(4 * LARGE), offsets)[0])
    spoil = only(1, lambda held: flip(held["embed"], sampled))
    for error in replicas(job, QUICK, spoil).errors:
        assert isinstance(error, ReplicationError)
        assert (error.tensor, tuple(error.minority)) == ("embed", (1,))
    spoil = only(1, lambda held: flip(held["embed"], unsampled))
    assert len(replicas(job, QUICK, spoil).values) == 4


@pytest.mark.parametrize("level", list(ValidationLevel))
def test_a_changed_shape_is_found_at_every_level(job, level):
    spoil = only(3, lambda held: held.update(embed=held["embed"].view(2, -1)))
    for error in replicas(job, level, spoil).errors:
        assert isinstance(error, ReplicationError)
        assert (error.tensor, tuple(error.minority)) == ("embed", (3,))
        assert error.apart == f"F32[2, {LARGE // 2}] against F32[{LARGE}]"


def test_a_tensor_that_one_rank_lacks_is_named(job):
    for error in replicas(job, NONE, only(0, lambda held: held.pop("embed"))).errors:
        assert (error.tensor, tuple(error.minority)) == ("embed", (0,))
        assert error.apart == f"absent against F32[{LARGE}]"


@pytest.mark.parametrize("level", [QUICK, TENSOR, FULL])
def test_a_scalar_that_differs_is_found_by_its_path(job, level):
    for error in replicas(job, level, only(1, lambda held: held.update(lr=0.25))).errors:
        assert isinstance(error, ReplicationError)
        assert error.tensor == "state.lr"
        assert "0.25 against 0.125" in error.apart


def test_the_majority_is_right_and_of_equal_camps_the_lowest_rank(job):
    def two(held: dict, rank: int) -> None:
        if rank in (0, 1):
            held["head"]["weight"] += 1

    assert {tuple(e.minority) for e in replicas(job, TENSOR, two).errors} == {(2, 3)}

    def three(held: dict, rank: int) -> None:
        if rank != 2:
            held["head"]["weight"] += 1

    assert {tuple(e.minority) for e in replicas(job, TENSOR, three).errors} == {(2,)}


def test_after_a_divergence_the_next_save_works(job):
    held = [state() for _ in range(2)]
    flip(held[1]["embed"], 7)

    def work(coordinator, rank):
        with pytest.raises(ReplicationError):
            coordinator.save_checkpoint(step=1)
        held[1]["embed"] = held[0]["embed"].clone()
        return coordinator.save_checkpoint(step=2)

    def declare(rank: int) -> list[StateComponent]:
        component = StateComponent(
            "model", held[rank], SharingPattern.REPLICATED, validate_replication=True
        )
        return [component]

    assert len(job.run(2, declare, work).values) == 2


def test_replicas_of_one_group_may_differ_from_those_of_another_but_not_among_themselves(job):
    def run(spoiled: int | None):
        def declare(rank: int) -> list[StateComponent]:
            value = torch.full((8,), float(rank // 2)) + (rank == spoiled)
            return [
                StateComponent(
                    "expert",
                    {"w": value},
                    SharingPattern.PER_GROUP,
                    "ep",
                    validate_replication=True,
                )
            ]

        groups = lambda rank: {"ep": [0, 1] if rank < 2 else [2, 3]}  # noqa: E731
        step = 1 if spoiled is None else 2
        return job.run(4, declare, lambda c, _: c.save_checkpoint(step=step), groups=groups)

    assert len(run(None).values) == 4
    for error in run(3).errors:
        assert isinstance(error, ReplicationError)
        assert (error.reference, tuple(error.minority)) == (2, (3,))


def test_members_that_share_a_name_among_different_ones_must_hold_the_same_bytes(job):
    def declare(rank: int) -> list[StateComponent]:
        held = {f"own.{rank}": torch.ones(2), "shared": torch.full((3,), float(rank))}
        return [
            StateComponent("s", held, SharingPattern.PER_GROUP, "pp", validate_replication=True)
        ]

    def work(coordinator, _):
        return coordinator.save_checkpoint(step=1)

    for error in job.run(2, declare, work, groups=lambda _: {"pp": [0, 1]}).errors:
        assert "shared" in str(error)
        assert "ranks 1" in str(error)


# --- the digests themselves ----------------------------------------------------------------------


def captured(tensor: torch.Tensor) -> CapturedTensor:
    return capture(StateComponent("m", {"t": tensor}, SharingPattern.GLOBAL)).tensors["t"]


def test_every_single_bit_of_a_small_tensor_counts_in_every_checksum():
    tensor = torch.arange(13, dtype=torch.int16)
    for digest in (
        lambda t: tensor_digest(captured(t), QUICK),
        lambda t: tensor_digest(captured(t), TENSOR),
        lambda t: tensor_digest(captured(t), FULL),
        device_checksum,
    ):
        seen = {digest(tensor)}
        for byte in range(tensor.numel() * 2):
            for bit in range(8):
                other = tensor.clone()
                flip(other, byte, bit)
                seen.add(digest(other))
        assert len(seen) == 1 + tensor.numel() * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_tensor_is_checked_where_it_lives():
    tensor = torch.randn(LARGE, device="cuda")
    for level in (QUICK, TENSOR, FULL):
        before = tensor_digest(captured(tensor), level)
        assert before == tensor_digest(captured(tensor.clone()), level)
        other = tensor.clone()
        flip(other, 0)
        assert before != tensor_digest(captured(other), level)


def test_structure_is_names_shapes_and_dtypes_and_content_is_what_the_level_says():
    def one(**held: object):
        return capture(StateComponent("m", held, SharingPattern.GLOBAL))

    a, b = one(t=torch.zeros(4), n=1), one(t=torch.ones(4), n=2)
    assert structure_digest(a) == structure_digest(b)
    assert structure_digest(a) != structure_digest(one(t=torch.zeros(4).double(), n=1))
    assert content_digest(a, NONE) == content_digest(b, NONE) == ""
    assert content_digest(one(t=torch.zeros(4), n=1), FULL) == content_digest(a, FULL)
    assert len({content_digest(x, level) for x in (a, b) for level in (QUICK, FULL)}) == 4


@pytest.mark.parametrize("length", [0, 1, 4096, 4097, 10_000, 1 << 20])
def test_samples_are_in_range_and_reach_both_ends(length):
    offsets = sample_offsets(length)
    assert len(offsets) <= 4096
    if length:
        assert (offsets.min(), offsets.max()) == (0, length - 1)


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "left", "right", "words"),
    [
        ("F32", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), "by at most 0.5"),
        ("BF16", torch.tensor([1.0]).bfloat16(), torch.tensor([3.0]).bfloat16(), "by at most 2"),
        ("F32", torch.tensor([1.0]), torch.tensor([torch.nan]), "at most nan, 1 of them NaN"),
        ("I64", torch.tensor([5, 7]), torch.tensor([5, -7]), "1 of 2 compared elements"),
        ("I64", torch.tensor([5, 7]), torch.tensor([5, -7]), "by at most 14"),
        ("BOOL", torch.tensor([True]), torch.tensor([False]), "by at most 1"),
        ("F8_E4M3", torch.tensor([1]).byte(), torch.tensor([3]).byte(), "by at most 2"),
        ("C64", torch.tensor([1j]), torch.tensor([2j]), "by at most 1"),
        ("F32", torch.tensor([0.0]), torch.tensor([-0.0]), "1 of 1 compared elements differ"),
        ("F64", torch.tensor([1.0]).double(), torch.tensor([1.0]).double(), "the same again"),
    ],
)  # fmt: skip
def test_distances_are_said_in_the_tensor_s_own_numbers(dtype, left, right, words):
    sides = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (left, right)]
    assert words in describe_distance(*sides, dtype)


def test_the_first_difference_of_two_documents_is_named_by_its_path():
    left = {"a": [1, {"b": 2}], "c": "x" * 100}
    assert first_difference(left, {"a": [1, {"b": 3}], "c": "x"}) == ("state.a[1].b", "3 against 2")
    path, words = first_difference(left, {"a": left["a"], "c": "y" * 100})
    assert path == "state.c"
    assert len(words) < 140
    assert first_difference({"a": 1}, {"b": 1})[1] == "absent on one side"
    assert first_difference([1], [1, 2])[0] == "state"


def test_a_spec_and_a_kind_are_what_a_leaf_says():
    held = {"t": torch.zeros(2, 3).half(), "n": np.zeros(4, np.complex64), "b": np.array(True)}
    tensors = capture(StateComponent("m", held, SharingPattern.GLOBAL)).tensors
    assert tensors["t"].spec == TensorSpec(name="t", dtype="F16", shape=(2, 3))
    assert tensors["n"].spec == TensorSpec(name="n", dtype="C64", shape=(4,))
    assert tensors["b"].spec == TensorSpec(name="b", dtype="BOOL", shape=())
    assert LeafKind.TENSOR != LeafKind.NDARRAY
