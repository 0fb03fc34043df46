"""What of a snapshot is done when: at the call, or after it."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from ckptcoord.dist.copying import SMALL_BYTES, Copies
from ckptcoord.dist.deferral import Sampling, is_deferrable, storage_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from ckptcoord.dist.deferral import Name, Owned, Storage
    from ckptcoord.dist.staginglayout import StagingLayout

_SHARED_BYTES = 1 << 20  # of a tensor: to copy it at the call, other threads help
Live: TypeAlias = "Sequence[torch.Tensor | np.ndarray]"


class Schedule:
    """Rows of a layout's places, by what is to be done with the tensors.

    Args:
        layout: of the tensors.
        live: they, in the layout's order. None is kept.
        addresses: of their first bytes; none: they are not known.
        owned: what optimizers own; None: nothing is to be deferred.
        chosen: which of the deferrable ones to defer; True: all, False: none.

    Attributes:
        deferred: copied after the call.
        owners: rows of the optimizers' tensors in the memory of these.
        owner_of: of each of the owners, the index in `deferred`.
        sampling: of these.
        learned: deferrable ones that are not deferred.
        small: copies made at the call in one go.
        shared: flat ones, copied at the call by several threads.
        single: all others that are copied at the call.
        digested: those whose digest is taken of the live tensor at the call.
        busy: all rows of which there is more to do than a small copy.
    """

    def __init__(
        self,
        layout: StagingLayout,
        live: Live,
        addresses: Sequence[int],
        owned: Owned | None,
        chosen: frozenset[Name] | bool,  # noqa: FBT001
    ) -> None:
        rows = None if owned is None else owned.rows
        self._made_of = (layout, addresses, rows, chosen)
        self.deferred: list[int] = []
        self.learned: list[int] = []
        self.shared: list[int] = []
        self.single: list[int] = []
        self.digested: list[int] = []
        self.small = Copies()
        for row, value in enumerate(live):
            if rows and layout.places[row].costly and is_deferrable(value, rows):
                defer = chosen if isinstance(chosen, bool) else layout.places[row].name in chosen
                (self.deferred if defer else self.learned).append(row)
        self._watch(live, rows or {})
        self._copy_and_digest(layout, live)
        self.busy = sorted(
            {*self.deferred, *self.learned, *self.shared, *self.single, *self.digested}
        )

    def is_of(
        self,
        layout: StagingLayout,
        live: Live,
        addresses: Sequence[int],
        owned: Owned | None,
        chosen: frozenset[Name] | bool,  # noqa: FBT001
    ) -> bool:
        """Whether it would come out the same of these, as far as that can be told at once."""
        before, known, rows, choice = self._made_of
        return (
            before is layout
            and rows is (None if owned is None else owned.rows)
            and choice is chosen
            and bool(known)
            and known == addresses
            # The one thing about a deferrable tensor that the rest does not say.
            and not any(map(torch.Tensor.is_inference, tensors_of(live, self.deferred)))
        )

    def _watch(self, live: Live, owned: Mapping[Storage, tuple[int, ...]]) -> None:
        tensors = tensors_of(live, self.deferred)
        owners = [owned[storage_of(tensor)] for tensor in tensors]
        self.owners = list(chain.from_iterable(owners))
        self.owner_of = [index for index, rows in enumerate(owners) for _ in rows]
        self.sampling = Sampling(tensors)

    def _copy_and_digest(self, layout: StagingLayout, live: Live) -> None:
        deferred = set(self.deferred)
        for row, place in enumerate(layout.places):
            if place.digested_live and not (row in deferred and place.costly):
                self.digested.append(row)
            if row in deferred or place.offset < 0:
                continue
            if not place.flat or SMALL_BYTES < place.nbytes < _SHARED_BYTES:
                self.single.append(row)
            elif place.nbytes > SMALL_BYTES:
                self.shared.append(row)
            else:
                self.small.add(tensors_of(live, [row])[0], place.offset)


def tensors_of(live: Live, rows: Sequence[int]) -> list[torch.Tensor]:
    """Those of some rows, which are torch's."""
    tensors = [live[row] for row in rows]
    assert all(isinstance(one, torch.Tensor) for one in tensors), "no array is deferred, or flat"
    return cast("list[torch.Tensor]", tensors)
