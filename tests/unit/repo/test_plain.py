"""Manifests without their models say the same as with them, and refuse what is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent, open_repository
from ckptcoord.codec.digest import blake3_digest
from ckptcoord.errors import CkptError, CorruptError, DigestMismatchError, ManifestError
from ckptcoord.repo.plain import plain_components, plain_manifest, read_plain


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


def test_it_says_what_the_manifest_says(saved) -> None:
    repository, commit, _ = saved
    plain, full = plain_manifest(repository, commit), repository.manifest(commit)

    assert (plain.epoch, plain.message, plain.kind) == (full.epoch, "hello", full.kind.value)
    assert (plain.base, plain.reason) == ("", full.lineage.reason)
    assert [one.key for one in plain.components] == sorted(full.components)
    for one in plain.components:
        component = full.components[one.key]
        assert one.sharing_pattern == component.sharing_pattern.value
        assert (one.size_bytes, one.stored_bytes) == (component.size_bytes, component.stored_bytes)
        assert one.files == len(component.files)
    assert [(one.path, one.digest) for one in plain.documents] == [
        (one.path, one.digest) for one in full.files if one.kind.value == "state"
    ]
    document = read_plain(repository, commit, plain.documents[0])
    assert document["component"] == "a"


def test_a_changed_byte_is_found(saved) -> None:
    repository, commit, folder = saved
    documents = plain_manifest(repository, commit).documents
    path = folder / documents[0].path
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.6"))
    with pytest.raises(DigestMismatchError):
        read_plain(repository, commit, documents[0])
    (folder / "checkpoint_manifest.json").write_bytes(b"{}")
    with pytest.raises(DigestMismatchError):
        plain_manifest(repository, commit)


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
            plain_components(repository, forged)


def test_a_path_out_of_the_repository_is_refused(saved) -> None:
    repository, commit, _ = saved
    document = plain_manifest(repository, commit).documents[0]

    with pytest.raises(CkptError):
        read_plain(repository, commit, replace(document, path="../../x"))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000, b"1" * 5000]
)
def test_what_is_no_json_is_an_error(saved, data) -> None:
    repository, commit, folder = saved
    (folder / "checkpoint_manifest.json").write_bytes(data)

    with pytest.raises(ManifestError):
        plain_manifest(repository, replace(commit, manifest_digest=blake3_digest(data)))
