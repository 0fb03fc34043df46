"""A repository that someone tampered with: refused by name, in bounds, and nothing else opened.

Digests are recomputed where a forger would: what the log and manifest vouch for is as hostile as
all else.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import blake3
import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    open_repository,
)
from ckptcoord.codec.tensorfile import parse_header, shard_digest
from ckptcoord.core.digest import Digest
from ckptcoord.errors import (
    CkptError,
    CorruptError,
    FormatVersionError,
    ManifestError,
    RefNotFoundError,
    UnsafePathError,
)
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.testing.ranks import Outcomes, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ckptcoord.dist.world import TorchWorld

REPLICATED, PER_RANK = SharingPattern.REPLICATED, SharingPattern.PER_RANK
MANIFEST = "checkpoint_manifest.json"
SHARD = "model-00001-of-00002.safetensors"
SOON_S = 60.0  # well under the deadline: nobody was left waiting


def weights(value: float) -> dict[str, Any]:
    names = ("a", "b", "c", "d")
    return {n: torch.full((64,), value + i) for i, n in enumerate(names)} | {"epoch": 3}


def declare(state: dict[str, Any]) -> list[StateComponent]:
    return [
        StateComponent("model", state, REPLICATED),
        StateComponent("own", {"seed": 7, "t": torch.ones(3)}, PER_RANK),
    ]


def run(
    size: int, folder: Path, work: Callable[[CheckpointCoordinator, int], Any], states: Any = None
) -> Outcomes[Any]:
    states = states or [weights(1.0) for _ in range(size)]

    def one(world: TorchWorld) -> Any:
        config = CoordinatorConfig(timeout_s=100.0)
        with CheckpointCoordinator(
            declare(states[world.rank]), None, world, folder, config=config
        ) as coordinator:
            return work(coordinator, world.rank)

    started = time.monotonic()
    outcomes = run_ranks(size, one)
    assert time.monotonic() - started < SOON_S
    return outcomes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        coordinator.save_checkpoint(step=2)

    run(2, folder, work).values  # noqa: B018
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(sound, copy)
    return copy


def entries(folder: Path) -> list[Path]:
    return sorted((folder / ".ckptcoord/log").iterdir())


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def digest(data: bytes) -> str:
    return f"blake3:{blake3.blake3(data).hexdigest()}"


def forge_entry(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_bytes())
    changed = change(document)
    rewrite(path, changed if isinstance(changed, bytes) else json.dumps(document).encode())


def resign(folder: Path, manifest: bytes) -> None:
    """Put a manifest in the place of checkpoint-2's, and have the log vouch for it."""
    rewrite(folder / "checkpoint-2" / MANIFEST, manifest)
    (commit,) = [p for p in entries(folder) if b'"checkpoint-2"' in p.read_bytes()]
    forge_entry(commit, lambda entry: entry.update(manifest_digest=digest(manifest)))


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "checkpoint-2" / MANIFEST).read_bytes())
    changed = change(document)
    resign(folder, changed if isinstance(changed, bytes) else json.dumps(document).encode())


def forge_file(folder: Path, name: str, data: bytes, file_digest: str | None = None) -> None:
    """Other bytes in a file of checkpoint-2, and every digest and size above them made to fit."""
    path = folder / "checkpoint-2" / name
    if path.exists() or path.is_symlink():
        path.unlink()
    path.write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        (record,) = [f for f in manifest["files"] if f["path"] == name]
        component = manifest["components"][record["component"]]
        component["stored_bytes"] += len(data) - record["size_bytes"]
        record["size_bytes"], record["digest"] = len(data), file_digest or digest(data)
        own = [f for f in manifest["files"] if f["component"] == record["component"]]
        raw = b"".join(bytes.fromhex(f["digest"].removeprefix("blake3:")) for f in own)
        component["checksum"] = digest(raw)

    forge_manifest(folder, change)


def safetensors(header: dict[str, Any], data: bytes) -> tuple[bytes, str]:
    """A shard as a forger would write it, and its digest, where it can have one."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    notes = json.loads(header.get("__metadata__", {}).get("ckptcoord", '{"digests": {}}'))
    begins = sorted((v["data_offsets"], n) for n, v in header.items() if n != "__metadata__")
    digests = [Digest.parse(notes["digests"][n]) for _, n in begins if n in notes["digests"]]
    return head + data, str(shard_digest(head, digests))


def assert_refused(
    folder: Path, kinds: type[CkptError] | tuple[type[CkptError], ...], *words: str, size: int = 2
) -> None:
    """A load of checkpoint-2 says so on every rank, and nothing live has changed."""
    states = [weights(-9.0) for _ in range(size)]
    before = [{n: repr(v) for n, v in state.items()} for state in states]
    outcomes = run(size, folder, lambda c, _: c.load_checkpoint("main@2"), states)
    for error in outcomes.errors:
        assert isinstance(error, kinds), repr(error)
        assert all(word in str(error) for word in words), str(error)
        assert len(str(error)) < 2_000
    assert [{n: repr(v) for n, v in state.items()} for state in states] == before


def assert_verify_finds(folder: Path, name: str) -> None:
    repository = open_repository(folder)
    report = verify_checkpoint(repository, repository.resolve("main@2"))
    assert not report.ok
    assert any(name in finding.path for finding in report.findings if finding.harmful)


# --- the manifest --------------------------------------------------------------------------------


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        node: Any = document
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value

    return change


def many_groups(manifest: dict[str, Any]) -> None:
    """A few kilobytes that name 64 million ranks."""
    manifest["world_size"] = 1_000_000
    manifest["topology"]["nodes"] = ["0-999999"]
    letters = "abcdefgh"
    manifest["topology"]["groups"] = {a + b: ["0-999999"] for a in letters for b in letters}


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown field": (put("surprise", value=1), "surprise"),
    "unknown field of a file": (put("files", 0, "mode", value=511), "files[0].mode"),
    "path above": (put("files", 0, "path", value="../x"), "files[0].path"),
    "path absolute": (put("files", 0, "path", value="/etc/passwd"), "files[0].path"),
    "path NUL": (put("files", 0, "path", value="a\0b"), "files[0].path"),
    "path backslash": (put("files", 0, "path", value="..\\x"), "files[0].path"),
    "path hidden": (put("files", 0, "path", value=".ckptcoord/log"), "files[0].path"),
    "path of the manifest": (put("files", 0, "path", value=MANIFEST), "path"),
    "path newline": (put("files", 0, "path", value="a\n"), "files[0].path"),
    "size": (put("files", 0, "size_bytes", value=10**9), "stored_bytes"),
    "size negative": (put("files", 0, "size_bytes", value=-1), "files[0].size_bytes"),
    "size huge": (put("files", 0, "size_bytes", value=2**63), "files[0].size_bytes"),
    "size float": (put("files", 0, "size_bytes", value=1.0), "files[0].size_bytes"),
    "digest": (put("files", 0, "digest", value=digest(b"x")), "checksum"),
    "digest short": (put("files", 0, "digest", value="blake3:00"), "files[0].digest"),
    "world of a billion": (put("world_size", value=10**9), "world_size"),
    "ranks without end": (put("components", "own", "ranks", value="0-999999"), "ranks"),
    "deep": (
        lambda m: json.dumps(m).encode().replace(b'"metadata": {}', b'"metadata": '
            + b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "levels"),
    "other id": (put("step", value=3), "checkpoint_id"),
    "other branch": (put("branch", value="../x"), "branch"),
    "no object": (lambda m: b"[]", ""),
    "empty": (lambda m: b"", "JSON"),
    "duplicate keys": (lambda m: json.dumps(m).encode()[:-1] + b', "step": 2}', "step"),
    "NaN": (lambda m: json.dumps(m | {"epoch": float("nan")}).encode(), "NaN"),
    "newer with anything": (put("components", value={}), "files[0].component"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_a_forged_manifest_is_refused_by_file_and_field(folder: Path, name: str):
    change, field = MANIFESTS[name]
    forge_manifest(folder, change)
    assert_refused(folder, ManifestError, f"checkpoint-2/{MANIFEST}", field)
    assert_verify_finds(folder, MANIFEST)


def test_a_newer_manifest_is_refused_as_such_and_older_checkpoints_load(folder: Path):
    forge_manifest(folder, put("format_version", value=2))
    assert_refused(folder, FormatVersionError, MANIFEST, "newer")
    assert run(2, folder, lambda c, _: c.load_checkpoint("main@1").step).values == [1, 1]


def test_a_manifest_that_names_millions_of_ranks_costs_no_memory(folder: Path):
    forge_manifest(folder, many_groups)
    tracemalloc.start()
    states = [weights(-9.0)]
    (report,) = run(1, folder, lambda c, _: c.load_checkpoint("main@2"), states).values
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.loaded == ("model", "own")  # of the copies that are there, all alike
    assert peak < 20 << 20


# --- shards and documents ------------------------------------------------------------------------


def tensor_header(size: int, **more: Any) -> dict[str, Any]:
    notes = {"format_version": 1, "digests": {"a": digest(b"")}} | more
    own = {"format": "pt", "ckptcoord": json.dumps(notes)}
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return {"__metadata__": own, "a": tensor}


SHARDS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond the end": struct.pack("<Q", 100) + b"{}",
    "a tensor of 2**60 bytes": safetensors(tensor_header(2**60), b"")[0],
    "a tensor of 2**80 bytes": safetensors(tensor_header(2**80), b"")[0],
    "a deep header": struct.pack("<Q", 80_000) + b'{"a":' * 16_000,
    "no digests": safetensors(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x")[0],
    "a pickle": b"\x80\x04\x95" + b"x" * 100,
    "text": b"not a tensor at all, only text",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHARDS))
def test_a_forged_shard_is_refused_before_anything_of_its_claimed_size_is_allocated(
    folder: Path, name: str
):
    data = SHARDS[name]
    forge_file(folder, SHARD, data)
    tracemalloc.start()
    assert_refused(folder, CorruptError, SHARD)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20
    assert_verify_finds(folder, SHARD)


def test_a_forged_shard_with_other_bytes_than_its_digests_say_is_found(folder: Path):
    name = "own.rank00001.safetensors"
    notes = {"format_version": 1, "digests": {"t": digest(b"")}}
    own = {"format": "pt", "ckptcoord": json.dumps(notes)}
    tensor = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    data, shard = safetensors({"__metadata__": own, "t": tensor}, b"oops" * 3)
    forge_file(folder, name, data, shard)
    assert_refused(folder, CkptError, name, "'t' is corrupt")
    assert_verify_finds(folder, name)


def test_headers_with_more_than_the_manifest_says_are_refused(folder: Path):
    """Its tensors are authentic; who wrote them says there are fewer."""
    forge_manifest(folder, put("components", "model", "size_bytes", value=4 * 64 * 4 - 1))
    second = SHARD.replace("00001-of", "00002-of")
    assert_refused(folder, CorruptError, second, "all of 'model' has 1,023")
    assert_verify_finds(folder, second)


def test_a_tensor_that_stands_in_two_shards_is_refused(folder: Path):
    """Consistent in every digest: which of the two would be loaded?"""
    first = (folder / "checkpoint-2" / SHARD).read_bytes()
    header = parse_header(lambda at, length: first[at : at + length], len(first), path="x")
    own = str(shard_digest(header.raw, [e.digest for e in header.entries if e.digest]))
    forge_file(folder, SHARD.replace("00001-of", "00002-of"), first, own)
    assert_refused(folder, CorruptError, "stands in")


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    rewrite(path, bytes(data))


def swap(path: Path) -> None:
    other = path.with_name(SHARD.replace("00001-of", "00002-of"))
    one, two = path.read_bytes(), other.read_bytes()
    rewrite(path, two)
    rewrite(other, one)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: rewrite(path, path.read_bytes()[:-1]),
    "longer": lambda path: rewrite(path, path.read_bytes() + b"x"),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: rewrite(path, b""),
    "swapped": swap,
    "flipped": damage_flip,
    "of another checkpoint": lambda path: rewrite(
        path, (path.parent.parent / "other").read_bytes()),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DAMAGE))
@pytest.mark.parametrize("file", [SHARD, "model.state.json", "own.rank00001.safetensors"])
def test_a_damaged_file_is_found_by_a_load_and_by_verify(folder: Path, name: str, file: str):
    if name == "swapped" and file != SHARD:
        pytest.skip("only shards are numbered")
    shutil.copy(folder / "checkpoint-1" / ("own.rank00000.state.json"), folder / "other")
    DAMAGE[name](folder / "checkpoint-2" / file)
    assert_refused(folder, CkptError, file)
    assert_verify_finds(folder, file)
    assert run(2, folder, lambda c, _: c.load_checkpoint("main@1").step).values == [1, 1]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file outside of the repository that nothing must open."""
    path = tmp_path / "canary"
    path.write_text("precious")
    os.utime(path, (1, 1))
    return path


def replaced_by(kind: str, path: Path, canary: Path) -> None:
    path.unlink()
    match kind:
        case "link out":
            path.symlink_to(canary)
        case "link within":
            path.symlink_to(path.parent.parent / "checkpoint-1" / path.name)
        case "dangling link":
            path.symlink_to("nowhere")
        case "FIFO":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "kind", ["link out", "link within", "dangling link", "FIFO", "folder", "device"]
)
@pytest.mark.parametrize("file", [SHARD, "model.state.json", MANIFEST, "own.rank00001.state.json"])
def test_what_is_no_plain_file_is_not_opened(folder: Path, kind: str, file: str, canary: Path):
    replaced_by(kind, folder / "checkpoint-2" / file, canary)
    assert_refused(folder, CkptError, file)
    assert_verify_finds(folder, file)
    assert canary.stat().st_atime == 1


def test_a_checkpoint_folder_that_is_a_link_out_is_refused(folder: Path, tmp_path: Path):
    shutil.move(folder / "checkpoint-2", tmp_path / "elsewhere")
    (folder / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert_refused(folder, UnsafePathError, "symbolic link")
    assert_verify_finds(folder, MANIFEST)


def test_a_marker_or_log_that_is_a_link_out_is_refused(folder: Path, tmp_path: Path):
    for name in (".ckptcoord/log", ".ckptcoord"):
        shutil.move(folder / name, tmp_path / "moved")
        (folder / name).symlink_to(tmp_path / "moved")
        with pytest.raises(CkptError, match="symbolic link"):
            open_repository(folder).state()
        with pytest.raises(CkptError, match="symbolic link"):
            CheckpointCoordinator([], output_dir=folder)
        (folder / name).unlink()
        shutil.move(tmp_path / "moved", folder / name)


TREES: dict[str, Any] = {
    "no JSON": b"{",
    "no object": b"[]",
    "a pickle": b"\x80\x04.",
    "no tree": {"format_version": 1, "component": "model"},
    "newer": {"format_version": 2, "component": "model", "tree": {}},
    "of another component": {"format_version": 1, "component": "own", "tree": {}},
    "a tensor no shard has": {"$": "tensor", "name": "z"},
    "a hostile name": {"$": "tensor", "name": "../z"},
    "an unknown tag": {"$": "pickle", "base64": "gASVKg=="},
    "a class that is code": {"$": "dataclass", "class": "os:system", "fields": {}},
    "a class to import": {"$": "enum", "class": "antigravity:x", "name": "y"},
    "deep": b'{"format_version":1,"component":"model","tree":' + b"[" * 100_000,
    "a huge list": {"$": "deque", "items": [], "maxlen": 2**70},
    "an unhashable key": {"$": "dict", "items": [[[1], 2]]},
    "a numpy of objects": {"$": "ndarray", "name": "a", "dtype": "|O8"},
    "a long int": b'{"format_version":1,"component":"model","tree":' + b"9" * 100_000 + b"}",
    "bits": {"$": "float", "bits": "zz"},
    "NaN": b'{"format_version":1,"component":"model","tree":NaN}',
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_forged_state_document_is_refused_and_runs_nothing(folder: Path, name: str):
    tree = TREES[name]
    whole = isinstance(tree, dict) and "component" in tree
    tensors = {n: {"$": "tensor", "name": n} for n in "abcd"}
    made = {"format_version": 1, "component": "model", "tree": {**tensors, "x": tree}}
    document = tree if whole else made
    data = tree if isinstance(tree, bytes) else json.dumps(document, default=str).encode()
    forge_file(folder, "model.state.json", data)
    assert_refused(folder, CkptError, "model.state.json")
    assert "antigravity" not in sys.modules


def test_a_forged_checkpoint_loads_within_its_own_size_in_a_bounded_process(folder: Path):
    """The same once more where any large allocation would kill: RLIMIT_AS in a child."""
    data, own = safetensors(tensor_header(2**44), b"")
    forge_file(folder, SHARD, data, own)
    code = """
import resource, sys, torch
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.errors import CorruptError
with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
model = StateComponent("model", {}, SharingPattern.GLOBAL)
c = CheckpointCoordinator([model], output_dir=sys.argv[1])
try:
    c.load_checkpoint("main@2", strict=False)
except CorruptError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert SHARD in done.stdout


# --- the log and the marker ----------------------------------------------------------------------


def last(folder: Path) -> Path:
    return entries(folder)[-1]


def gap(folder: Path) -> None:
    entries(folder)[1].unlink()


LOGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "malformed": (lambda f: rewrite(last(f), b"{"), "JSON"),
    "empty": (lambda f: rewrite(last(f), b""), "JSON"),
    "binary": (lambda f: rewrite(last(f), bytes(range(256))), ""),
    "duplicate keys": (
        lambda f: forge_entry(last(f), lambda e: json.dumps(e).encode()[:-1] + b',"kind":"tag"}'),
        "twice"),
    "wrong number": (lambda f: forge_entry(last(f), lambda e: e.update(number=9)), "number"),
    "gap": (gap, "missing"),
    "unknown kind": (lambda f: forge_entry(last(f), lambda e: e.update(kind="exec")), "kind"),
    "unknown field": (lambda f: forge_entry(last(f), lambda e: e.update(x=1)), "'x'"),
    "path above": (lambda f: forge_entry(last(f), lambda e: e.update(path="../x")), "path"),
    "path absolute": (lambda f: forge_entry(last(f), lambda e: e.update(path="/etc")), "path"),
    "path of the marker": (
        lambda f: forge_entry(last(f), lambda e: e.update(path=".ckptcoord")), "path"),
    "path of something else": (
        lambda f: forge_entry(last(f), lambda e: e.update(path="datasets")), "path"),
    "size": (lambda f: forge_entry(last(f), lambda e: e.update(size_bytes=-1)), "size_bytes"),
    "deep": (lambda f: rewrite(last(f), b"[" * 500_000), "levels"),
    "huge": (lambda f: rewrite(last(f), b" " * (2 << 20)), "bytes"),
    "a link": (lambda f: (last(f).unlink(), last(f).with_name("0" * 19 + "3.json").symlink_to(
        "/dev/zero")), "plain file"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LOGS))
def test_a_forged_log_is_refused_by_entry_and_field(folder: Path, name: str):
    change, words = LOGS[name]
    change(folder)
    states = [weights(-9.0) for _ in range(2)]
    for act in (lambda c, _: c.load_checkpoint("main@2"), lambda c, _: c.save_checkpoint(step=3)):
        for error in run(2, folder, act, states).errors:
            assert isinstance(error, CkptError)
            assert ".ckptcoord/log/" in str(error)
            assert words in str(error)
    assert not (folder / "checkpoint-3").exists()


def test_a_newer_entry_is_refused_as_such(folder: Path):
    forge_entry(last(folder), lambda e: e.update(format_version=2, whatever=1))
    assert_refused(folder, FormatVersionError, "newer")


def test_a_commit_that_names_another_manifest_is_refused(folder: Path):
    other = digest((folder / "checkpoint-1" / MANIFEST).read_bytes())
    forge_entry(last(folder), lambda e: e.update(manifest_digest=other))
    assert_refused(folder, CorruptError, MANIFEST)


def test_a_commit_that_names_another_checkpoints_folder_is_refused(folder: Path):
    manifest = (folder / "checkpoint-1" / MANIFEST).read_bytes()
    rewrite(folder / "checkpoint-2" / MANIFEST, manifest)
    forge_entry(last(folder), lambda e: e.update(manifest_digest=digest(manifest)))
    assert_refused(folder, ManifestError, "checkpoint-1")


def test_a_folder_that_no_commit_names_does_not_exist(folder: Path):
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    for error in run(2, folder, lambda c, _: c.load_checkpoint("main@3")).errors:
        assert isinstance(error, RefNotFoundError)
        assert "main@2" in error.nearest


CONFIGS: dict[str, bytes] = {
    "a tag": b"format_version: !!python/object/apply:os.system ['touch pwned']\n",
    "an alias": b"a: &a [x]\nb: *a\nformat_version: 1\n",
    "a bomb": b"a: &a [x,x]\nb: &b [*a,*a]\nformat_version: 1\n",
    "huge": b"#" * (1 << 20),
    "no number": b"format_version: one\n",
    "a boolean": b"format_version: true\n",
    "zero": b"format_version: 0\n",
    "no mapping": b"- 1\n",
    "empty": b"",
    "no date": b"format_version: 2001-13-99\n",
    "a long number": b"format_version: " + b"9" * 20_000 + b"\n",
    "deep": b"[" * 3_000,
    "binary": bytes(range(256)),
    "half a file": b"format_version: [",
    "two documents": b"format_version: 1\n---\nformat_version: 1\n",
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_forged_marker_is_refused_and_runs_nothing(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder.parent)
    rewrite(folder / ".ckptcoord/repo.yaml", CONFIGS[name])
    with pytest.raises(CorruptError, match=r"repo\.yaml") as caught:
        open_repository(folder)
    assert len(str(caught.value)) < 1_000
    for error in run(2, folder, lambda c, _: None).errors:
        assert isinstance(error, CorruptError)
    assert not (folder.parent / "pwned").exists()


def test_a_newer_repository_is_refused_as_such(folder: Path):
    rewrite(folder / ".ckptcoord/repo.yaml", b"format_version: 2\nmore: [1, 2]\n")
    before = sorted(p for p in folder.rglob("*"))
    with pytest.raises(FormatVersionError, match="newer"):
        CheckpointCoordinator([], output_dir=folder)
    assert sorted(p for p in folder.rglob("*")) == before


# --- one bit ------------------------------------------------------------------------------------

CLASSES = {
    "shard": "checkpoint-2/" + SHARD,
    "own shard": "checkpoint-2/own.rank00001.safetensors",
    "state": "checkpoint-2/model.state.json",
    "own state": "checkpoint-2/own.rank00000.state.json",
    "manifest": "checkpoint-2/" + MANIFEST,
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_found_and_the_file_named(
    folder: Path, name: str
):
    path = folder / CLASSES[name]
    data = path.read_bytes()
    repository = open_repository(folder)
    commit = repository.resolve("main@2")
    for number in range(60):
        offset = number * (len(data) - 1) // 59
        flipped = bytearray(data)
        flipped[offset] ^= 1 << (number % 8)
        rewrite(path, bytes(flipped))
        report = verify_checkpoint(repository, commit, threads=1)
        harmful = [finding for finding in report.findings if finding.harmful]
        assert [finding.path for finding in harmful] == [CLASSES[name]], offset
    assert_refused(folder, CkptError, path.name)


def test_the_index_is_for_others_and_still_verified(folder: Path):
    path = folder / "checkpoint-2/model.safetensors.index.json"
    damage_flip(path)
    assert_verify_finds(folder, path.name)


def test_one_flipped_bit_in_the_log_never_gives_another_checkpoint(folder: Path):
    """An entry has no digest of its own: what a flip can do is bounded by what it points at."""
    path = last(folder)
    data = path.read_bytes()
    state = open_repository(folder).state()
    known = {commit.manifest_digest for commit in state.commits.values()}
    for number in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[number // 8] ^= 1 << (number % 8)
        rewrite(path, bytes(flipped))
        repository = open_repository(folder)
        with suppress(CkptError):
            commit = repository.resolve("latest")
            manifest = repository.manifest(commit)
            assert commit.manifest_digest in known
            assert manifest.step == commit.checkpoint_id.step


# --- what is left behind -------------------------------------------------------------------------


def test_no_umask_opens_a_file_to_others_and_no_secret_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = "s3cr3t-c4n4ry-7f1e"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    old = os.umask(0)
    try:
        folder = tmp_path / "new" / "parents" / "run"
        model = torch.nn.Linear(2, 2)
        with CheckpointCoordinator(
            [StateComponent("model", model, REPLICATED)], output_dir=folder
        ) as coordinator:
            for step in range(3):
                coordinator.save_checkpoint(step=step, validate=True)
            coordinator.set_best_checkpoint("main@1")
            coordinator.save_model()
            coordinator.save_model(tmp_path / "new" / "exports" / "model")
            failures = []
            for ref in ("main@9", "../x"):
                with pytest.raises(CkptError) as caught:
                    coordinator.load_checkpoint(ref)
                failures.append(str(caught.value) + repr(caught.value.to_document()))
    finally:
        os.umask(old)
    assert not any(secret in text for text in failures)
    found = list((tmp_path / "new").rglob("*"))
    assert len(found) > 20
    for path in [tmp_path / "new", *found]:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))
        assert path.is_dir() or secret.encode() not in path.read_bytes()
