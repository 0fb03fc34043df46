"""Which elements of a DTensor a rank holds, by the arithmetic that torch's own splits follow."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ckptcoord import SharingPattern, StateComponent
from ckptcoord.core.box import Box, covers_once
from ckptcoord.dist.deferral import Owners, Watch, storage_of
from ckptcoord.dist.sharded import _indices, _parts, _Place, layout_of

SIZES = st.integers(0, 13)
CUTS = st.lists(st.tuples(st.integers(0, 1), st.integers(2, 4), st.integers(1, 4)), max_size=3)


def held_as_torch_splits(full, cuts, places):
    """What a rank has after torch's own splits, one mesh dimension after the other."""
    for (dim, count, factor), place in zip(cuts, places, strict=True):
        kind = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
        parts, _ = kind._split_tensor(full, count, with_padding=False)
        full = parts[place]
    return full


def pieces_of(full, cuts, places, held, *, outside_in=True):
    told = tuple(
        (dim, n, place, factor) for (dim, n, factor), place in zip(cuts, places, strict=True)
    )
    runs = _indices(tuple(full.shape), told, outside_in=outside_in)
    return _parts(held, _Place(runs=runs, sharded=True))


@given(SIZES, SIZES, CUTS)
def test_the_pieces_of_all_ranks_are_what_torch_splits_off_and_cover_the_tensor_once(a, b, cuts):
    full = torch.arange(a * b).reshape(a, b)
    found = []
    for places in product(*(range(count) for _, count, _ in cuts)):
        held = held_as_torch_splits(full, cuts, places)
        pieces = pieces_of(full, cuts, places, held)
        assert sum(box.volume for box, _ in pieces) == held.numel()
        for box, tensor in pieces:
            assert torch.equal(tensor, full[box.seen_from(Box.whole(full.shape))])
        found += [box for box, _ in pieces if box.volume]
    assert covers_once(found, Box.whole(full.shape))


@given(SIZES, st.integers(2, 4), st.integers(2, 4))
def test_fsdp_over_tensor_parallelism_cuts_by_columns_first_also_where_sizes_are_uneven(n, dp, tp):
    full = torch.arange(n * 2).reshape(n, 2)
    cuts = [(0, dp, tp), (0, tp, 1)]
    found = []
    for d, t in product(range(dp), range(tp)):
        mine, _ = Shard(0)._split_tensor(full, tp, with_padding=False)
        held, _ = Shard(0)._split_tensor(mine[t], dp, with_padding=False)
        pieces = pieces_of(full, cuts, (d, t), held[d], outside_in=False)
        for box, tensor in pieces:
            assert torch.equal(tensor, full[box.seen_from(Box.whole(full.shape))])
        found += [box for box, _ in pieces if box.volume]
        # Where torch's description gives the same shape, it gives the same place.
        as_torch = pieces_of(full, cuts, (d, t), held_as_torch_splits(full, cuts, (d, t)))
        if as_torch and pieces and len(as_torch) == 1 and as_torch[0][0].size == pieces[0][0].size:
            assert as_torch[0][0] == pieces[0][0]
    assert covers_once(found, Box.whole(full.shape))


@pytest.mark.parametrize("way", ["dtensor", "local part"])
def test_a_change_to_a_few_elements_of_a_deferred_dtensor_is_found(one_rank_mesh, way):
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(64, 1024), one_rank_mesh, [Shard(0)]))
    part = StateComponent("o", torch.optim.SGD([weight]), SharingPattern.PER_RANK)
    owned = Owners([part]).find()
    live = layout_of(weight).pieces[0][1]
    owners = [owned.tensors[row] for row in owned.rows[storage_of(live)]]
    watch = Watch([live], owners, [0] * len(owners))
    with torch.no_grad():
        changed = weight if way == "dtensor" else weight.to_local()
        changed[:, 9:11].add_(1)  # between samples
    watch.look()
    assert watch.moved() == {0}


@pytest.fixture
def one_rank_mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
