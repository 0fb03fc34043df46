"""Manifests without their models, which take a tenth of a second to import: for quick answers.

The log vouches for the bytes; of what is read here, types and digests are checked, and no laws.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.digest import Digest
from ckptcoord.core.manifest_laws import MANIFEST_NAME
from ckptcoord.errors import DigestMismatchError, InvalidNameError, ManifestError
from ckptcoord.repo.maintenance import MAX_MANIFEST_BYTES

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.repo.repository import Repository

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainComponent:
    """A component; `files` counts them."""

    key: str
    sharing_pattern: str
    group_name: str
    size_bytes: int
    stored_bytes: int
    files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainDocument:
    """The file of a state document."""

    path: str
    size_bytes: int
    digest: Digest
    component: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainManifest:
    """What people ask of a checkpoint; `docs/format.md` has the fields.

    Attributes:
        base: empty for an anchor.
        documents: sorted by path.
    """

    epoch: float | None
    message: str
    kind: str
    base: str
    reason: str
    needs: tuple[str, ...]
    components: tuple[PlainComponent, ...]
    documents: tuple[PlainDocument, ...]


def plain_manifest(repository: Repository, commit: Commit) -> PlainManifest:
    """What the manifest of a commit says.

    Raises:
        CorruptError: missing, changed, or of another form.
    """
    reader = _Reader(f"{commit.path}/{MANIFEST_NAME}", _document(repository, commit))
    lineage = reader.inner("lineage")
    files = (reader.at(one) for one in reader.get("files", list))
    epoch = reader.optional("epoch", (int, float))
    return PlainManifest(
        epoch=None if epoch is None else float(epoch),
        message=reader.get("message", str),
        kind=reader.get("kind", str),
        base=reader.optional("base", str) or "",
        reason=lineage.get("reason", str),
        needs=tuple(str(one) for one in lineage.get("needs", list)),
        components=_components(reader),
        documents=tuple(_file(one) for one in files if one.get("kind", str) == "state"),
    )


def plain_components(repository: Repository, commit: Commit) -> tuple[PlainComponent, ...]:
    """The components of a commit, sorted by key.

    Raises:
        CorruptError: the manifest is missing, changed, or of another form.
    """
    return _components(_Reader(f"{commit.path}/{MANIFEST_NAME}", _document(repository, commit)))


def read_plain(repository: Repository, commit: Commit, document: PlainDocument) -> JsonValue:
    """A state document, against its digest.

    Raises:
        CorruptError: missing, changed, or no JSON.
    """
    path = f"{commit.path}/{document.path}"
    data = repository.store.read(path, limit_bytes=document.size_bytes)
    _check(path, data, document.digest)
    return _parsed(path, data)


def _document(repository: Repository, commit: Commit) -> JsonValue:
    path = f"{commit.path}/{MANIFEST_NAME}"
    data = repository.store.read(path, limit_bytes=MAX_MANIFEST_BYTES)
    _check(path, data, commit.manifest_digest)
    return _parsed(path, data)


def _parsed(path: str, data: bytes) -> JsonValue:
    """As `parse_json`, but for keys that stand there twice: to look for these takes most of it."""
    try:
        value: JsonValue = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(path=path, why="is no JSON") from error
    return value


def _check(path: str, data: bytes, expected: Digest) -> None:
    found = blake3_digest(data)
    if found != expected:
        raise DigestMismatchError(path=path, expected=str(expected), found=str(found))


def _components(reader: _Reader) -> tuple[PlainComponent, ...]:
    found = reader.inner("components")
    return tuple(
        PlainComponent(
            key=key,
            sharing_pattern=one.get("sharing_pattern", str),
            group_name=one.optional("group_name", str) or "",
            size_bytes=one.get("size_bytes", int),
            stored_bytes=one.get("stored_bytes", int),
            files=len(one.get("files", list)),
        )
        for key, one in ((key, found.inner(key)) for key in sorted(found.value))
    )


def _file(reader: _Reader) -> PlainDocument:
    try:
        digest = Digest.parse(reader.get("digest", str))
    except InvalidNameError as error:
        raise ManifestError(path=reader.path, why=error.what) from error
    return PlainDocument(
        path=reader.get("path", str),
        size_bytes=reader.get("size_bytes", int),
        digest=digest,
        component=reader.get("component", str),
    )


class _Reader:
    """An object of a document, whose fields are of the types that they must be."""

    def __init__(self, path: str, value: JsonValue) -> None:
        if not isinstance(value, dict):
            raise ManifestError(path=path, why="is not a JSON object where it should be one")
        self.path = path
        self.value = value

    def at(self, value: JsonValue) -> _Reader:
        return _Reader(self.path, value)

    def inner(self, name: str) -> _Reader:
        return _Reader(self.path, self.value.get(name))

    def get(self, name: str, kind: type[_T] | tuple[type[_T], ...]) -> _T:
        found = self.optional(name, kind)
        if found is None:
            raise ManifestError(path=self.path, why=f"{name[:80]}: is missing")
        return found

    def optional(self, name: str, kind: type[_T] | tuple[type[_T], ...]) -> _T | None:
        found = self.value.get(name)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, kind):
            raise ManifestError(path=self.path, why=f"{name[:80]}: is of another type")
        if isinstance(found, int) and found < 0:
            raise ManifestError(path=self.path, why=f"{name[:80]}: is under zero")
        return found
