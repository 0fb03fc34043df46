"""Manifests without their models say the same as with them, and refuse what is none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent, open_repository
from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.manifest_fields import FileKind
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CkptError, CorruptError, DigestMismatchError, ManifestError
from ckptcoord.repo.plain import component_sizes, plain_manifest, read_plain


@pytest.fixture
def saved(tmp_path):
    components = [
        StateComponent("a", {"lr": 0.5}, SharingPattern.GLOBAL),
        StateComponent("b", {"n": 1}, SharingPattern.PER_RANK),
    ]
    with CheckpointCoordinator(components, output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=1, message="hello")
    repository = open_repository(tmp_path / "run")
    return repository, repository.resolve("latest"), tmp_path / "run/checkpoint-1"


def documents_of(manifest):
    return [one for one in manifest.files if one.kind is FileKind.STATE]


def test_it_says_what_the_manifest_says(saved) -> None:
    repository, commit, _ = saved
    plain, full = plain_manifest(repository, commit), repository.manifest(commit)

    assert plain.to_json() == full.model_dump(mode="json")
    assert component_sizes(repository, commit) == [
        (key, one.size_bytes, one.stored_bytes) for key, one in full.components.items()
    ]
    document = read_plain(repository, commit, documents_of(plain)[0])
    assert document["component"] == "a"


def test_a_changed_byte_is_found(saved) -> None:
    repository, commit, folder = saved
    document = documents_of(plain_manifest(repository, commit))[0]
    path = folder / document.path
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6"))
    with pytest.raises(DigestMismatchError):
        read_plain(repository, commit, document)
    (folder / "checkpoint_manifest.json").write_bytes(b"{}")
    for read in (plain_manifest, component_sizes):
        with pytest.raises(DigestMismatchError):
            read(repository, commit)


def test_the_manifest_of_another_checkpoint_is_refused(saved) -> None:
    repository, commit, _ = saved
    other = replace(commit, checkpoint_id=CheckpointId(BranchName("main"), 2), path="checkpoint-2")
    (saved[2].parent / "checkpoint-2").symlink_to(saved[2])

    with pytest.raises(CkptError):
        plain_manifest(repository, other)
    (saved[2].parent / "checkpoint-2").unlink()
    shutil.copytree(saved[2], saved[2].parent / "checkpoint-2")
    with pytest.raises(ManifestError, match="the log names it checkpoint-2"):
        plain_manifest(repository, other)


@pytest.mark.parametrize("name", ["message", "kind", "lineage", "components", "files", "epoch"])
@pytest.mark.parametrize("value", [True, -1, "x", [1], {"a": 1}, [[]], {"a": {}}])
def test_what_is_of_another_form_is_an_error(saved, name, value) -> None:
    repository, commit, folder = saved
    path = folder / "checkpoint_manifest.json"
    document = json.loads(path.read_bytes())
    if isinstance(document[name], type(value)) and isinstance(value, str):
        return
    document[name] = value
    path.write_text(json.dumps(document))
    forged = replace(commit, manifest_digest=blake3_digest(path.read_bytes()))

    with pytest.raises(ManifestError):
        plain_manifest(repository, forged)
    if name == "components":
        with pytest.raises(CorruptError):
            component_sizes(repository, forged)


@pytest.mark.parametrize("field", ["size_bytes", "stored_bytes"])
@pytest.mark.parametrize("value", [None, True, -1, 1.0, "1", []])
def test_a_size_that_is_none_is_not_added(saved, field, value) -> None:
    repository, commit, folder = saved
    path = folder / "checkpoint_manifest.json"
    document = json.loads(path.read_bytes())
    document["components"]["a"][field] = value
    path.write_text(json.dumps(document))
    forged = replace(commit, manifest_digest=blake3_digest(path.read_bytes()))

    with pytest.raises(ManifestError, match=r"components\.'a'"):
        component_sizes(repository, forged)


def test_a_path_out_of_the_repository_is_refused(saved) -> None:
    repository, commit, _ = saved
    document = documents_of(plain_manifest(repository, commit))[0]

    with pytest.raises(CkptError):
        read_plain(repository, commit, replace(document, path="../../x"))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000, b"1" * 5000]
)
def test_what_is_no_json_is_an_error(saved, data) -> None:
    repository, commit, folder = saved
    (folder / "checkpoint_manifest.json").write_bytes(data)

    for read in (plain_manifest, component_sizes):
        with pytest.raises(ManifestError):
            read(repository, replace(commit, manifest_digest=blake3_digest(data)))
