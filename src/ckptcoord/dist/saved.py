"""What a checkpoint has of a component: its document, and every tensor as saved pieces (ADR 11)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ckptcoord.core.box import Box, covers_once, parse_piece_name
from ckptcoord.core.tree import leaf_forms
from ckptcoord.core.treemerge import MergeConflictError
from ckptcoord.errors import ConfigError, ManifestError
from ckptcoord.repo.shards import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.leaf import LeafForm, LeafKind
    from ckptcoord.dist.shardset import Source

_UNKNOWN_DTYPE = "U8"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """One tensor of a component.

    Attributes:
        form: what the document says of it.
        spec: of the whole tensor; where no piece of it is known, its dtype says nothing.
        pieces: the boxes that are there, each with the entry that holds it.
        bounds: where they begin and stop, int64 of shape (2, P, D): P pieces, D dimensions.
    """

    form: LeafForm
    spec: TensorSpec
    pieces: tuple[tuple[Box, Source], ...]
    bounds: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        boxes = [box for box, _ in self.pieces]
        bounds = np.array([[b.offset for b in boxes], [b.size for b in boxes]], np.int64)
        bounds = bounds.reshape(2, len(boxes), len(self.spec.shape))
        bounds[1] += bounds[0]
        object.__setattr__(self, "bounds", bounds)

    @property
    def kind(self) -> LeafKind:
        """What it comes back as."""
        return self.form.kind

    @property
    def file(self) -> str:
        """Which one has it, or its first piece; empty where none is known."""
        return self.pieces[0][1][0].path if self.pieces else ""

    def meeting(self, box: Box) -> list[int]:
        """Which of the pieces have elements of a box."""
        if len(self.pieces) == 1 and self.pieces[0][0] == box:
            return [0] if box.volume else []
        begin, stop = np.array([box.offset, box.stop], np.int64)
        common = np.minimum(self.bounds[1], stop) > np.maximum(self.bounds[0], begin)
        return [int(index) for index in np.flatnonzero(common.all(axis=1))]

    def has(self, box: Box) -> bool:
        """Whether the pieces cover a box, each element once."""
        return covers_once([self.pieces[index][0] for index in self.meeting(box)], box)


def saved_tensors(
    tree: JsonValue, entries: Mapping[str, Source], *, path: str
) -> dict[str, SavedTensor]:
    """The tensors that a document names, in its order.

    Args:
        tree: the document.
        entries: what shards hold, by name.
        path: of the document, for errors.

    Raises:
        ManifestError: the document breaks the form, a whole tensor is not there, or a piece is no
            part of its tensor.
    """
    forms = leaf_forms(tree, path=path)
    parts = _parts(forms, entries)
    found = {}
    for name, form in forms.items():
        if form.shape is not None:
            found[name] = _in_pieces(name, form, parts.get(name, []), path)
        elif name in entries:
            spec = entries[name][1].spec
            whole = ((Box.whole(spec.shape), entries[name]),)
            found[name] = SavedTensor(form=form, spec=spec, pieces=whole)
        else:
            raise ManifestError(path=path, why=f"names {name!r}, which no shard holds")
    return found


def united_entries(copies: Iterable[Mapping[str, Source]], *, root: str) -> dict[str, Source]:
    """What several copies hold together, by name.

    Raises:
        MergeConflictError: two of them hold different bytes by one name.
    """
    found: dict[str, Source] = {}
    for copy in copies:
        for name, source in copy.items():
            known = found.setdefault(name, source)
            if known is not source and not _same(known, source):
                raise MergeConflictError(f"{root}.{name}")
    return found


def _same(one: Source, other: Source) -> bool:
    (_, a), (_, b) = one, other
    return a.spec == b.spec and a.digest is not None and a.digest == b.digest


def _parts(
    forms: Mapping[str, LeafForm], entries: Mapping[str, Source]
) -> dict[str, list[tuple[Box, Source]]]:
    """The pieces of each tensor that is in pieces."""
    found: dict[str, list[tuple[Box, Source]]] = {}
    for entry, source in entries.items():
        # A whole tensor may be called as a piece would be.
        piece = None if entry in forms else parse_piece_name(entry)
        if piece is not None and piece[0] in forms and forms[piece[0]].shape is not None:
            found.setdefault(piece[0], []).append((piece[1], source))
    return found


def _in_pieces(
    name: str, form: LeafForm, pieces: Sequence[tuple[Box, Source]], path: str
) -> SavedTensor:
    shape = form.shape or ()
    dtypes = {source[1].spec.dtype for _, source in pieces}
    for box, (record, entry) in pieces:
        if not box.within(shape) or entry.spec.shape != box.size or len(dtypes) > 1:
            raise ManifestError(
                path=path,
                why=f"names {name!r} of shape {list(shape)}, of which {entry.spec.name!r} in "
                f"{record.path} is no part",
            )
    try:
        spec = TensorSpec(name=name, dtype=next(iter(dtypes), _UNKNOWN_DTYPE), shape=shape)
    except ConfigError as error:
        raise ManifestError(path=path, why=f"names what cannot be: {error}") from error
    return SavedTensor(form=form, spec=spec, pieces=tuple(pieces))
