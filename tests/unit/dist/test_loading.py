"""Loads whose live side is odd: bytes still come back exactly, or nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.codec.tensorfile import TensorEntry, TensorSpec
from ckptcoord.core.box import Box
from ckptcoord.core.digest import Digest
from ckptcoord.core.leaf import LeafForm
from ckptcoord.core.manifest import FileKind, FileRecord
from ckptcoord.dist import shardset
from ckptcoord.dist.destinations import new_destination
from ckptcoord.dist.restore import empty_like
from ckptcoord.dist.saved import SavedTensor
from ckptcoord.errors import CkptError, ConfigError, StateMismatchError
from ckptcoord.repo.repository import Repository

GLOBAL = SharingPattern.GLOBAL


def part(key, state, **more):
    return StateComponent(key, state, GLOBAL, **more)


def opened(folder, *components, **settings):
    config = CoordinatorConfig(**settings)
    return CheckpointCoordinator(components, output_dir=folder, config=config)


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_a_saved_array_comes_back_whatever_stands_in_its_place(tmp_path, dtype):
    """A live tensor of the same name, dtype and shape is not the array's memory."""
    with opened(tmp_path, part("state", {"x": np.arange(4, dtype=dtype)})) as coordinator:
        coordinator.save_checkpoint(step=1)
    live = {"x": torch.full((4,), -1.0)}
    with opened(tmp_path, part("state", live)) as coordinator:
        coordinator.load_checkpoint()
    assert isinstance(live["x"], np.ndarray)
    assert live["x"].dtype == dtype
    assert live["x"].tolist() == [0, 1, 2, 3]


def test_a_saved_tensor_comes_back_where_an_array_stands(tmp_path):
    with opened(tmp_path, part("state", {"x": torch.arange(4.0)})) as coordinator:
        coordinator.save_checkpoint(step=1)
    live = {"x": np.full(4, -1, np.float32)}
    with opened(tmp_path, part("state", live)) as coordinator:
        coordinator.load_checkpoint()
    assert torch.equal(live["x"], torch.arange(4.0))


def test_a_live_tensor_whose_elements_share_memory_is_replaced(tmp_path):
    with opened(tmp_path, part("state", {"x": torch.arange(6.0).reshape(3, 2)})) as coordinator:
        coordinator.save_checkpoint(step=1)
    live = {"x": torch.zeros(2).expand(3, 2)}
    with opened(tmp_path, part("state", live)) as coordinator:
        coordinator.load_checkpoint()
    assert torch.equal(live["x"], torch.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize("kept", [1, 3, 1000])
def test_more_shards_than_may_be_open_at_once_are_read_in_turn(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(shardset, "_KEPT_OPEN", kept)
    open_now, most = set(), [0]
    open_shard = Repository.open_shard

    def watched(self, commit, record):
        reader = open_shard(self, commit, record)
        leave = reader.__class__.__exit__
        open_now.add(id(reader))
        most[0] = max(most[0], len(open_now))

        class Watched(type(reader)):
            def __exit__(self, *exc):
                open_now.discard(id(self))
                leave(self, *exc)

        reader.__class__ = Watched
        return reader

    monkeypatch.setattr(Repository, "open_shard", watched)
    saved = {f"t{i}": torch.full((16,), float(i)) for i in range(20)}
    live = {name: torch.zeros(16) for name in saved} | {"t0": np.zeros(16, np.float32)}
    with opened(tmp_path, part("state", saved), max_shard_size=64) as coordinator:
        coordinator.save_checkpoint(step=1)
    with opened(tmp_path, part("state", live)) as coordinator:
        coordinator.load_checkpoint()
    assert all(torch.equal(live[name], tensor) for name, tensor in saved.items())
    assert most[0] <= 2 * kept
    assert not open_now


def test_a_component_that_nothing_takes_back_is_refused_before_anything_changes(tmp_path):
    with opened(tmp_path, part("a", {"w": torch.ones(2)}), part("b", {"n": 1})) as coordinator:
        coordinator.save_checkpoint(step=1)
    live = {"w": torch.zeros(2)}
    only_given = part("b", None, get_state=lambda: {"n": 2})
    coordinator = opened(tmp_path, part("a", live), only_given)
    with coordinator, pytest.raises(ConfigError, match="set_state"):
        coordinator.load_checkpoint()
    assert not live["w"].any()


def test_a_component_of_another_kind_is_skipped_when_told_so(tmp_path):
    with opened(tmp_path, part("a", {"w": torch.ones(2)}), part("b", {"n": 1})) as coordinator:
        coordinator.save_checkpoint(step=1)
    live, other = {"w": torch.zeros(2)}, [1, 2]
    with opened(tmp_path, part("a", live), part("b", other)) as coordinator:
        with pytest.raises(StateMismatchError, match="saved as a dict, live it is a list"):
            coordinator.load_checkpoint()
        assert not live["w"].any()
        report = coordinator.load_checkpoint(strict=False)
    assert (report.loaded, dict(report.skipped)) == (
        ("a",),
        {"b": "saved as a dict, live it is a list"},
    )
    assert (live["w"].tolist(), other) == ([1, 1], [1, 2])


def test_a_dtype_that_this_torch_lacks_is_named():
    with pytest.raises(ConfigError, match="dtype F4, which this torch"):
        empty_like(TensorSpec(name="w", dtype="F4", shape=(2,)))


def test_what_there_is_no_memory_for_is_named_with_its_file():
    spec = TensorSpec(name="w", dtype="U8", shape=(1 << 61,))
    record = FileRecord(
        path="m.safetensors", size_bytes=1, digest=Digest(bytes(32)), component="m", scope="",
        writer_rank=0, kind=FileKind.TENSORS,
    )  # fmt: skip
    entry = TensorEntry(spec=spec, begin=0, end=1, digest=None)
    saved = SavedTensor(
        form=LeafForm(), spec=spec, pieces=((Box.whole(spec.shape), (record, entry)),)
    )
    with pytest.raises(CkptError, match=r"tensor 'w' of m\.safetensors needs 2,305,843,009,213,69"):
        new_destination({}, saved, ("w",))
