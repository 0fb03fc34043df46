"""Any state tree <-> a JSON document and flat, named leaves. Nothing is pickled.

The law: `unflatten(flatten(x)) == x`, type for type and bit for bit, also through canonical JSON.
What JSON holds exactly stands for itself, all else is a tagged object (docs/format.md). Tensors and
arrays are leaves: the document names them, and their bytes go elsewhere. A leaf that stands in
several places is one leaf, and comes back as one object; lists and dicts come back as copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.core.leaf import Leaf, LeafAdapter, LeafForm, LeafKind, NumpyAdapter
from ckptcoord.core.treecheck import MAX_DOCUMENT_DEPTH, check_document
from ckptcoord.core.treedecode import decode_document
from ckptcoord.core.treeencode import encode_document

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.core.jsonio import JsonValue

__all__ = [
    "MAX_DOCUMENT_DEPTH",
    "MAX_STATE_BYTES",
    "Leaf",
    "LeafAdapter",
    "LeafForm",
    "LeafKind",
    "NumpyAdapter",
    "Tree",
    "flatten",
    "leaf_forms",
    "leaf_names",
    "unflatten",
]

MAX_STATE_BYTES = 256 << 20
"""Of a state document: what is larger is neither written nor read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tree:
    """A state taken apart: a JSON document, and the leaves that it names in order, each once."""

    document: JsonValue
    leaves: tuple[Leaf, ...]


def flatten(state: object, adapter: LeafAdapter, *, root: str = "") -> Tree:
    """Take a state apart. Nothing in it is changed, and tensors are not read.

    Args:
        state: the value.
        adapter: knows foreign tensors.
        root: what an error's path begins with; leaf names do not.

    Raises:
        UnsupportedStateError: something in it has no exact form; names the path to it.
    """
    document, leaves = encode_document(state, adapter, root=root)
    return Tree(document=document, leaves=leaves)


def unflatten(
    document: JsonValue, leaves: Mapping[str, object], adapter: LeafAdapter, *, path: str
) -> object:
    """Put a state together again.

    Args:
        document: as `flatten` made it; may be hostile.
        leaves: by name; for an NDARRAY an array as `Leaf.value` has it, or what `np.asarray` takes
            for one.
        adapter: knows foreign constants.
        path: what an error names.

    Raises:
        ManifestError: the document breaks the form, a leaf is missing or has another dtype, or a
            class is not loaded or has changed.
    """
    check_document(document, path=path)
    return decode_document(document, leaves, adapter.decode_atom, path=path)


def leaf_names(document: JsonValue, *, path: str) -> tuple[str, ...]:
    """The names of the leaves that a document needs, each once, in its order.

    Raises:
        ManifestError: the document breaks the form.
    """
    return tuple(check_document(document, path=path))


def leaf_forms(document: JsonValue, *, path: str) -> dict[str, LeafForm]:
    """As `leaf_names`, with what each is.

    Raises:
        ManifestError: the document breaks the form.
    """
    return check_document(document, path=path)
