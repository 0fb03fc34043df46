"""What of a snapshot is done when: at the call, or after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.dist.copying import SMALL_BYTES
from ckptcoord.dist.deferral import Sampling, is_deferrable, storage_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptcoord.dist.deferral import Name, Storage
    from ckptcoord.dist.snapshot import Leaf
    from ckptcoord.dist.staginglayout import StagingLayout

_SHARED_BYTES = 1 << 20  # of a tensor: to copy it at the call, other threads help


class Schedule:
    """Rows of a snapshot's leaves, by what is to be done with them.

    It stays the same for as long as all that it is made of does.

    Args:
        layout: of the leaves.
        leaves: in the layout's order.
        addresses: of their first bytes, if they are known.
        owned: the storages of what optimizers own, each with rows of theirs.
        chosen: which of the deferrable leaves to defer; True: all, False: none.

    Attributes:
        deferred: copied after the call.
        owners: of each of these, the rows of the optimizers' tensors in its memory.
        sampling: of these.
        learned: deferrable ones that are not deferred.
        small: flat ones, copied at the call in one go: at `small_offsets`, so many bytes as
            `small_sizes` says.
        shared: flat ones, copied at the call by several threads.
        single: all others that are copied at the call.
        digested: of these and of what is not kept, those whose digest is taken at the call.
    """

    def __init__(
        self,
        layout: StagingLayout,
        leaves: Sequence[Leaf],
        addresses: Sequence[int],
        owned: Mapping[Storage, tuple[int, ...]],
        chosen: frozenset[Name] | bool,  # noqa: FBT001
    ) -> None:
        self.layout, self.addresses, self.owned, self.chosen = layout, addresses, owned, chosen
        able = [
            row
            for row, leaf in enumerate(leaves)
            if owned and leaf.place.costly and is_deferrable(leaf.value, owned)
        ]
        names = chosen if isinstance(chosen, frozenset) else ()
        self.deferred = [row for row in able if chosen is True or leaves[row].place.name in names]
        self.learned = sorted(set(able).difference(self.deferred))
        self.owners = [owned[storage_of(leaves[row].tensor)] for row in self.deferred]
        self.sampling = Sampling([leaves[row].tensor for row in self.deferred])
        self._sort_the_rest(leaves)
        places = [layout.places[row] for row in self.small]
        self.small_offsets = [place.offset for place in places]
        self.small_sizes = [place.nbytes for place in places]

    def _sort_the_rest(self, leaves: Sequence[Leaf]) -> None:
        self.small: list[int] = []
        self.shared: list[int] = []
        self.single: list[int] = []
        self.digested: list[int] = []
        deferred = set(self.deferred)
        for row, leaf in enumerate(leaves):
            place = leaf.place
            if place.digested_live and not (row in deferred and place.costly):
                self.digested.append(row)
            if row in deferred or place.offset < 0:
                continue
            if place.flat and place.nbytes <= SMALL_BYTES:
                self.small.append(row)
            elif place.flat and place.nbytes >= _SHARED_BYTES:
                self.shared.append(row)
            else:
                self.single.append(row)
