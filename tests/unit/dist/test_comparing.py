"""Comparing checkpoints: whole tensors, pieces cut in any way, deltas; nothing is hidden."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptcoord
from ckptcoord import SharingPattern, StateComponent
from ckptcoord.core.box import Box
from ckptcoord.core.lossy import Lossy
from ckptcoord.core.statediff import Status
from ckptcoord.dist.comparing import compare_checkpoints
from ckptcoord.dist.contents import Contents
from ckptcoord.dist.sharded import Sharded
from ckptcoord.errors import ConfigError, CorruptError, DigestMismatchError
from ckptcoord.repo import comparing
from ckptcoord.repo import diff as engine
from ckptcoord.repo.changes import layer_of
from ckptcoord.repo.deltas import DeltaReader
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from pathlib import Path

PER_RANK, GLOBAL = SharingPattern.PER_RANK, SharingPattern.GLOBAL


def save(step: int, **more):
    return lambda coordinator, rank: coordinator.save_checkpoint(step=step, **more)


def one(state, pattern=GLOBAL, key="m"):
    return lambda rank: [StateComponent(key, state(rank) if callable(state) else state, pattern)]


def compare(folder, old="main@1", new="main@2", **more):
    repository = open_repository(folder)
    sides = [Contents(repository, repository.resolve(ref)) for ref in (old, new)]
    return compare_checkpoints(*sides, **more)


def status_of(found) -> dict[str, str]:
    return {one.name: one.status.value for one in found.tensors}


def two(job, old, new, **settings):
    for step, state in ((1, old), (2, new)):
        job.do(1, one(state), save(step), **settings)
    return compare(job.output_dir)


# --- what is said of a tensor


def test_a_change_is_measured_as_numpy_measures_it(job):
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((300, 70)).astype(np.float32) for _ in range(2))
    found = two(job, {"w": torch.tensor(a)}, {"w": torch.tensor(b)})
    (tensor,) = found.tensors
    there = tensor.difference
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert (tensor.name, tensor.status) == ("m.w", Status.CHANGED)
    assert there.relative_l2 == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert there.max_abs == pytest.approx(abs(y - x).max())
    assert there.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert there.differing == there.elements == x.size
    assert found.read_bytes == 2 * a.nbytes


def test_what_is_equal_by_digest_is_not_read(job, monkeypatch):
    state = {"w": torch.randn(100), "v": {"u": torch.arange(5)}, "lr": 0.1}
    monkeypatch.setattr(engine, "compare_pieces", None)
    found = two(job, state, state)
    assert not found.differs
    assert status_of(found) == {"m.w": "equal", "m.v.u": "equal"}
    assert (found.read_bytes, found.scalars, found.changed) == (0, (), ())


def test_nothing_that_is_not_finite_hides_or_is_hidden(job):
    old = torch.tensor([1.0, math.nan, 3.0, math.inf, 5.0])
    new = torch.tensor([2.0, 2.0, math.nan, -math.inf, math.inf])
    (tensor,) = two(job, {"w": old}, {"w": new}).tensors
    assert (tensor.difference.nans, tensor.difference.infinities) == ((1, 1), (1, 2))
    assert (tensor.difference.l2, tensor.difference.l2_old) == (1.0, 1.0), "only the first pair"
    assert tensor.difference.differing == 5


def test_shapes_dtypes_and_names_that_come_and_go_are_told_apart(job):
    old = {
        "shape": torch.zeros(2, 3),
        "dtype": torch.zeros(4),
        "gone": torch.zeros(1),
        "same": torch.zeros(3),
        "was_value": 3,
    }
    new = {
        "shape": torch.zeros(3, 2),
        "dtype": torch.zeros(4, dtype=torch.bfloat16),
        "new": torch.zeros(1),
        "same": torch.zeros(3),
        "was_value": torch.zeros(2),
    }
    found = two(job, old, new)
    assert status_of(found) == {
        "m.shape": "reshaped",
        "m.dtype": "reshaped",
        "m.gone": "removed",
        "m.new": "added",
        "m.same": "equal",
        "m.was_value": "added",
    }
    by_name = {one.name: one for one in found.tensors}
    assert (by_name["m.dtype"].old.dtype, by_name["m.dtype"].new.dtype) == ("F32", "BF16")
    assert [(c.path, c.old, c.new) for c in found.scalars] == [("m.was_value", 3, "a tensor")]


def test_empty_tensors_are_equal(job):
    state = {"e": torch.empty(0, 3), "w": torch.ones(2)}
    assert status_of(two(job, state, state | {"w": torch.zeros(2)}))["m.e"] == "equal"


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8],
)
def test_every_kind_of_number_is_compared(job, dtype):
    old, new = torch.tensor([1.0, 2, 4]).to(dtype), torch.tensor([1.0, 3, 4]).to(dtype)
    (tensor,) = two(job, {"w": old}, {"w": new}).tensors
    assert (tensor.difference.max_abs, tensor.difference.differing) == (1.0, 1)


def test_scalars_are_values_of_documents_and_tensors_without_dimensions(job):
    old = {"step": torch.tensor(1.0), "lr": 1e-3, "flag": torch.tensor(True), "k": "x"}
    new = {"step": torch.tensor(2.0), "lr": 1e-4, "flag": torch.tensor(False), "k": "x"}
    found = two(job, old, new)
    assert [(c.path, c.old, c.new) for c in found.scalars] == [
        ("m.lr", 1e-3, 1e-4),
        ("m.flag", True, False),
        ("m.step", 1.0, 2.0),
    ]
    assert found.layers == ()
    assert found.differs


def test_a_value_alone_is_a_difference(job):
    found = two(job, {"w": torch.ones(2), "lr": 1.0}, {"w": torch.ones(2), "lr": 2.0})
    assert found.differs
    assert found.counts[Status.EQUAL] == len(found.tensors) == 1


def test_metrics_are_shown_and_are_no_part_of_the_state(job):
    state = one({"w": torch.ones(2)})
    job.do(1, state, save(1, metrics={"loss": 2.0, "old": 1.0}))
    job.do(1, state, save(2, metrics={"loss": 1.5, "new": 1.0}))
    found = compare(job.output_dir)
    assert [(m.name, m.old, m.new) for m in found.metrics] == [
        ("loss", 2.0, 1.5),
        ("new", None, 1.0),
        ("old", 1.0, None),
    ]
    assert not found.differs


# --- layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.attn.weight", "model.layers.3"),
        ("model.h.10.mlp.2.bias", "model.h.10"),
        ("model.embed.weight", "model.embed"),
        ("optimizer.state.0.exp_avg", "optimizer.state.0"),
        ("w", "w"),
        ("m.w", "m"),
        ("m.h1.w", "m.h1"),
        ("m.\u0663.w", "m.\u0663"),  # a digit, and no number that torch would write
    ],
)
def test_a_layer_is_a_name_through_its_first_number(name, layer):
    assert layer_of(name) == layer


def test_layers_are_summed_and_what_changed_most_comes_first(job):
    old = {"h": [{"a": torch.ones(4), "b": torch.ones(4)} for _ in range(3)]}
    new = {"h": [{"a": torch.ones(4) * k, "b": torch.ones(4)} for k in (1.0, 1.5, 1.1)]}
    found = two(job, old, new)
    assert [(one.name, one.changed, one.tensors) for one in found.layers] == [
        ("m.h.1", 1, 2),
        ("m.h.2", 1, 2),
        ("m.h.0", 0, 2),
    ]
    assert found.layers[0].relative_l2 == pytest.approx(0.5)
    assert [one.name for one in found.changed] == ["m.h.1.a", "m.h.2.a"]


# --- pieces


SHAPE = (6, 8, 5)
FULL = torch.arange(240.0).reshape(SHAPE)


def cut(full: torch.Tensor, parts: int, dim: int):
    """What each of some ranks holds of a tensor that is cut along a dimension."""

    def state(rank: int) -> dict[str, object]:
        size = -(-full.shape[dim] // parts)
        first = min(rank * size, full.shape[dim])
        length = min(size, full.shape[dim] - first)
        offset = tuple(first if at == dim else 0 for at in range(full.ndim))
        piece = full.narrow(dim, first, length).clone()
        return {"w": Sharded(piece, offset, tuple(full.shape)), "whole": full[0].clone()}

    return state


def save_cut(job, step, full, parts, dim, **settings):
    if parts == 1:
        job.do(1, one({"w": full, "whole": full[0].clone()}), save(step), **settings)
    else:
        job.do(parts, one(cut(full, parts, dim), PER_RANK), save(step), **settings)


CUTS = [((1, 0), (2, 0)), ((2, 0), (3, 0)), ((2, 0), (2, 1)), ((3, 1), (2, 2)), ((2, 2), (1, 0))]


@pytest.mark.parametrize(("old", "new"), CUTS)
@pytest.mark.parametrize("slab_bytes", [4 << 20, 64, 20, 8])
def test_a_tensor_is_compared_however_it_is_cut(job, monkeypatch, old, new, slab_bytes):
    monkeypatch.setattr(comparing, "_SLAB_BYTES", slab_bytes)
    changed = FULL.clone()
    changed[2, 3, 4] += 7
    save_cut(job, 1, FULL, *old)
    save_cut(job, 2, FULL, *new)
    save_cut(job, 3, changed, *new)
    same = compare(job.output_dir, "main@1", "main@2")
    assert status_of(same) == {"m.w": "equal", "m.whole": "equal"}
    assert not same.differs
    other = compare(job.output_dir, "main@1", "main@3")
    (tensor,) = other.changed
    assert (tensor.difference.differing, tensor.difference.max_abs) == (1, 7.0)
    assert tensor.difference.elements == FULL.numel()
    assert tensor.difference.l2_old == pytest.approx(float(FULL.double().norm()))
    assert other.read_bytes == 2 * FULL.nbytes


def test_deltas_of_pieces_are_compared_with_anchors_of_others(job, monkeypatch):
    full = torch.randn(64, 96)
    changed = full + 1e-5 * torch.randn(64, 96)
    save_cut(job, 1, full, 2, 1)
    save_cut(job, 2, changed, 2, 1, compression="auto")
    save_cut(job, 3, changed, 3, 0)
    monkeypatch.setattr(comparing, "_SLAB_BYTES", 5000)
    assert not compare(job.output_dir, "main@2", "main@3").differs
    (tensor,) = (t for t in compare(job.output_dir).changed if t.name == "m.w")
    want = (changed.double() - full.double()).norm() / full.double().norm()
    assert tensor.difference.relative_l2 == pytest.approx(float(want))


@pytest.mark.slow
def test_parts_of_deltas_that_are_cut_otherwise_are_decoded_in_order(job, monkeypatch):
    """Pieces of more than a part, so that slabs begin and end within one."""
    full = torch.randn(1300, 2048)  # 10 MiB: pieces of 5
    changed = full + 1e-6 * torch.randn(1300, 2048)
    save_cut(job, 1, full, 2, 1)
    save_cut(job, 2, changed, 2, 1, compression="auto")
    save_cut(job, 3, changed, 1, 0)
    for kept in (32, 1):
        monkeypatch.setattr(comparing, "_KEPT_PARTS", kept)
        assert not compare(job.output_dir, "main@2", "main@3").differs
        assert compare(job.output_dir, "main@1", "main@3").differs


def test_a_tensor_of_which_a_piece_is_missing_is_partial_unless_it_is_the_same(job):
    for step, add in ((1, 0.0), (2, 0.0), (3, 1.0)):
        state = {"w": Sharded(FULL[:2] + add, (0, 0, 0), SHAPE)}
        job.do(1, one(state, PER_RANK), save(step))
    assert status_of(compare(job.output_dir)) == {"m.w": "equal"}
    found = compare(job.output_dir, "main@1", "main@3")
    assert status_of(found) == {"m.w": "partial"}
    assert found.differs


@settings(max_examples=200)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=4),
    item_bytes=st.sampled_from([1, 2, 4, 8, 16]),
    most=st.integers(16, 400),
)
def test_slabs_have_every_element_once_in_order_and_are_small(shape, item_bytes, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "_SLAB_BYTES", most)
        places = np.arange(math.prod(shape)).reshape(shape)
        whole = Box.whole(shape)
        found = []
        for slab in comparing._slabs(shape, item_bytes):
            assert slab.volume * item_bytes <= most
            found.append(places[slab.seen_from(whole)].reshape(-1))
    assert np.concatenate(found).tolist() == list(range(places.size))


# --- copies


def test_copies_that_differ_are_compared_each_with_its_like(job):
    def states(add):
        return lambda rank: {"g": torch.full((3,), float(rank) + add * (rank == 1)), "n": rank}

    for step, add in ((1, 0), (2, 5)):
        job.do(2, one(states(add), PER_RANK, "rng"), save(step))
    found = compare(job.output_dir)
    assert status_of(found) == {"rng.rank00000.g": "equal", "rng.rank00001.g": "changed"}
    assert found.documents == ()


def test_other_numbers_of_ranks_are_other_copies(job):
    def state(rank):
        return {"g": torch.full((3,), float(rank)), "n": rank}

    job.do(1, one(state, PER_RANK, "rng"), save(1))
    job.do(2, one(state, PER_RANK, "rng"), save(2))
    found = compare(job.output_dir)
    assert status_of(found) == {"rng.rank00000.g": "equal", "rng.rank00001.g": "added"}
    assert [(c.path, c.status.value) for c in found.scalars] == [("rng.rank00001.n", "added")]


def test_components_come_and_go_and_one_alone_can_be_asked_for(job):
    a, b = (StateComponent(key, {"w": torch.ones(2), "n": 1}, GLOBAL) for key in "ab")
    job.do(1, lambda _: [a], save(1))
    job.do(1, lambda _: [b], save(2))
    assert status_of(compare(job.output_dir)) == {"a.w": "removed", "b.w": "added"}
    assert status_of(compare(job.output_dir, component="b")) == {"b.w": "added"}
    with pytest.raises(ConfigError, match="in neither; there is: b, a"):
        compare(job.output_dir, component="c" * 10_000)


# --- deltas


def test_a_part_that_a_delta_leaves_as_it_is_is_read_once(job):
    full = torch.randn(3 << 20)  # three parts of 4 MiB
    job.do(1, one({"w": full}), save(1))
    full[5] += 1
    job.do(1, one({"w": full}), save(2), compression="auto")
    full[-1] += 1
    job.do(1, one({"w": full}), save(3), compression="auto")
    for old, new, read_parts in (("1", "2", 4), ("1", "3", 5), ("2", "3", 5)):
        found = compare(job.output_dir, f"main@{old}", f"main@{new}")
        (tensor,) = found.changed
        assert found.read_bytes == read_parts << 22
        assert tensor.difference.elements == full.numel()


def test_a_tensor_that_a_delta_names_again_is_equal(job):
    state = {"w": torch.randn(50_000), "v": torch.randn(50_000)}
    job.do(1, one(state), save(1))
    state["v"] += 1
    job.do(1, one(state), save(2), compression="auto")
    found = compare(job.output_dir)
    assert status_of(found) == {"m.w": "equal", "m.v": "changed"}
    assert found.read_bytes == 2 * state["v"].nbytes


def test_a_delta_is_decoded_over_what_was_read_of_its_base(job, monkeypatch):
    full = torch.randn(3 << 20)
    changed = full * (1 + 1e-4 * torch.randn(3 << 20))
    job.do(1, one({"w": full}), save(1))
    job.do(1, one({"w": changed}), save(2), compression="auto")
    monkeypatch.setattr(DeltaReader, "read_range", None)
    (tensor,) = compare(job.output_dir).changed
    want = (changed.double() - full.double()).norm() / full.double().norm()
    assert tensor.difference.relative_l2 == pytest.approx(float(want))
    monkeypatch.undo()
    back = compare(job.output_dir, "main@2", "main@1").changed[0].difference
    assert back.l2 == pytest.approx(tensor.difference.l2)


@pytest.mark.parametrize("lossy", [Lossy(update_fraction=0.1), Lossy(mantissa_bits=6)])
def test_what_was_given_up_is_no_difference(job, lossy):
    full = torch.randn(1 << 18)
    changed = full + 1e-4 * torch.randn(1 << 18)
    for step, state in ((1, full), (2, changed)):
        component = StateComponent("m", {"w": state}, GLOBAL, lossy=lossy)
        job.do(1, lambda _, c=component: [c], save(step), compression="auto")
    run = ckptcoord.open_repository(job.output_dir)
    want = (run["main@2"].load("m.w").double() - run["main@1"].load("m.w").double()).norm()
    assert compare(job.output_dir).changed[0].difference.l2 == pytest.approx(float(want))


# --- damage


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("compression", ["off", "auto"])
@pytest.mark.parametrize("step", [1, 2])
def test_damage_is_an_error_and_no_difference(job, compression, step):
    state = {"w": torch.randn(70_000)}
    job.do(1, one(state), save(1))
    state["w"] += 1e-3
    job.do(1, one(state), save(2), compression=compression)
    (path,) = (job.output_dir / f"checkpoint-{step}").glob("m*.safetensors")
    spoil(path, path.stat().st_size - 9)
    with pytest.raises(CorruptError):
        compare(job.output_dir)


def test_damage_of_a_part_that_is_shared_is_found(job):
    full = torch.randn(3 << 20)
    job.do(1, one({"w": full}), save(1))
    full[5] += 1
    job.do(1, one({"w": full}), save(2), compression="auto")
    spoil(job.output_dir / "checkpoint-1/m.safetensors", (11 << 20) + 77)
    with pytest.raises(DigestMismatchError):
        compare(job.output_dir)


def test_damage_in_a_piece_that_is_cut_otherwise_is_found(job):
    save_cut(job, 1, FULL, 2, 0)
    save_cut(job, 2, FULL, 2, 1)
    path = next((job.output_dir / "checkpoint-2").glob("m*.safetensors"))
    spoil(path, path.stat().st_size - FULL[0].nbytes - 3)
    with pytest.raises(DigestMismatchError):
        compare(job.output_dir)


def test_one_failure_ends_all_threads_and_names_the_first(job):
    state = {f"w{at}": torch.randn(3 << 20) for at in range(4)}
    job.do(1, one(state), save(1))
    job.do(1, one({name: tensor + 1 for name, tensor in state.items()}), save(2))
    (path,) = (job.output_dir / "checkpoint-2").glob("m*.safetensors")
    spoil(path, 10_000)
    with pytest.raises(DigestMismatchError, match="w0"):
        compare(job.output_dir, threads=3)


# --- many files and threads


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_in_more_files_than_are_open_at_once_are_all_compared(job, monkeypatch, threads):
    monkeypatch.setattr(engine, "_MOST_FILES", 2)
    monkeypatch.setattr(engine, "_BATCH_TENSORS", 2)
    state = {f"w{at:02}": torch.full((256,), float(at)) for at in range(20)}
    job.do(1, one(state), save(1), max_shard_size=3000)
    for at in range(0, 20, 3):
        state[f"w{at:02}"] += 1
    job.do(1, one(state), save(2), max_shard_size=3000)
    seen = []
    found = compare(job.output_dir, threads=threads, progress=seen.append)
    assert [t.name for t in found.tensors if t.status is Status.CHANGED] == [
        f"m.w{at:02}" for at in range(0, 20, 3)
    ]
    assert sum(seen) == found.read_bytes == 2 * 7 * 1024


def test_the_way_there_is_the_way_back(tmp_path):
    state = {"w": torch.randn(1000), "lr": 1}
    ckptcoord.save(state, tmp_path / "it", keep=9)
    state = {"w": state["w"] + 1, "lr": 2, "x": torch.ones(1)}
    ckptcoord.save(state, tmp_path / "it", keep=9)
    there, back = (
        compare(tmp_path / "it", *refs) for refs in (("main@1", "main@2"), ("main@2", "main@1"))
    )
    a, b = (next(t.difference for t in side.tensors if t.difference) for side in (there, back))
    assert (a.l2, a.max_abs, a.l2_old, a.l2_new) == (b.l2, b.max_abs, b.l2_new, b.l2_old)
    assert {c.old for c in there.scalars} == {c.new for c in back.scalars}
    assert there.counts[Status.ADDED] == back.counts[Status.REMOVED] == 1
