"""What is in a checkpoint: its components, their state and tensors by name. Without torch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING

from ckptcoord.core.box import Box
from ckptcoord.core.leaf import LeafForm
from ckptcoord.core.manifest import TENSOR_KINDS
from ckptcoord.core.treemerge import MergeConflictError
from ckptcoord.dist.saved import SavedTensor, united_entries
from ckptcoord.dist.shardset import ShardSet
from ckptcoord.dist.union import SavedComponent, SavedState
from ckptcoord.errors import ConfigError, TensorNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.repo.repository import Repository

_SHOWN = 3
_COMPARED_NAMES = 20_000  # difflib takes some 10 us for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The state of a component: all copies together, or of those that differ one.

    Attributes:
        label: of that one; empty where they are together.
        prefix: what the full names of its tensors begin with: `model`, `rng.rank00002`.
        state: its document and tensors.
        has_document: without one, the state is what its files hold, by their entries' names.
    """

    label: str
    prefix: str
    state: SavedState
    has_document: bool = True

    @property
    def tensors(self) -> dict[str, SavedTensor]:
        """By full name."""
        return {f"{self.prefix}.{name}": one for name, one in self.state.tensors.items()}


class Contents:
    """What a checkpoint holds; documents and headers are read when first asked for, then kept.

    Args:
        repository: where.
        commit: which checkpoint.
    """

    def __init__(self, repository: Repository, commit: Commit) -> None:
        self.repository = repository
        self.commit = commit
        self._copies: dict[str, tuple[Copy, ...]] = {}

    @cached_property
    def manifest(self) -> CheckpointManifest:
        """Its manifest.

        Raises:
            CorruptError: missing, changed or malformed.
        """
        return self.repository.manifest(self.commit)

    def shards(self) -> ShardSet:
        """Its files, to be read from and closed by the caller."""
        shards = ShardSet(self.repository, self.commit)
        shards.vouch(self.manifest)
        return shards

    def copies(self, key: str, shards: ShardSet | None = None) -> tuple[Copy, ...]:
        """The state of a component: one of all its copies, or where these differ each one's.

        Args:
            key: the component's.
            shards: the checkpoint's files, where the caller has them open.

        Raises:
            ConfigError: there is no such component; the nearest are named.
            CorruptError: a document or header is damaged.
        """
        if key not in self._copies:
            self._check(key)
            with self._opened(shards) as there:
                merged = self._merged(key, there)
                self._copies[key] = self._by_label(key, there) if merged is None else (merged,)
        return self._copies[key]

    def by_label(self, key: str, shards: ShardSet | None = None) -> tuple[Copy, ...]:
        """The state of each copy of a component, whether they differ or not.

        Args, Raises:
            as `copies`.
        """
        self._check(key)
        with self._opened(shards) as there:
            return self._by_label(key, there)

    def tensors(self, key: str) -> dict[str, SavedTensor]:
        """The tensors of a component by full name.

        Raises:
            as `copies`.
        """
        return {name: one for copy in self.copies(key) for name, one in copy.tensors.items()}

    def find(self, name: str) -> SavedTensor:
        """The tensor of a full name; only its component's documents and headers are read.

        Raises:
            TensorNotFoundError: there is none; the nearest are named.
            CorruptError: a document or header is damaged.
        """
        key = name.partition(".")[0]
        if key in self.manifest.components:
            found = self.tensors(key).get(name)
            if found is not None:
                return found
        raise TensorNotFoundError(
            checkpoint=self.commit.checkpoint_id.ref, name=name, nearest=self._nearest(name)
        )

    def _opened(self, shards: ShardSet | None) -> AbstractContextManager[ShardSet]:
        return self.shards() if shards is None else nullcontext(shards)

    def _check(self, key: str) -> None:
        if key not in self.manifest.components:
            ref, there = self.commit.checkpoint_id.ref, ", ".join(self.manifest.components)
            raise ConfigError(
                field="component", why=f"{key[:80]!r} is not in {ref}, which has: {there or 'none'}"
            )

    def _nearest(self, name: str) -> tuple[str, ...]:
        """Of its component, where that is there, else of all."""
        keys = tuple(self.manifest.components)
        asked = name[:1000].partition(".")[0]
        names = [one for key in ((asked,) if asked in keys else keys) for one in self.tensors(key)]
        near = get_close_matches(name[:1000], names[:_COMPARED_NAMES], n=_SHOWN)
        return tuple(near or names[:_SHOWN])

    def _component(self, key: str, shards: ShardSet) -> SavedComponent:
        return SavedComponent(self.repository, self.commit, self.manifest, shards, key)

    def _merged(self, key: str, shards: ShardSet) -> Copy | None:
        there = self._component(key, shards)
        labels = there.labels
        documents = there.documents(labels)
        if not documents:  # nobody but a foreign writer leaves them out
            return self._of_entries(key, shards)
        try:
            state = _state(there, labels, documents)
        except MergeConflictError:
            return None
        return Copy(label="", prefix=key, state=state)

    def _by_label(self, key: str, shards: ShardSet) -> tuple[Copy, ...]:
        there = self._component(key, shards)
        found: list[Copy] = []
        for label in there.labels:
            documents = there.documents([label])
            for one in [documents] if len(documents) == 1 else [[d] for d in documents]:
                # The members of some hold different things.
                name = label if len(documents) == 1 else one[0].path
                state = _state(there, [label], one)
                found.append(Copy(label=name, prefix=f"{key}.{name}" if name else key, state=state))
        return tuple(found)

    def _of_entries(self, key: str, shards: ShardSet) -> Copy:
        """Of a component without a document: what its files hold."""
        entries = united_entries(
            (
                shards.sources([record])
                for record in self.manifest.files
                if record.component == key and record.kind in TENSOR_KINDS
            ),
            root=key,
        )
        tensors = {
            name: SavedTensor(
                form=LeafForm(),
                spec=source[1].spec,
                pieces=((Box.whole(source[1].spec.shape), source),),
            )
            for name, source in entries.items()
        }
        state = SavedState(tree={}, path=f"{self.commit.path}/{key}", tensors=tensors)
        return Copy(label="", prefix=key, state=state, has_document=False)


def _state(
    there: SavedComponent, labels: Sequence[str], documents: Sequence[FileRecord]
) -> SavedState:
    tree, path = there.document(documents)
    return there.open(labels, tree, path)
