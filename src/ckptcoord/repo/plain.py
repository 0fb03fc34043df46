"""Manifests and state documents without the models, for quick answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.manifest_fields import MANIFEST_NAME, MAX_MANIFEST_BYTES
from ckptcoord.errors import DigestMismatchError, ManifestError

if TYPE_CHECKING:
    from ckptcoord.core.digest import Digest
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.plainmanifest import PlainFile, PlainManifest
    from ckptcoord.repo.repository import Repository


def plain_manifest(repository: Repository, commit: Commit) -> PlainManifest:
    """The manifest of a commit, checked as `Repository.manifest` checks it.

    Raises:
        CorruptError: missing, changed or malformed.
    """
    from ckptcoord.core.plainmanifest import PlainManifest  # late: `du` does without

    path, data = _read(repository, commit)
    manifest = PlainManifest.parse(data, path=path)
    if manifest.checkpoint_id != str(commit.checkpoint_id):
        raise ManifestError(
            path=path,
            why=f"is of {manifest.checkpoint_id}, and the log names it {commit.checkpoint_id}",
        )
    return manifest


def component_sizes(repository: Repository, commit: Commit) -> list[tuple[str, int, int]]:
    """The components of a commit: key, bytes of state, bytes that are stored; sorted by key.

    The log vouches for the bytes; of their form only this much is checked, a thousand times in 0.1
    s: who shows more than sizes, or opens a file, asks for the manifest.

    Raises:
        CorruptError: the manifest is missing, changed, or of another form.
    """
    path, data = _read(repository, commit)
    match _parsed(path, data):
        case {"components": dict(components)}:
            return [(key, *_sizes(path, key, components[key])) for key in sorted(components)]
        case _:
            raise ManifestError(path=path, why="components: is not an object")


def read_plain(repository: Repository, commit: Commit, document: PlainFile) -> JsonValue:
    """A state document, against its digest.

    Raises:
        CorruptError: missing, changed, or no JSON.
    """
    path = f"{commit.path}/{document.path}"
    data = repository.store.read(path, limit_bytes=document.size_bytes)
    _check(path, data, document.digest)
    return _parsed(path, data)


def _sizes(path: str, key: str, component: JsonValue) -> tuple[int, int]:
    if not isinstance(component, dict):
        raise ManifestError(path=path, why=f"components.{key[:80]!a}: is not an object")
    size_bytes, stored_bytes = component.get("size_bytes"), component.get("stored_bytes")
    if not (type(size_bytes) is type(stored_bytes) is int) or min(size_bytes, stored_bytes) < 0:
        raise ManifestError(path=path, why=f"components.{key[:80]!a}: its sizes are none")
    return size_bytes, stored_bytes


def _read(repository: Repository, commit: Commit) -> tuple[str, bytes]:
    """The path of a commit's manifest, and what the log says stands there."""
    path = f"{commit.path}/{MANIFEST_NAME}"
    data = repository.store.read(path, limit_bytes=MAX_MANIFEST_BYTES)
    _check(path, data, commit.manifest_digest)
    return path, data


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
