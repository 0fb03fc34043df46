"""A checkpoint's components as one process sees them: whole tensors, however many ranks saved them.

Nothing is read when they are opened but documents and headers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from ckptcoord.core.box import Box
from ckptcoord.core.leaf import LeafKind
from ckptcoord.core.treemerge import MergeConflictError
from ckptcoord.dist.capture import TORCH_DTYPES, tensor_bytes
from ckptcoord.dist.destinations import wants_for
from ckptcoord.dist.restore import build
from ckptcoord.dist.shardset import ShardSet
from ckptcoord.dist.union import SavedComponent, SavedState
from ckptcoord.errors import ConfigError
from ckptcoord.formats.casting import cast_spec, check_cast
from ckptcoord.formats.spill import scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType

    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.core.entries import Commit
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.formats.spill import Spill
    from ckptcoord.repo.repository import Repository

_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeTensor:
    """A tensor of a checkpoint, and what it is to become.

    Attributes:
        saved: as it is.
        spec: what it is read as.
    """

    saved: SavedTensor
    spec: TensorSpec

    @property
    def is_cast(self) -> bool:
        """Whether it is rounded, or widened."""
        return self.spec.dtype != self.saved.spec.dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeState:
    """A component's state, its tensors yet to be read.

    Attributes:
        state: as it was saved.
        tensors: by name; each stands once, wherever the state has it.
    """

    state: SavedState
    tensors: Mapping[str, WholeTensor]

    @property
    def beside_tensors(self) -> tuple[str, ...]:
        """The paths of what is no tensor, in the order of the state."""
        return tuple(_beside_tensors(self.state.tree, ()))

    def build(self, spill: Spill, read: Callable[[WholeTensor, torch.Tensor], None]) -> object:
        """The state with its tensors, in `spill`."""
        leaves = {}
        for name, tensor in self.tensors.items():
            leaves[name] = spill.take(TORCH_DTYPES[tensor.spec.dtype], tensor.spec.shape)
            read(tensor, leaves[name])
        return build(self.state.tree, leaves, self.state.path)


@dataclass(slots=True, kw_only=True)
class Losses:
    """What casts have made infinite: how many elements, by tensor."""

    overflowed: dict[str, int] = field(default_factory=dict)


class WholeCheckpoint:
    """An open checkpoint; a context manager.

    Args:
        repository: where.
        commit: which.

    Raises:
        CorruptError: it is damaged.
    """

    def __init__(self, repository: Repository, commit: Commit) -> None:
        self.repository, self.commit = repository, commit
        self.manifest = repository.manifest(commit)
        self.losses = Losses()
        self._shards = ShardSet(repository, commit)
        self._shards.vouch(self.manifest)

    def states(self, key: str, dtype: str | None = None) -> dict[str, WholeState]:
        """What all copies of a component are together, under ""; where they differ, by label.

        Raises:
            ConfigError: there is no such component, or only parts of its tensors are there.
            CorruptError: it is damaged.
        """
        there = self._component(key)
        try:
            return {"": self._together(there, key, there.labels, dtype)}
        except MergeConflictError:
            pass
        try:
            return {label: self._together(there, key, [label], dtype) for label in there.labels}
        except MergeConflictError as error:
            raise self._refused(f"{key!r} has copies whose parts differ: {error}") from error

    def state(self, key: str, dtype: str | None = None) -> WholeState:
        """What all copies of a component are together.

        Raises:
            ConfigError: as `states`; or the copies differ.
            CorruptError: it is damaged.
        """
        there = self._component(key)
        try:
            return self._together(there, key, there.labels, dtype)
        except MergeConflictError as error:
            raise self._refused(f"{key!r} is no one state, its copies differ: {error}") from error

    def read(self, tensor: WholeTensor, out: torch.Tensor) -> None:
        """Fill a tensor, every byte against its digest, every cast against its law.

        Raises:
            CorruptError, StorageError: it cannot be.
        """
        if not tensor.is_cast:
            self._read(tensor.saved, out)
            return
        wide = scratch(tensor.saved.spec)
        self._read(tensor.saved, wide)
        out.copy_(wide)
        spec = tensor.saved.spec
        lost = check_cast(tensor_bytes(wide), spec, tensor_bytes(out), tensor.spec.dtype)
        if lost:
            self.losses.overflowed[spec.name] = lost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shards.__exit__(exc_type, exc, traceback)

    def _component(self, key: str) -> SavedComponent:
        known = self.manifest.components
        if key not in known:
            raise self._refused(f"there is no {key[:80]!r}, but {', '.join(known) or 'nothing'}")
        return SavedComponent(self.repository, self.commit, self.manifest, self._shards, key)

    def _together(
        self, there: SavedComponent, key: str, labels: list[str], dtype: str | None
    ) -> WholeState:
        tree, path = there.document(there.documents(labels))
        state = there.open(labels, tree, path)
        for name, saved in state.tensors.items():
            if not saved.has(Box.whole(saved.spec.shape)):
                raise self._refused(f"only a part of {key}.{name} is there")
            if saved.spec.dtype not in TORCH_DTYPES:
                raise self._refused(f"this torch has no {saved.spec.dtype}, as {key}.{name} is")
        tensors = {
            name: WholeTensor(
                saved=saved,
                # numpy's arrays are no weights
                spec=cast_spec(saved.spec, dtype if saved.kind is LeafKind.TENSOR else None),
            )
            for name, saved in state.tensors.items()
        }
        return WholeState(state=state, tensors=tensors)

    def _read(self, saved: SavedTensor, out: torch.Tensor) -> None:
        whole = Box.whole(saved.spec.shape)
        self._shards.read(wants_for(saved, [(whole, out)]), threads=_THREADS)

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(field="component", why=f"{self.commit.checkpoint_id.ref}: {why}")


def _beside_tensors(node: object, path: tuple[str, ...]) -> Iterator[str]:
    """What a document has beside tensors (docs/format.md)."""
    if isinstance(node, dict) and node.get("$") in ("tensor", "sharded"):
        return
    pairs: Iterable[tuple[object, object]] = ()
    if isinstance(node, list):
        pairs = enumerate(node)
    elif isinstance(node, dict) and isinstance(node.get("items"), list) and "$" in node:
        pairs = node["items"] if "dict" in str(node["$"]).lower() else enumerate(node["items"])
    elif isinstance(node, dict) and "$" not in node:
        pairs = [(key, value) for key, value in node.items() if not key.startswith("$")]
    else:
        yield ".".join(path)
    for key, value in pairs:
        yield from _beside_tensors(value, (*path, str(key)))


def without_numpy(value: object) -> object:
    """The same with tensors for arrays, over the same memory, and Python's numbers for numpy's."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = without_numpy(item)
        return value
    if isinstance(value, list):
        value[:] = map(without_numpy, value)
        return value
    if type(value) is tuple:
        return tuple(map(without_numpy, value))
    return value
