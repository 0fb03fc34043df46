"""A component as it was saved: from one of its copies, or from all of them together (ADR 11)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptcoord.core.jsonio import JsonValue, parse_json
from ckptcoord.core.manifest import TENSOR_KINDS, FileKind
from ckptcoord.core.tree import MAX_STATE_BYTES, leaf_forms
from ckptcoord.core.treemerge import merge_documents
from ckptcoord.dist.saved import SavedTensor, saved_tensors, united_entries
from ckptcoord.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.dist.shardset import ShardSet
    from ckptcoord.repo.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """A component, opened; its tensors are not read yet.

    Attributes:
        tree: its document.
        path: of the document, for errors; of the first of several.
        tensors: those that the document names.
    """

    tree: JsonValue
    path: str
    tensors: dict[str, SavedTensor] = field(default_factory=dict)


class SavedComponent:
    """What a checkpoint has of one component.

    Args:
        repository: where.
        commit: which checkpoint.
        manifest: of it.
        shards: open files of it.
        key: the component's.
    """

    def __init__(
        self,
        repository: Repository,
        commit: Commit,
        manifest: CheckpointManifest,
        shards: ShardSet,
        key: str,
    ) -> None:
        self._repository = repository
        self._commit = commit
        self._shards = shards
        self._key = key
        self._copies: dict[str, list[FileRecord]] = {}
        for record in manifest.files:
            if record.component == key:
                self._copies.setdefault(record.scope, []).append(record)

    @property
    def labels(self) -> list[str]:
        """Of its copies, sorted."""
        return sorted(self._copies)

    def documents(self, labels: Sequence[str]) -> list[FileRecord]:
        """The state documents of these copies, sorted by path."""
        records = [record for label in labels for record in self._copies.get(label, ())]
        return sorted((r for r in records if r.kind is FileKind.STATE), key=lambda r: r.path)

    def document(self, records: Sequence[FileRecord]) -> tuple[JsonValue, str]:
        """What these documents are together, and the path of the first, for errors.

        Raises:
            MergeConflictError: the copies differ.
            ManifestError: there is none, or it breaks the form.
        """
        if not records:
            path = f"{self._commit.path}/{self._key}"
            raise ManifestError(path=path, why="has no state document in the manifest")
        # Ranks that hold parts of the same tensors say the same of them.
        trees = [self._tree(record) for record in {r.digest: r for r in records}.values()]
        path = f"{self._commit.path}/{records[0].path}"
        return merge_documents(trees, root=self._key), path

    def open(self, labels: Sequence[str], tree: JsonValue, path: str) -> SavedState:
        """The tensors that a document names, from these copies together.

        Raises:
            MergeConflictError: the copies differ.
            ManifestError: something that should be there is not.
        """
        entries = united_entries(
            (
                self._shards.sources(r for r in self._copies.get(one, ()) if r.kind in TENSOR_KINDS)
                for one in labels
            ),
            root=self._key,
        )
        return SavedState(tree=tree, path=path, tensors=saved_tensors(tree, entries, path=path))

    def _tree(self, record: FileRecord) -> JsonValue:
        path = f"{self._commit.path}/{record.path}"
        data = self._repository.read_document(self._commit, record)
        document = parse_json(data, path=path, max_bytes=MAX_STATE_BYTES)
        if not isinstance(document, dict) or document.get("component") != self._key:
            raise ManifestError(path=path, why=f"is not the state of {self._key!r}")
        if document.get("format_version") != 1 or "tree" not in document:
            raise ManifestError(path=path, why="has no tree, or another format version")
        leaf_forms(document["tree"], path=path)  # merging takes a sound one for granted
        return document["tree"]
