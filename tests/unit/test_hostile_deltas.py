"""Delta files that someone tampered with: refused by file and tensor, before much is allocated.

Digests are recomputed where a forger would: all that a file says of itself is as hostile as its
frames.
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ckptcoord
from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.codec.cast import cast
from ckptcoord.codec.delta import (
    DecodeError,
    FrameKind,
    Level,
    check_frames,
    decode,
    encode,
    frames,
    needs_base,
)
from ckptcoord.codec.digest import blake3_digest, xxh3
from ckptcoord.codec.recipe import DELTA_KEY, PART_BYTES
from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.core.lossy import Lossy
from ckptcoord.core.manifest import FileKind
from ckptcoord.dist.world import Solo
from ckptcoord.errors import (
    CkptError,
    CorruptError,
    DigestMismatchError,
    FormatVersionError,
    UnsafePathError,
)
from ckptcoord.plan.lineage import Compression
from ckptcoord.repo import deltas
from ckptcoord.repo.compaction import compact
from ckptcoord.repo.deltas import open_tensors
from ckptcoord.repo.readjobs import check_inputs, fill_tensors
from ckptcoord.repo.repository import Repository, open_repository
from ckptcoord.repo.shards import TensorSource, WrittenFile, write_shard
from ckptcoord.repo.stated import StatedSizes
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.store.local import LocalStore
from ckptcoord.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ckptcoord.codec.tensorfile import TensorEntry
    from ckptcoord.repo.readers import TensorReader
    from ckptcoord.store.base import Reader, Store

    Bytes = NDArray[np.uint8]

BASE = "checkpoint-1/model.safetensors"
DELTA = "checkpoint-2/model.delta.safetensors"
THIRD = "checkpoint-3/model.delta.safetensors"
SMALL = 1 << 20  # what a refusal may allocate
ELEMENTS = 300


class Counting(MemoryStore):
    """Knows how many files were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = 0

    def open(self, path: str) -> Reader:
        self.opened += 1
        return super().open(path)


def noise(nbytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def floats(seed: int = 0, change: float = 0.0) -> Bytes:
    values = np.random.default_rng(seed).standard_normal(ELEMENTS)
    return (values * (1 + change)).astype(np.float32).view(np.uint8)


OLD, NEW = floats(), floats(change=1e-5)


def shard(
    store: Store,
    path: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...], Bytes]],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    store.make_dirs(path.rpartition("/")[0])
    sources = [
        TensorSource(spec=TensorSpec(name=n, dtype=d, shape=s), read=lambda data=data: data)
        for n, (d, s, data) in tensors.items()
    ]
    return write_shard(store, path, sources, metadata=metadata, threads=1)


def forge(
    store: Store,
    recipes: dict[str, dict[str, Any]],
    *,
    coded: Mapping[str, bytes] | None = None,
    sources: list[Any] | None = None,
    path: str = DELTA,
    **more: Any,
) -> WrittenFile:
    """A delta file that says just this, with all its digests as they should be."""
    document = {
        "format_version": 1,
        "part_bytes": PART_BYTES,
        "sources": sources or [],
        "tensors": recipes,
        **more,
    }
    entries = {
        name: ("U8", (len(data),), np.frombuffer(data, np.uint8))
        for name, data in (coded or {}).items()
    }
    return shard(store, path, entries, {DELTA_KEY: json.dumps(document)})


def recipe(how: str, new: Bytes = NEW, source: int | None = 0, **more: Any) -> dict[str, Any]:
    dtype = more.get("dtype", "F32")
    value = {
        "dtype": dtype,
        "shape": [new.nbytes // ITEM_BYTES[dtype]],
        "digest": str(blake3_digest(new.data)),
        "how": how,
        **more,
    }
    return value if source is None else {"from": [source, "w"], **value}


def listed(written: WrittenFile) -> list[Any]:
    return [written.path, written.size_bytes, str(written.digest)]


def refusal(store: Store, written: WrittenFile, name: str = "w") -> CkptError:
    """What reading a tensor raises, in each way; nothing large is allocated for it."""
    with open_tensors(
        store, written.path, expected=written.digest, size_bytes=written.size_bytes
    ) as reader:
        entry = reader.find(name)
        assert entry is not None
        with pytest.raises(CkptError) as caught:
            reader.check(entry)
        tracemalloc.start()  # now: what is made once for all tensors is not this one's
        try:
            with pytest.raises(type(caught.value)):
                reader.check(entry)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < min(entry.spec.nbytes, PART_BYTES) + SMALL
        if entry.spec.nbytes < SMALL:
            out = memoryview(bytearray(entry.spec.nbytes))
            with pytest.raises(type(caught.value)):
                reader.read_into(entry, out)
            with pytest.raises(CkptError, match=repr(name)):
                load(reader, entry)
    error = caught.value
    assert written.path in str(error)
    assert repr(name) in str(error)
    assert len(str(error)) < 1_000
    return error


def load(reader: TensorReader, entry: TensorEntry) -> bytes:
    """A tensor as a load reads it: its inputs are checked, then it is filled."""
    out = bytearray(entry.spec.nbytes)
    job = reader, entry, memoryview(out)
    (proof,) = check_inputs([job], {}, threads=1)
    fill_tensors([(job, proof)], threads=1)
    return bytes(out)


def found_by_check(store: Store, written: WrittenFile, name: str = "w") -> CkptError:
    """What a load raises before anything live changes, and without decoding anything."""
    with (
        open_tensors(store, written.path, expected=written.digest) as reader,
        pytest.MonkeyPatch.context() as patch,
    ):
        entry = reader.find(name)
        assert entry is not None
        patch.setattr(deltas, "decode", lambda *_, **__: pytest.fail("decoded"))
        with pytest.raises(CkptError) as caught:
            check_inputs([(reader, entry, memoryview(b""))], {}, threads=1)
    return caught.value


def coded_over(store: Store, base: WrittenFile, **more: Any) -> WrittenFile:
    data = encode(NEW, OLD, dtype="F32")
    return forge(
        store,
        {"w": recipe("coded", parts=[len(data)], **more)},
        coded={"w": data},
        sources=[listed(base)],
    )


def old_base(store: Store) -> WrittenFile:
    return shard(store, BASE, {"w": ("F32", (ELEMENTS,), OLD)})


def test_what_is_forged_below_would_be_right_without_the_forgery() -> None:
    store = MemoryStore()
    assert read(store, coded_over(store, old_base(store))) == NEW.tobytes()
    assert needs_base(memoryview(GOOD))


# --- the base ------------------------------------------------------------------------------------


def test_a_base_that_is_gone_is_named_with_file_and_tensor() -> None:
    store = MemoryStore()
    written = coded_over(store, old_base(store))
    store.remove_tree("checkpoint-1")
    error = refusal(store, written)
    assert isinstance(error, CorruptError)
    assert BASE in str(error)


@pytest.mark.parametrize("how", ["same", "cast"])
def test_what_should_be_beside_and_is_not_is_named(how: str) -> None:
    store = MemoryStore()
    one = recipe("same") if how == "same" else recipe("cast", NEW[::2].copy(), dtype="BF16")
    written = forge(store, {"w": one}, sources=[["./other.safetensors", 0, None]])
    assert "checkpoint-2/other.safetensors" in str(refusal(store, written))


@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 64, bytes(range(256)) * 8])
def test_a_base_that_is_no_shard_is_refused(content: bytes) -> None:
    store = MemoryStore()
    base = old_base(store)
    source = replace(base, size_bytes=len(content)) if content else base
    written = coded_over(store, source)
    store.remove_tree(BASE)
    store.put(BASE, content)
    assert BASE in str(refusal(store, written))


@pytest.mark.parametrize(
    "other",
    [
        {"w": ("F32", (ELEMENTS,), floats(2))},
        {"w": ("F32", (ELEMENTS + 1,), noise(4 * ELEMENTS + 4))},
        {"v": ("F32", (ELEMENTS,), OLD)},
    ],
)
def test_a_base_of_another_repository_is_refused_by_its_digest_or_size(other: Any) -> None:
    store, elsewhere = MemoryStore(), MemoryStore()
    written = coded_over(store, old_base(elsewhere))
    shard(store, BASE, other)
    assert BASE in str(refusal(store, written))


def test_who_says_what_a_base_should_be_is_named() -> None:
    store = MemoryStore()
    base = old_base(store)
    claim = replace(base, size_bytes=1 << 60)
    error = refusal(store, coded_over(store, claim))
    assert f"{BASE}: the file has {base.size_bytes} bytes, the recipe says {1 << 60}" in str(error)


def test_frames_over_a_base_that_the_forger_vouches_for_fail_the_tensors_digest() -> None:
    store = MemoryStore()
    base = shard(store, BASE, {"w": ("F32", (ELEMENTS,), floats(2))})
    error = refusal(store, coded_over(store, base))
    assert isinstance(error, DigestMismatchError)
    assert error.tensor == "w"


def test_a_base_that_is_damaged_is_named() -> None:
    store = MemoryStore()
    base = old_base(store)
    written = coded_over(store, base)
    damage(store, BASE)
    error = refusal(store, written)
    assert isinstance(error.__cause__, DigestMismatchError)
    assert f"'w' is made out of 'w': {BASE}: tensor 'w' is corrupt" in str(error)
    assert BASE in str(found_by_check(store, written))


def third(how: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A recipe of a tensor over one that is NEW, and its coded bytes."""
    if how == "same":
        return recipe(how), {}
    if how == "cast":
        narrow = np.empty(2 * ELEMENTS, np.uint8)
        cast(NEW, "F32", narrow, "BF16")
        return recipe(how, narrow, dtype="BF16"), {}
    if how == "update":
        data = encode(np.zeros_like(NEW), None, dtype="U32")
        return recipe(how, parts=[len(data)], step=0.5), {"w": data}
    data = encode(NEW, NEW, dtype="F32")
    return recipe(how, parts=[len(data)]), {"w": data}


@pytest.mark.parametrize("link", [0, 1, 2])
@pytest.mark.parametrize("how", ["coded", "same", "cast", "update"])
def test_damage_anywhere_along_a_chain_is_found_by_the_check(how: str, link: int) -> None:
    store = MemoryStore()
    files = [old_base(store)]
    files.append(coded_over(store, files[0]))
    one, coded = third(how)
    files.append(forge(store, {"w": one}, coded=coded, sources=[listed(files[1])], path=THIRD))
    with open_tensors(store, THIRD, expected=files[2].digest) as reader:
        assert str(blake3_digest(load(reader, reader.header.entries[0]))) == one["digest"]
    if link == 2 and not coded:
        return  # it has no bytes of its own
    damage(store, files[link].path)
    error = found_by_check(store, files[2])
    assert isinstance(error, DigestMismatchError)
    assert files[link].path in str(error)
    assert error.tensor == "w"


def damage(store: MemoryStore, path: str) -> None:
    content = bytearray(store.read(path, limit_bytes=1 << 20))
    content[-5] ^= 1
    store.put(path, bytes(content))


def test_a_tensor_that_is_the_same_as_another_one_is_refused_by_their_digests() -> None:
    store = MemoryStore()
    written = forge(store, {"w": recipe("same")}, sources=[listed(old_base(store))])
    assert isinstance(found_by_check(store, written), DigestMismatchError)
    assert isinstance(refusal(store, written), DigestMismatchError)


def test_a_base_without_the_tensor_is_refused() -> None:
    store = MemoryStore()
    base = shard(store, BASE, {"v": ("F32", (ELEMENTS,), OLD)})
    assert "does not hold" in str(refusal(store, coded_over(store, base)))


FORMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "another shape of as many bytes": ("F32", (ELEMENTS // 2, 2)),
    "another dtype of as many bytes": ("I32", (ELEMENTS,)),
    "a narrower dtype of as many bytes": ("BF16", (2 * ELEMENTS,)),
    "raw bytes": ("U8", (4 * ELEMENTS,)),
    "less": ("F32", (ELEMENTS - 1,)),
    "more": ("F32", (ELEMENTS + 1,)),
    "nothing": ("F32", (0,)),
    "wider": ("F64", (ELEMENTS,)),
}


@pytest.mark.parametrize("how", ["coded", "same", "update"])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_base_of_another_form_is_refused(form: str, how: str) -> None:
    dtype, shape = FORMS[form]
    store = MemoryStore()
    base = shard(store, BASE, {"w": (dtype, shape, noise(ITEM_BYTES[dtype] * int(np.prod(shape))))})
    data = encode(NEW, OLD, dtype="F32")
    more: dict[str, Any] = {} if how == "same" else {"parts": [len(data)]}
    if how == "update":
        more["step"] = 0.5
    written = forge(
        store,
        {"w": recipe(how, **more)},
        coded={} if how == "same" else {"w": data},
        sources=[listed(base)],
    )
    assert dtype in str(refusal(store, written))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F32", (ELEMENTS + 1,)), ("I32", (ELEMENTS,)), ("F64", (ELEMENTS // 2,))]
)
def test_a_cast_of_another_form_is_refused(dtype: str, shape: tuple[int, ...]) -> None:
    store = MemoryStore()
    data = noise(ITEM_BYTES[dtype] * int(np.prod(shape)))
    base = shard(store, BASE, {"w": (dtype, shape, data)})
    one = recipe("cast", noise(2 * ELEMENTS), dtype="BF16")
    refusal(store, forge(store, {"w": one}, sources=[listed(base)]))


def test_a_cast_of_other_values_fails_the_tensors_digest() -> None:
    store = MemoryStore()
    narrow = np.empty(2 * ELEMENTS, np.uint8)
    cast(NEW, "F32", narrow, "BF16")
    one = recipe("cast", narrow, dtype="BF16")
    written = forge(store, {"w": one}, sources=[listed(old_base(store))])
    assert isinstance(refusal(store, written), DigestMismatchError)


def test_a_claim_of_petabytes_is_refused_before_any_is_allocated() -> None:
    store = MemoryStore()
    one = {**recipe("same"), "shape": [2**50]}
    written = forge(store, {"w": one}, sources=[listed(old_base(store))])
    assert "1125899906842624" in str(refusal(store, written))


def test_a_few_frames_that_claim_gigabytes_are_held_to_the_manifest(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its parts is lawful, and so are all digests."""
    part = encode(np.zeros(PART_BYTES, np.uint8), None, dtype="F32")
    parts = 3 << 8
    store = MemoryStore()
    claim = recipe("coded", source=None, parts=[len(part)] * parts)
    claim["shape"] = [parts * PART_BYTES // 4]
    written = forge(store, {"w": claim}, coded={"w": part * parts})
    assert written.size_bytes < SMALL
    repository = open_repository(run)
    manifest = repository.manifest(repository.resolve("latest"))
    (record,) = (one for one in manifest.files if one.kind is FileKind.DELTA)
    with open_tensors(store, written.path, expected=written.digest) as reader:
        with repository.open_shard(repository.resolve("latest"), record) as own:
            StatedSizes(manifest).check(record, own)
        with pytest.raises(CorruptError) as caught:
            StatedSizes(manifest).check(record, reader)
    assert caught.value.tensor == "w"
    assert str(caught.value).startswith(f"{DELTA}: its tensors have 3,221,225,472 bytes ")
    assert "all of 'object' has 32," in str(caught.value)
    forged = partial(open_tensors, store, written.path, expected=written.digest)
    monkeypatch.setattr(Repository, "open_shard", lambda *_: forged())
    newest = repository.resolve("latest").checkpoint_id
    with pytest.raises(CorruptError, match="3,221,225,472 bytes"):
        compact(repository, newest, writer="0" * 32)


def test_a_newer_base_is_said_to_be_newer() -> None:
    store = MemoryStore()
    base = forge(store, {}, path=BASE, format_version=2)
    with pytest.raises(FormatVersionError, match="checkpoint-1"):
        read(store, coded_over(store, base))


def test_a_base_behind_a_link_is_not_opened(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    written = coded_over(store, old_base(store))
    (tmp_path / BASE).rename(tmp_path / "elsewhere")
    (tmp_path / BASE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="checkpoint-1"):
        read(store, written)


def read(store: Store, written: WrittenFile, name: str = "w") -> bytes:
    with open_tensors(
        store, written.path, expected=written.digest, size_bytes=written.size_bytes
    ) as reader:
        entry = reader.find(name)
        assert entry is not None
        out = bytearray(entry.spec.nbytes)
        reader.read_into(entry, memoryview(out))
        return bytes(out)


# --- chains --------------------------------------------------------------------------------------


def test_a_tensor_made_out_of_itself_is_refused_without_opening_files_over_and_over() -> None:
    store = Counting()
    file = DELTA.rpartition("/")[2]
    written = forge(store, {"w": recipe("same")}, sources=[[f"./{file}", 0, None]])
    store.opened = 0
    assert "itself" in str(refusal(store, written))
    assert store.opened == 2


def test_files_that_go_in_a_circle_are_refused() -> None:
    store = Counting()
    names = [f"part{i}.delta.safetensors" for i in range(3)]
    for name, after in zip(names, names[1:] + names[:1], strict=True):
        data = encode(NEW, OLD, dtype="F32")
        written = forge(
            store,
            {"w": recipe("coded", parts=[len(data)])},
            coded={"w": data},
            sources=[[f"./{after}", 0, None]],
            path=f"checkpoint-2/{name}",
        )
    store.opened = 0
    refusal(store, written)
    assert store.opened == 4


def test_tensors_of_one_file_that_go_in_a_circle_are_refused() -> None:
    store = MemoryStore()
    file = DELTA.rpartition("/")[2]
    recipes = {
        "w": {**recipe("same"), "from": [0, "v"]},
        "v": {**recipe("same"), "from": [0, "w"]},
    }
    written = forge(store, recipes, sources=[[f"./{file}", 0, None]])
    refusal(store, written, "w")
    refusal(store, written, "v")


def links(store: Store, count: int) -> WrittenFile:
    """Deltas that each say to be the one before."""
    written = shard(store, "checkpoint-0/m.safetensors", {"w": ("F32", (ELEMENTS,), NEW)})
    for number in range(1, count + 1):
        path = f"checkpoint-{number}/m.delta.safetensors"
        written = forge(store, {"w": recipe("same")}, sources=[listed(written)], path=path)
    return written


def test_a_hundred_links_are_read_and_one_more_is_refused() -> None:
    store = MemoryStore()
    assert read(store, links(store, 100)) == NEW.tobytes()
    store = MemoryStore()
    assert "100" in str(refusal(store, links(store, 101)))


# --- frames --------------------------------------------------------------------------------------


def over(new: Bytes, old: Bytes | None, dtype: str = "F32") -> bytes:
    return encode(new, old, dtype=dtype)


GOOD = over(NEW, OLD)
FRAMES: dict[str, bytes] = {
    "nothing": b"",
    "a byte": b"\0",
    "junk": noise(500).tobytes(),
    "zeros": bytes(500),
    "a byte behind": GOOD + b"\0",
    "a header behind": GOOD + GOOD[:20],
    "twice": GOOD + GOOD,
    "cut": GOOD[:-1],
    "its header only": GOOD[:20],
    "of a smaller tensor": over(NEW[:-4], OLD[:-4]),
    "of a larger tensor": over(np.append(NEW, NEW), np.append(OLD, OLD)),
    "of wider elements": over(NEW, OLD, "F64"),
    "of narrower elements": over(NEW, OLD, "U8"),
    "a bomb of zeros": over(np.zeros(16 << 20, np.uint8), None),
    "a bomb over a base": over(np.zeros(16 << 20, np.uint8), np.zeros(16 << 20, np.uint8)),
}


@pytest.mark.parametrize("name", sorted(FRAMES))
def test_frames_that_are_not_of_this_part_are_refused(name: str) -> None:
    store = MemoryStore()
    data = FRAMES[name]
    written = forge(
        store,
        {"w": recipe("coded", parts=[len(data)])},
        coded={"w": data},
        sources=[listed(old_base(store))],
    )
    assert not isinstance(refusal(store, written), DigestMismatchError)
    assert not isinstance(found_by_check(store, written), DigestMismatchError)


@pytest.mark.parametrize("name", ["a bomb of zeros", "of a larger tensor", "junk", "nothing"])
def test_steps_that_are_not_of_this_part_are_refused(name: str) -> None:
    store = MemoryStore()
    data = FRAMES[name]
    written = forge(
        store,
        {"w": recipe("update", parts=[len(data)], step=1e300)},
        coded={"w": data},
        sources=[listed(old_base(store))],
    )
    refusal(store, written)
    found_by_check(store, written)


@pytest.mark.parametrize("step", [1e308, -1e308, 0.0, 5e-324])
def test_steps_out_of_range_fail_the_tensors_digest(step: float) -> None:
    store = MemoryStore()
    data = encode(noise(4 * ELEMENTS), None, dtype="I32")
    written = forge(
        store,
        {"w": recipe("update", parts=[len(data)], step=step)},
        coded={"w": data},
        sources=[listed(old_base(store))],
    )
    assert isinstance(refusal(store, written), DigestMismatchError)


def blocks_changed(blocks: tuple[int, ...]) -> bytes:
    """Frames of 2,500 bytes: two blocks and a short one, of which these have changed entirely."""
    new = noise(2500, 1)
    old = new.copy()
    for block in blocks:
        old[1024 * block : 1024 * (block + 1)] ^= noise(old[1024 * block :][:1024].size, 2)
    return encode(new, old, dtype="U8")


@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 1), (0, 2), (1, 2)])
def test_a_bitmap_says_how_many_bytes_follow_it(blocks: tuple[int, ...]) -> None:
    data = bytearray(blocks_changed(blocks))
    (frame,) = frames(memoryview(data))
    assert frame.has_bitmap
    assert frame.kind is FrameKind.STORED
    assert data[frame.begin] == sum(1 << block for block in blocks)
    check_frames(memoryview(data), 2500, dtype="U8", has_base=True)
    data.append(0)
    data[8:12] = (frame.end - frame.begin + 1).to_bytes(4, "little")  # the header's payload bytes
    with pytest.raises(DecodeError, match="another size"):
        check_frames(memoryview(data), 2500, dtype="U8", has_base=True)


@pytest.mark.parametrize("bitmap", [0, 7, 8, 255])
def test_a_bitmap_of_no_block_of_all_or_of_more_is_refused(bitmap: int) -> None:
    data = bytearray(over(np.append(NEW, NEW), np.append(OLD, NEW)))
    (frame,) = frames(memoryview(data))
    assert frame.has_bitmap
    assert frame.kind is not FrameKind.STORED
    data[frame.begin] = bitmap
    with pytest.raises(DecodeError, match="bitmap"):
        check_frames(memoryview(data), frame.raw_bytes, dtype="F32", has_base=True)


def test_frames_of_another_tensor_fail_the_digest() -> None:
    store = MemoryStore()
    data = over(floats(3), None)
    one = recipe("coded", source=None, parts=[len(data)])
    error = refusal(store, forge(store, {"w": one}, coded={"w": data}))
    assert isinstance(error, DigestMismatchError)


def test_frames_that_need_a_base_and_have_none_fail_the_digest() -> None:
    store = MemoryStore()
    data = over(np.concatenate((OLD[:400], NEW[400:])), OLD)
    one = recipe("coded", source=None, parts=[len(data)])
    written = forge(store, {"w": one}, coded={"w": data})
    refusal(store, written)
    assert "needs a base" in str(found_by_check(store, written))


def test_fingerprints_of_something_else_are_found_by_who_examines_the_tensor() -> None:
    """Only decoding tells; what goes by the digest reads it."""
    store = MemoryStore()
    base = shard(store, BASE, {"w": ("F32", (ELEMENTS,), OLD)})
    right = xxh3(NEW.data).hex()
    for prints in (right, "0" * len(right)):
        written = coded_over(store, base, xxh3=prints)
        with open_tensors(store, written.path, expected=written.digest) as reader:
            entry = reader.find("w")
            assert entry is not None
            out = bytearray(entry.spec.nbytes)
            reader.read_into(entry, memoryview(out))
            assert bytes(out) == NEW.tobytes()
            if prints == right:
                reader.examine(entry)
                assert load(reader, entry) == NEW.tobytes()
                store.remove_tree("checkpoint-2")
                continue
            with pytest.raises(CorruptError, match=r"'w' is sound, and the fingerprints \(xxh3\)"):
                reader.examine(entry)
            with pytest.raises(CorruptError, match="or the fingerprints are wrong"):
                load(reader, entry)


def test_parts_in_another_order_are_refused() -> None:
    store = MemoryStore()
    new = noise(PART_BYTES + 4)
    first, last = over(new[:PART_BYTES], None), over(new[PART_BYTES:], None)
    one = recipe("coded", new, None, parts=[len(last), len(first)])
    written = forge(store, {"w": one}, coded={"w": last + first})
    with pytest.raises(CorruptError, match="'w'"):
        read(store, written)


@pytest.mark.parametrize("parts", [[2 * PART_BYTES + 1], [10**15], [2**62]])
def test_a_part_that_would_take_much_memory_is_refused_with_the_recipe(parts: list[int]) -> None:
    store = MemoryStore()
    data = bytes(min(parts[0], 2 * PART_BYTES + 1))
    written = forge(store, {"w": recipe("coded", source=None, parts=parts)}, coded={"w": data})
    with open_tensors(store, written.path, expected=written.digest) as reader:
        for ask in (lambda: reader.find("w"), lambda: reader.header):
            with pytest.raises(CorruptError, match="'w'"):
                ask()


@settings(max_examples=300)
@given(
    at=st.integers(0, len(GOOD) - 1), bits=st.integers(1, 255), cut=st.none() | st.integers(0, 40)
)
def test_any_damage_to_a_frame_is_refused(at: int, bits: int, cut: int | None) -> None:
    data = bytearray(GOOD)
    data[at] ^= bits
    if cut is not None:
        del data[at : at + cut]
    store = MemoryStore()
    base = old_base(store)
    one = recipe("coded", parts=[len(data)])
    written = forge(store, {"w": one}, coded={"w": bytes(data)}, sources=[listed(base)])
    assume(bytes(data) != GOOD)
    with pytest.raises(CorruptError, match="'w'"):
        read(store, written)
    with (
        open_tensors(store, written.path, expected=written.digest) as reader,
        pytest.raises(CorruptError, match="'w'"),
    ):
        load(reader, reader.header.entries[0])


@settings(max_examples=300)
@given(
    seed=st.integers(0, 99),
    size=st.integers(1, 5000),
    every=st.integers(1, 3000),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    level=st.sampled_from(Level),
    has_base=st.booleans(),
    at=st.integers(0, 10_000),
    bits=st.integers(1, 255),
)
def test_frames_that_decode_pass_the_check_of_their_structure(
    seed: int,
    size: int,
    every: int,
    dtype: str,
    level: Level,
    has_base: bool,
    at: int,
    bits: int,
) -> None:
    """And what does not pass is refused by the decoder, too."""
    new = noise(size, seed)
    old = new.copy()
    old[::every] ^= 1
    data = bytearray(encode(new, old if has_base else None, dtype=dtype, level=level))
    check_frames(memoryview(data), size, dtype=dtype, has_base=has_base)
    data[at % len(data)] ^= bits
    try:
        check_frames(memoryview(data), size, dtype=dtype, has_base=has_base)
    except DecodeError:
        with pytest.raises(DecodeError):
            decode(memoryview(data), old, dtype=dtype)


@settings(max_examples=100)
@given(at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_any_damage_to_a_delta_file_is_refused(at: float, bits: int) -> None:
    store = MemoryStore()
    written = coded_over(store, old_base(store))
    content = bytearray(store.read(DELTA, limit_bytes=1 << 20))
    content[int(at * len(content))] ^= bits
    store.put(DELTA, bytes(content))
    with pytest.raises((CorruptError, FormatVersionError), match="checkpoint-2"):
        read(store, written)


# --- whole repositories --------------------------------------------------------------------------


def state(seed: int, step: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    w = torch.randn(5000)
    return {"w": w + 1e-4 * step * torch.randn(5000), "frozen": torch.randn(3000), "step": step}


def train(folder: Path, seed: int) -> Path:
    """An anchor and two deltas."""
    for step in range(3):
        ckptcoord.save(state(seed, step), folder, keep=5)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return train(tmp_path / "run", 0)


def newest(folder: Path) -> tuple[Path, Path]:
    """The folders of the anchor and of the newest delta."""
    repository = open_repository(folder)
    delta = repository.resolve("latest")
    manifest = repository.manifest(delta)
    assert manifest.base is not None
    return folder / repository.resolve(manifest.base).path, folder / delta.path


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(CkptError) as caught:
        ckptcoord.load(folder)
    assert isinstance(caught.value, CorruptError), repr(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    repository = open_repository(folder)
    assert not verify_checkpoint(repository, repository.resolve("latest")).ok


def test_what_was_given_up_is_said_again_of_what_has_not_changed_since(tmp_path: Path) -> None:
    values = {"w": torch.randn(5000)}
    component = StateComponent("model", values, SharingPattern.GLOBAL)
    lossy = {"model": Lossy(update_fraction=0.25)}
    rule = Compression(level="auto", base="anchor", lossy=lossy)  # type: ignore[arg-type]
    config = CoordinatorConfig(compression=rule)
    with CheckpointCoordinator(
        [component], dist=Solo(), output_dir=tmp_path / "run", config=config
    ) as coordinator:
        coordinator.save_checkpoint(step=1)
        values["w"] += 1e-4 * torch.randn(5000)
        coordinator.save_checkpoint(step=2)
        coordinator.save_checkpoint(step=3)
        repository = coordinator.repository
        second, third = (repository.manifest(repository.resolve(f"main@{n}")) for n in (2, 3))
    assert second.components["model"].given_up > 0
    assert third.components["model"].given_up == second.components["model"].given_up


def test_the_deltas_load_where_nobody_tampered(run: Path) -> None:
    newest(run)
    loaded = ckptcoord.load(run)
    assert torch.equal(loaded["w"], state(0, 2)["w"])


def test_a_checkpoint_on_the_base_of_another_repository_is_refused(
    run: Path, tmp_path: Path
) -> None:
    other = train(tmp_path / "other", 1)
    (anchor, delta), (others, _) = newest(run), newest(other)
    shutil.rmtree(anchor)
    shutil.copytree(others, anchor)
    assert_refused(run, delta.name, anchor.name)


def test_a_delta_file_of_another_repository_is_refused(run: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "other", 1)
    (_, delta), (_, others) = newest(run), newest(other)
    (own,) = delta.glob("*.delta.safetensors")
    own.unlink()
    shutil.copyfile(others / own.name, own)
    assert_refused(run, f"{delta.name}/{own.name}")


def test_a_checkpoint_whose_base_was_deleted_by_hand_is_refused(run: Path) -> None:
    anchor, delta = newest(run)
    shutil.rmtree(anchor)
    assert_refused(run, delta.name, anchor.name, "missing")


def test_a_damaged_anchor_is_found_out_by_its_delta(run: Path) -> None:
    anchor, _ = newest(run)
    (file,) = anchor.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert_refused(run, f"{anchor.name}/{file.name}: tensor", "is corrupt")
