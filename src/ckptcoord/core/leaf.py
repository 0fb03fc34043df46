"""A leaf of a state tree, and what the tree has to be told of a library's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable


class LeafKind(StrEnum):
    """What a leaf comes back as: the adapter's tensor, or a numpy array."""

    TENSOR = "tensor"
    NDARRAY = "ndarray"


# Not frozen: one is made of every tensor in every save, while training waits, and freezing it would
# take three times as long.
@dataclass(slots=True, kw_only=True, eq=False)
class Leaf:
    """One tensor or array.

    Attributes:
        name: its name in the component (see `treenames`).
        value: TENSOR: the very object that the adapter claimed. NDARRAY: a row-major array of
            bool, int8 to int64, uint8 to uint64, float16 to float64, complex64 or complex128 in
            the machine's byte order; the live memory itself where it already is that. The
            document knows the dtype that the trainer has.
        kind: which of them.
    """

    name: str
    value: object
    kind: LeafKind = LeafKind.TENSOR


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafForm:
    """What a document says of a leaf.

    Attributes:
        dtype: an array's; None of a tensor.
        shape: of a tensor that is in pieces, as a whole; None of one that is not.
    """

    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def kind(self) -> LeafKind:
        """What it comes back as."""
        return LeafKind.TENSOR if self.dtype is None else LeafKind.NDARRAY


class LeafAdapter(Protocol):
    """What the tree has to be told of a library's own types.

    numpy's arrays and scalars are the tree's own business: an adapter need not know them.
    """

    def is_leaf(self, value: object) -> bool:
        """Whether it is one of the library's tensors."""
        ...

    def identity(self, value: object) -> Hashable | None:
        """Equal for tensors over the same elements, which are tied; None: tied to itself only."""
        ...

    def global_shape(self, value: object) -> tuple[int, ...] | None:
        """Of a tensor that is in pieces on several ranks; None of one that is here as a whole."""
        ...

    def encode_atom(self, value: object) -> tuple[str, str] | None:
        """Kind and text of a small constant (`torch.dtype`, `bfloat16`); None for all else."""
        ...

    def decode_atom(self, kind: str, text: str) -> object:
        """What `encode_atom` wrote; ValueError for anything else."""
        ...


class NumpyAdapter:
    """The adapter of no library: numpy arrays are the only leaves."""

    def is_leaf(self, value: object) -> bool:
        """Never: the tree itself takes care of numpy."""
        return False

    def identity(self, value: object) -> Hashable | None:
        """None."""
        return None

    def global_shape(self, value: object) -> tuple[int, ...] | None:
        """None."""
        return None

    def encode_atom(self, value: object) -> tuple[str, str] | None:
        """None."""
        return None

    def decode_atom(self, kind: str, text: str) -> object:
        """Always a ValueError."""
        raise ValueError(f"holds a {kind[:80]}, which numpy does not have")
