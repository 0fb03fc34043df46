"""What this rank knows of bytes that are stored already, and so need not be stored again."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.codec.digest import xxh3
from ckptcoord.codec.recipe import SourceFile
from ckptcoord.core.digest import Digest
from ckptcoord.core.fields import Fields
from ckptcoord.core.manifest import TENSOR_KINDS
from ckptcoord.errors import BaseUnreadableError, CorruptError, StorageError
from ckptcoord.repo.deltas import open_tensors
from ckptcoord.repo.deltawriting import Home

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.manifest import CheckpointManifest
    from ckptcoord.repo.deltawriting import WrittenDelta
    from ckptcoord.repo.repository import Repository
    from ckptcoord.repo.shards import TensorSpec, WrittenFile

Key: TypeAlias = tuple[str, str, str]
"""Component, label of the copy, name of the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the deltas of one save are against.

    Attributes:
        ref: of the checkpoint.
        path: its folder.
        digest: of its manifest.
        folders: those whose tensors may be named: it, the parent, and what that needs.
    """

    ref: str
    path: str
    digest: Digest
    folders: tuple[str, ...]

    def to_json(self) -> JsonValue:
        """For the message that all ranks read."""
        return {
            "ref": self.ref,
            "path": self.path,
            "digest": str(self.digest),
            "folders": list(self.folders),
        }

    @classmethod
    def from_json(cls, value: JsonValue) -> Base:
        """What `to_json` wrote."""
        with Fields(value, path="the base of a save") as fields:
            return cls(
                ref=fields.text("ref"),
                path=fields.text("path"),
                digest=Digest.parse(fields.text("digest")),
                folders=fields.texts("folders"),
            )


@dataclass(slots=True)
class Bases:
    """The homes of tensors by checkpoint, and fingerprints of the bytes that were seen last.

    A fingerprint says at the speed of memory that a tensor has not changed; its digest is known
    then, and nothing has to be read or coded. It is an XXH3-128, held by this process only.
    """

    repository: Repository
    _homes: dict[str, dict[Key, Home]] = field(default_factory=dict)
    _read: set[tuple[str, str, str]] = field(default_factory=set)
    _manifests: dict[str, CheckpointManifest] = field(default_factory=dict)
    _seen: dict[Key, tuple[bytes, Digest]] = field(default_factory=dict)
    _fresh: dict[Key, bytes] = field(default_factory=dict)
    _pending: dict[Key, Home] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, base: Base | None) -> None:
        """A save begins: forget what it may not name."""
        kept = () if base is None else base.folders
        self._homes = {folder: self._homes[folder] for folder in kept if folder in self._homes}
        self._read = {one for one in self._read if one[0] in self._homes}
        self._manifests = {path: m for path, m in self._manifests.items() if path in kept}
        self._fresh, self._pending = {}, {}

    def home(self, base: Base, key: Key, spec: TensorSpec) -> Home | None:
        """Where the base holds the tensor of that name, if it is one of this dtype and shape.

        Raises:
            BaseUnreadableError: the base cannot be read.
        """
        found = self._homes.get(base.path, {}).get(key)
        if found is None:
            self._look(base, key[0], key[1])
            found = self._homes[base.path].get(key)
        if found is None or (found.spec.dtype, found.spec.shape) != (spec.dtype, spec.shape):
            return None
        return found

    def by_digest(self) -> Callable[[Digest], Home | None]:
        """Where bytes of a digest are at home, in all that may be named."""
        homes = {home.digest: home for some in self._homes.values() for home in some.values()}
        return homes.get

    def known(self, key: Key, data: NDArray[np.uint8]) -> Digest | None:
        """The digest of a tensor's bytes if they are those that were saved last."""
        fingerprint = xxh3(data.data)
        with self._lock:
            self._fresh[key] = fingerprint
        seen = self._seen.get(key)
        return seen[1] if seen is not None and seen[0] == fingerprint else None

    def wrote(self, component: str, label: str, file: WrittenFile) -> None:
        """A shard was written: its tensors are at home there once the save is committed."""
        for entry in file.entries:
            assert entry.digest is not None, "what was written has its digest"
            self._remember(component, label, file, entry.spec, entry.digest)

    def wrote_delta(self, component: str, label: str, written: WrittenDelta) -> None:
        """The same of a delta file; what is only named in it has its home elsewhere."""
        for recipe in written.recipes:
            if recipe.given_up is not None:  # the digest is not that of the bytes that were seen
                self._fresh.pop((component, label, recipe.spec.name), None)
            self._remember(
                component,
                label,
                written.file,
                recipe.spec,
                recipe.digest,
                stored=recipe.is_stored,
            )

    def committed(self, folder: str) -> None:
        """The save that was pending is a checkpoint now, in this folder."""
        self._homes[folder] = {
            key: replace(home, file=replace(home.file, path=f"{folder}/{home.file.path}"))
            for key, home in self._pending.items()
        }
        self._pending = {}

    def _remember(
        self,
        component: str,
        label: str,
        file: WrittenFile,
        spec: TensorSpec,
        digest: Digest,
        *,
        stored: bool = True,
    ) -> None:
        key = (component, label, spec.name)
        if key in self._fresh:
            self._seen[key] = self._fresh[key], digest
        if stored:
            name = file.path.rpartition("/")[2]
            source = SourceFile(path=name, size_bytes=file.size_bytes, digest=file.digest)
            self._pending[key] = Home(file=source, name=spec.name, spec=spec, digest=digest)

    def manifest(self, path: str, digest: Digest) -> CheckpointManifest:
        """The manifest in a folder, read once.

        Raises:
            BaseUnreadableError: it cannot be read.
        """
        if path not in self._manifests:
            try:
                self._manifests[path] = self.repository.manifest_in(path, digest)
            except (CorruptError, StorageError) as error:
                raise BaseUnreadableError(folder=path, why=error.what) from error
        return self._manifests[path]

    def _look(self, base: Base, component: str, label: str) -> None:
        """Read the headers of one copy of a component in the base, once."""
        homes = self._homes.setdefault(base.path, {})
        if (base.path, component, label) in self._read:
            return
        self._read.add((base.path, component, label))
        for record in self.manifest(base.path, base.digest).files:
            if (record.component, record.scope) != (component, label):
                continue
            if record.kind not in TENSOR_KINDS:
                continue
            file = SourceFile(
                path=f"{base.path}/{record.path}",
                size_bytes=record.size_bytes,
                digest=record.digest,
            )
            for home in self._headers(base, file):
                homes.setdefault((component, label, home.name), home)

    def _headers(self, base: Base, file: SourceFile) -> list[Home]:
        try:
            with open_tensors(
                self.repository.store, file.path, expected=file.digest, size_bytes=file.size_bytes
            ) as reader:
                return [
                    Home(file=file, name=one.spec.name, spec=one.spec, digest=one.digest)
                    for one in reader.header.entries
                    if one.digest is not None
                ]
        except (CorruptError, StorageError) as error:
            raise BaseUnreadableError(folder=base.path, why=error.what) from error
