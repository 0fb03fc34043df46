"""Which tensors of a save may be others of it: equal ones, or bf16 parameters of an fp32 master."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ckptcoord.codec.recipe import CAST_FROM
from ckptcoord.codec.tensorspec import ITEM_BYTES, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

_HEAD_ELEMENTS = 256
_MOST_CANDIDATES = 8  # many tensors of a form may begin alike, as with a row of zeros
_LEAST_BYTES = 4096  # of a tensor for which it is worth to look whether another one equals it
Place: TypeAlias = "tuple[str, str, Callable[[], NDArray[np.uint8]]]"
"""Where a tensor is: its file in this save, its name there, and what gives its bytes."""
_Key: TypeAlias = "tuple[str, tuple[int, ...], bytes]"  # dtype, shape, first elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor of this save.

    Attributes:
        file: that it will be in.
        head: gives the bytes of so many of its first elements.
        read: gives all.
    """

    file: str
    spec: TensorSpec
    head: Callable[[int], NDArray[np.uint8]]
    read: Callable[[], NDArray[np.uint8]]


class Casts:
    """Finds candidates by their first elements: those of a wide tensor, rounded, are its cast's.

    Args:
        held: all tensors of the save that this process has.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        self._wide: dict[_Key, list[Place]] = {}
        self._narrow = {
            (one.spec.dtype, one.spec.shape)
            for one in held
            if one.spec.dtype in CAST_FROM and one.spec.nbytes
        }
        for one in held:
            self._add(one)

    def find(self, spec: TensorSpec, head: Callable[[int], NDArray[np.uint8]]) -> Sequence[Place]:
        """What a tensor may be a cast of."""
        if not self._wide or (spec.dtype, spec.shape) not in self._narrow:
            return ()
        return self._wide.get((spec.dtype, spec.shape, head(_HEAD_ELEMENTS).tobytes()), ())

    def _add(self, one: Held) -> None:
        from ckptcoord.codec.cast import cast  # late: numba takes a second

        spec = one.spec
        for narrow, wide in CAST_FROM.items():
            if spec.dtype == wide and (narrow, spec.shape) in self._narrow:
                head = one.head(_HEAD_ELEMENTS)
                rounded = np.empty(head.nbytes // ITEM_BYTES[wide] * ITEM_BYTES[narrow], np.uint8)
                cast(head, wide, rounded, narrow)
                key = narrow, spec.shape, rounded.tobytes()
                found = self._wide.setdefault(key, [])
                if len(found) < _MOST_CANDIDATES:
                    found.append((one.file, spec.name, one.read))


class Equals:
    """Finds candidates for equal bytes: of one dtype and shape, with the same first elements.

    Args:
        held: what may be named, in an order that all ranks agree on. A tensor is led to an earlier
            one only, so that no two name each other.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        forms = Counter(
            (one.spec.dtype, one.spec.shape) for one in held if one.spec.nbytes >= _LEAST_BYTES
        )
        self._forms = {form for form, count in forms.items() if count > 1}
        self._alike: dict[_Key, list[Place]] = {}
        self._before: dict[tuple[str, str], tuple[Place, ...]] = {}
        for one in held:
            spec = one.spec
            if (spec.dtype, spec.shape) in self._forms:
                key = spec.dtype, spec.shape, one.head(_HEAD_ELEMENTS).tobytes()
                alike = self._alike.setdefault(key, [])
                self._before[one.file, spec.name] = tuple(alike)
                if len(alike) < _MOST_CANDIDATES:
                    alike.append((one.file, spec.name, one.read))

    def find(
        self, file: str, spec: TensorSpec, head: Callable[[int], NDArray[np.uint8]]
    ) -> Sequence[Place]:
        """The first tensors that may equal one of a file, and come before it."""
        if (spec.dtype, spec.shape) not in self._forms:
            return ()
        found = self._before.get((file, spec.name))
        if found is None:  # it may not be named itself
            return self._alike.get((spec.dtype, spec.shape, head(_HEAD_ELEMENTS).tobytes()), ())
        return found
