"""A checkpoint's state for tools that want all of it at once: its tensors are in a spill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.tree import flatten
from ckptcoord.dist.capture import TorchAdapter, tensor_bytes
from ckptcoord.errors import CorruptError, DigestMismatchError
from ckptcoord.formats.spill import Spill
from ckptcoord.formats.whole import without_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ckptcoord.core.digest import Digest
    from ckptcoord.core.tree import Tree
    from ckptcoord.formats.whole import WholeCheckpoint, WholeState, WholeTensor


class Spilled:
    """Components of a checkpoint as one nested state.

    Attributes:
        state: `{component: ...}`; of one component alone, its own state. Where a component's copies
            differ, they stand in it by label (`rank00002`).

    Args:
        source: the checkpoint.
        components: by key, as `WholeCheckpoint.states` gives them.
        alone: there is one component, and the state is its own.
        folder: on whose file system the spill is.
        advance: told of the bytes that were read.

    Raises:
        CorruptError, StorageError: it cannot be read, or there is no room for it.
        CkptError: its state cannot be made again.
    """

    def __init__(
        self,
        source: WholeCheckpoint,
        components: Mapping[str, Mapping[str, WholeState]],
        *,
        alone: bool,
        folder: Path,
        advance: Callable[[int], None],
    ) -> None:
        self._source, self._advance = source, advance
        states = [state for copies in components.values() for state in copies.values()]
        self._spill = Spill(folder, (t.spec for one in states for t in one.tensors.values()))
        built = {key: self._copies(copies) for key, copies in components.items()}
        self.state: object = next(iter(built.values())) if alone else built
        tree = self._tree(self.state)
        self._document = tree.document
        self._digests = _digests(tree)

    def clear(self) -> None:
        """Make all of its tensors zeros, to be filled again by what reads them back."""
        self._spill.clear()

    def check(self, found: object, path: str) -> None:
        """Hold what was read back to what was written.

        Raises:
            CorruptError: it differs.
        """
        tree = self._tree(found)
        if tree.document != self._document:
            raise CorruptError(path=path, why="is not the state that was written to it")
        for name, digest in _digests(tree).items():
            if digest != self._digests[name]:
                raise DigestMismatchError(
                    path=path, tensor=name, expected=str(self._digests[name]), found=str(digest)
                )

    def _copies(self, copies: Mapping[str, WholeState]) -> object:
        built = {
            label: without_numpy(one.build(self._spill, self._read))
            for label, one in copies.items()
        }
        return built.get("", built)

    def _read(self, tensor: WholeTensor, out: torch.Tensor) -> None:
        self._source.read(tensor, out)
        self._advance(tensor.spec.nbytes)

    def _tree(self, state: object) -> Tree:
        return flatten(state, TorchAdapter(), root=self._source.commit.checkpoint_id.ref)


def _digests(tree: Tree) -> dict[str, Digest]:
    """Of each tensor, by its name in the state."""
    digests = {}
    for leaf in tree.leaves:
        assert isinstance(leaf.value, torch.Tensor), "there are no arrays in it"
        digests[leaf.name] = blake3_digest(tensor_bytes(leaf.value).data)
    return digests
