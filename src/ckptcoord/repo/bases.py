"""What this rank knows of bytes that are stored already, and so need not be stored again."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.codec.digest import xxh3
from ckptcoord.codec.recipe import How, SourceFile
from ckptcoord.core.digest import Digest
from ckptcoord.core.fields import Fields
from ckptcoord.core.manifest import TENSOR_KINDS
from ckptcoord.errors import BaseUnreadableError, CkptError, CorruptError
from ckptcoord.repo.basecheck import check_files
from ckptcoord.repo.deltacoding import Home
from ckptcoord.repo.deltas import DeltaReader, open_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.codec.recipe import Recipe
    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.repo.deltawriting import WrittenDelta
    from ckptcoord.repo.repository import Repository
    from ckptcoord.repo.shards import WrittenFile

Key: TypeAlias = tuple[str, str, str]
"""Component, label of the copy, name of the tensor."""

LEAST_BYTES = 64 << 10  # of a tensor that is named elsewhere, which keeps a checkpoint from gc
_KEPT_SAVES = 8
_MOST_FILES = 64  # of a copy elsewhere whose headers are read
_MOST_HOMES = 200_000  # elsewhere, in memory
_log = logging.getLogger("ckptcoord")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the deltas of one save are against.

    Attributes:
        ref: of the checkpoint.
        path: its folder.
        digest: of its manifest.
        folders: those whose tensors may be named in any case (`plan/elsewhere.py: nearby`).
        elsewhere: the parent, and other checkpoints whose tensors may be named, by folder and
            manifest's digest.
    """

    ref: str
    path: str
    digest: Digest
    folders: tuple[str, ...]
    elsewhere: tuple[tuple[str, Digest], ...] = ()

    def to_json(self) -> JsonValue:
        """For the message that all ranks read."""
        return {
            "ref": self.ref,
            "path": self.path,
            "digest": str(self.digest),
            "folders": list(self.folders),
            "elsewhere": [path for path, _ in self.elsewhere],
            "digests": [str(digest) for _, digest in self.elsewhere],
        }

    @classmethod
    def from_json(cls, value: JsonValue) -> Base:
        """What `to_json` wrote."""
        with Fields(value, path="the base of a save") as fields:
            digests = tuple(map(Digest.parse, fields.texts("digests")))
            return cls(
                ref=fields.text("ref"),
                path=fields.text("path"),
                digest=Digest.parse(fields.text("digest")),
                folders=fields.texts("folders"),
                elsewhere=tuple(zip(fields.texts("elsewhere"), digests, strict=True)),
            )


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of a file; its recipe where that is a delta file."""

    spec: TensorSpec
    digest: Digest
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True)
class _Written:
    """A file that this process wrote, and all that it holds or names."""

    file: SourceFile
    component: str
    label: str
    tensors: tuple[_Tensor, ...]


@dataclass(slots=True)
class Bases:
    """The homes of tensors by checkpoint, and fingerprints of the bytes that were seen last.

    A fingerprint says at the speed of memory that a tensor has not changed; its digest is known
    then, and nothing has to be read or coded. It is an XXH3-128, held by this process only.

    What is near, base and parent, has its homes by name, too, where this process wrote it. Of what
    is elsewhere, tensors of `LEAST_BYTES` and more are known by digest: those that this process
    wrote in its last saves, and those whose headers it has read; of the parent's headers, all.
    """

    repository: Repository
    _homes: dict[str, dict[Key, Home]] = field(default_factory=dict)
    _digests: dict[str, dict[Digest, Home]] = field(default_factory=dict)
    _near: dict[Digest, Home] = field(default_factory=dict)
    _far: dict[str, dict[Digest, Home]] = field(default_factory=dict)
    _listed: tuple[str, ...] = ()
    _own: list[str] = field(default_factory=list)
    _read: set[tuple[str, str, str]] = field(default_factory=set)
    _manifests: dict[str, CheckpointManifest] = field(default_factory=dict)
    _seen: dict[Key, tuple[bytes, Digest]] = field(default_factory=dict)
    _fresh: dict[Key, bytes] = field(default_factory=dict)
    _pending: list[_Written] = field(default_factory=list)
    _written: dict[str, dict[SourceFile, _Written]] = field(default_factory=dict)
    _made: dict[Key, tuple[Digest, NDArray[np.uint8]]] = field(default_factory=dict)
    _sound: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def saves(self) -> tuple[str, ...]:
        """The folders of the last saves of this process, newest first."""
        return tuple(reversed(self._own))

    def begin(self, base: Base | None) -> None:
        """A save begins: forget what it may not name, but for the last saves of this process."""
        near = () if base is None else base.folders
        self._listed = () if base is None else tuple(path for path, _ in base.elsewhere)
        for folder in sorted(self._homes.keys() - {*near}):
            homes = self._homes.pop(folder)
            self._digests.pop(folder, None)
            if folder in self._own:
                self._far[folder] = {}
                self._keep(folder, homes.values())
        kept = {*self._own, *self._listed}
        self._far = {folder: homes for folder, homes in self._far.items() if folder in kept}
        kept = {*near, *self._listed}
        self._read = {one for one in self._read if one[0] in kept}
        self._manifests = {path: m for path, m in self._manifests.items() if path in kept}
        self._written = {
            path: files
            for path, files in self._written.items()
            if base is not None and path == base.path
        }
        self._near = {}
        folders = sorted(self._homes, key=lambda one: base is None or one != base.path)
        for folder in reversed(folders):  # what several hold is named in the first, the base
            self._near.update(self._homes_by_digest(folder))
        self._fresh, self._pending = {}, []
        if base is None:
            self._made = {}

    def _homes_by_digest(self, folder: str) -> dict[Digest, Home]:
        """The homes of a folder by digest, the first where several have one; made once."""
        found = self._digests.get(folder)
        if found is None:
            homes = reversed(self._homes[folder].values())
            found = self._digests[folder] = {home.digest: home for home in homes}
        return found

    def look(self, base: Base, component: str, label: str) -> None:
        """Learn what is stored of one copy of a component, elsewhere too; once.

        Raises:
            BaseUnreadableError: the base cannot be read.
        """
        self._look(base, component, label)
        for path, digest in base.elsewhere:
            least = 0 if path in base.folders else LEAST_BYTES
            self._look_elsewhere(path, digest, component, label, least)

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

    def by_digest(self, digest: Digest) -> Home | None:
        """Where bytes are at home: in the base, else the parent or what that needs, else elsewhere.

        None where they are in nothing that this save may name.
        """
        near = self._near.get(digest)
        if near is not None:
            return near
        found = (self._far.get(path, {}).get(digest) for path in self._listed)
        return next((home for home in found if home is not None), None)

    def known(self, key: Key, data: NDArray[np.uint8]) -> Digest | None:
        """The digest of a tensor's bytes if they are those that were saved last."""
        fingerprint = xxh3(data.data)
        with self._lock:
            self._fresh[key] = fingerprint
        seen = self._seen.get(key)
        return seen[1] if seen is not None and seen[0] == fingerprint else None

    def take(self, key: Key, home: Home | None) -> NDArray[np.uint8] | None:
        """The bytes of an approximated tensor as readers have them, if they are those of a home.

        Reading them again would lead through every delta of a chain. They are forgotten here: the
        caller may write over them.
        """
        found = self._made.pop(key, None)
        if found is None or home is None or found[0] != home.digest:
            return None
        return found[1]

    def wrote(self, component: str, label: str, file: WrittenFile) -> None:
        """A shard was written: its tensors are at home there once the save is committed."""
        tensors = []
        for entry in file.entries:
            assert entry.digest is not None, "what was written has its digest"
            tensors.append(_Tensor(entry.spec, entry.digest))
        self._remember(component, label, file, tensors)

    def wrote_delta(self, component: str, label: str, written: WrittenDelta) -> None:
        """The same of a delta file; what is only named in it has its home elsewhere."""
        for recipe in written.recipes:
            key, made = (component, label, recipe.spec.name), written.made.get(recipe.spec.name)
            if made is not None:
                self._made[key] = recipe.digest, made
            if recipe.given_up is not None:  # the digest is not that of the bytes that were seen
                self._fresh.pop(key, None)
        tensors = [_Tensor(one.spec, one.digest, one) for one in written.recipes]
        self._remember(component, label, written.file, tensors)

    def committed(self, folder: str) -> None:
        """The save that was pending is a checkpoint now, in this folder."""
        homes: dict[Key, Home] = {}
        files: dict[SourceFile, _Written] = {}
        for written in self._pending:
            file = replace(written.file, path=f"{folder}/{written.file.path}")
            files[file] = written
            for one in written.tensors:
                home = _own_home(file, one)
                if home is not None and home.file.folder not in self._homes:  # or it is known
                    homes[written.component, written.label, one.spec.name] = home
        self._homes[folder], self._written[folder] = homes, files
        self._digests.pop(folder, None)
        self._own = [*self._own, folder][-_KEPT_SAVES:]
        self._sound.add(folder)
        self._pending = []

    def _remember(
        self, component: str, label: str, file: WrittenFile, tensors: Sequence[_Tensor]
    ) -> None:
        for one in tensors:
            key = (component, label, one.spec.name)
            if key in self._fresh:
                self._seen[key] = self._fresh[key], one.digest
        name = file.path.rpartition("/")[2]
        source = SourceFile(path=name, size_bytes=file.size_bytes, digest=file.digest)
        self._pending.append(_Written(source, component, label, tuple(tensors)))

    def manifest(self, path: str, digest: Digest) -> CheckpointManifest:
        """The manifest in a folder, read once.

        Raises:
            BaseUnreadableError: it cannot be read.
        """
        if path not in self._manifests:
            try:
                self._manifests[path] = self.repository.manifest_in(path, digest)
            except CkptError as error:
                raise BaseUnreadableError(folder=path, why=error.what) from error
        return self._manifests[path]

    def check(self, path: str, digest: Digest, *, threads: int) -> None:
        """Whether a checkpoint can be a base, as far as its files' headers say; asked once of each.

        What this process wrote is on what it had checked, and is not read again.

        Raises:
            BaseUnreadableError: it cannot; names the file.
        """
        if path not in self._sound:
            manifest = self.manifest(path, digest)
            check_files(self.repository, path, manifest, threads=threads)
            self._sound.add(path)

    def _look(self, base: Base, component: str, label: str) -> None:
        """Read the headers of one copy of a component in the base, once."""
        homes = self._homes.setdefault(base.path, {})
        if (base.path, component, label) in self._read:
            return
        self._read.add((base.path, component, label))
        self._digests.pop(base.path, None)
        manifest = self.manifest(base.path, base.digest)
        for record in _files_of(manifest, component, label):
            for name, home in self._headers(base.path, manifest, record):
                found = homes.setdefault((component, label, name), home)
                self._near[found.digest] = found

    def _look_elsewhere(
        self, path: str, digest: Digest, component: str, label: str, least: int
    ) -> None:
        """The same in another checkpoint; one that cannot be read is left out."""
        if path in self._own or (path, component, label) in self._read:
            return
        self._read.add((path, component, label))
        self._far.setdefault(path, {})
        try:
            manifest = self.manifest(path, digest)
            records = _files_of(manifest, component, label)
            for record in records if len(records) <= _MOST_FILES else ():
                homes = (home for _, home in self._headers(path, manifest, record))
                self._keep(path, homes, least)
        except BaseUnreadableError as error:
            _log.warning("its tensors are not named: %s", error)

    def _keep(self, folder: str, homes: Iterable[Home], least: int = LEAST_BYTES) -> None:
        """Remember by digest what is elsewhere and worth to be named."""
        room = _MOST_HOMES - sum(map(len, self._far.values()))
        worth = (home for home in homes if home.spec.nbytes >= least)
        for home in islice(worth, max(0, room)):
            self._far[folder].setdefault(home.digest, home)

    def _headers(
        self, folder: str, manifest: CheckpointManifest, record: FileRecord
    ) -> list[tuple[str, Home]]:
        """The tensors of a file by name, each with where its bytes are."""
        file = _source(folder, record)
        written = self._written.get(folder, {}).get(file)
        try:
            tensors = self._read_header(file) if written is None else written.tensors
            if written is not None:
                self._check_size(file)
        except CkptError as error:
            raise BaseUnreadableError(folder=folder, why=error.what) from error
        own = written is not None
        return [(one.spec.name, _home(file, one, folder, manifest, own=own)) for one in tensors]

    def _read_header(self, file: SourceFile) -> Sequence[_Tensor]:
        with open_tensors(
            self.repository.store, file.path, expected=file.digest, size_bytes=file.size_bytes
        ) as reader:
            recipes = reader.recipes if isinstance(reader, DeltaReader) else {}
            return [
                _Tensor(one.spec, one.digest, recipes.get(one.spec.name))
                for one in reader.header.entries
                if one.digest is not None
            ]

    def _check_size(self, file: SourceFile) -> None:
        """What this process wrote under that digest is still there.

        A file's digest is that of its header and of its tensors' digests: where the manifest has
        the one that was written, no header says anything else. What a delta then reads of the file
        is checked when it is read.
        """
        with self.repository.store.open(file.path) as reader:
            if reader.size_bytes != file.size_bytes:
                why = f"the file has {reader.size_bytes} bytes, {file.size_bytes} were written"
                raise CorruptError(path=file.path, why=why)


def _home(
    file: SourceFile, tensor: _Tensor, folder: str, manifest: CheckpointManifest, *, own: bool
) -> Home:
    """Where a tensor of a file is: what is only named there is where that is.

    `own`: this process wrote the file.
    """
    spec, digest, recipe = tensor.spec, tensor.digest, tensor.recipe
    if recipe is not None and recipe.how is How.SAME and recipe.source is not None:
        source, there = recipe.source
        if source.folder:
            return Home(file=source, name=there, spec=spec, digest=digest)
        beside = source.path.removeprefix("./")
        for record in manifest.files:
            if record.path == beside and record.kind in TENSOR_KINDS:
                return Home(file=_source(folder, record), name=there, spec=spec, digest=digest)
    return Home(file=file, name=spec.name, spec=spec, digest=digest, sound=own)


def _own_home(file: SourceFile, tensor: _Tensor) -> Home | None:
    """The same of what this process wrote; None for casts, and what is at home by another name."""
    spec, digest, recipe = tensor.spec, tensor.digest, tensor.recipe
    if recipe is None or recipe.is_stored:
        return Home(file=file, name=spec.name, spec=spec, digest=digest, sound=True)
    if recipe.how is How.SAME and recipe.source is not None and recipe.source[0].folder:
        source, there = recipe.source
        return Home(file=source, name=there, spec=spec, digest=digest)
    return None


def _source(folder: str, record: FileRecord) -> SourceFile:
    return SourceFile(
        path=f"{folder}/{record.path}", size_bytes=record.size_bytes, digest=record.digest
    )


def _files_of(manifest: CheckpointManifest, component: str, label: str) -> list[FileRecord]:
    """The files of tensors of one copy of a component."""
    return [
        record
        for record in manifest.files
        if (record.component, record.scope) == (component, label) and record.kind in TENSOR_KINDS
    ]
