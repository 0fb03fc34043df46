"""Delta files: what was written is what is read, whatever it is made out of."""

import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.codec.cast import cast
from ckptcoord.codec.delta import Level
from ckptcoord.codec.digest import Hasher, blake3_digest, xxh3
from ckptcoord.codec.recipe import CAST_FROM, PART_BYTES, How, SourceFile
from ckptcoord.codec.tensorfile import TensorSpec, shard_digest
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.core.lossy import Lossy
from ckptcoord.errors import (
    ConfigError,
    CorruptError,
    DigestMismatchError,
    FormatVersionError,
    InvalidNameError,
)
from ckptcoord.repo import deltas, deltawriting, readers
from ckptcoord.repo.deltacoding import DeltaSource, Home
from ckptcoord.repo.deltas import DeltaReader, SourceFiles, open_tensors
from ckptcoord.repo.deltawriting import DeltaFile, write_delta, write_deltas
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.readjobs import check_inputs, check_tensors, fill_tensors, read_tensors
from ckptcoord.repo.shards import TensorSource, write_shard
from ckptcoord.store.memory import MemoryStore

MIB = 1 << 20
BIG = (9 * MIB + 12) // 4  # elements of F32: three parts, the last one short


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class CountingStore(MemoryStore):
    """Knows how often each file was opened, and which are open."""

    def __init__(self):
        super().__init__()
        self.opened = []
        self.is_open = []

    def open(self, path):
        reader = super().open(path)
        self.opened.append(path)
        self.is_open.append(path)
        leave = reader.__exit__
        store = self

        class Counted(type(reader)):
            __slots__ = ()

            def __exit__(self, *about):
                store.is_open.remove(path)
                leave(*about)

        reader.__class__ = Counted
        return reader


def tensor(data, dtype="U8", shape=None):
    array = np.frombuffer(bytes(data), np.uint8)
    return dtype, (array.size // ITEM_BYTES[dtype],) if shape is None else shape, array


def noise(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def floats(count, seed=0, kind=np.float32):
    return np.random.default_rng(seed).standard_normal(count).astype(kind)


def nudged(values, seed=1):
    """As a step of training leaves them."""
    return (values * (1 + 1e-4 * floats(values.size, seed))).astype(values.dtype)


def spec_of(name, given):
    dtype, shape, _ = given
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def as_source(written):
    """The file, as a source of others."""
    return SourceFile(path=written.path, size_bytes=written.size_bytes, digest=written.digest)


def save_anchor(store, folder, tensors, file="model.safetensors"):
    store.make_dirs(folder)
    sources = [
        TensorSource(spec=spec_of(name, one), read=lambda one=one: one[2])
        for name, one in tensors.items()
    ]
    written = write_shard(store, f"{folder}/{file}", sources)
    home = as_source(written)
    return written, {
        entry.spec.name: Home(file=home, name=entry.spec.name, spec=entry.spec, digest=entry.digest)
        for entry in written.entries
    }


def save_delta(
    store,
    folder,
    tensors,
    *,
    bases=None,
    homes=(),
    wide=None,
    file="model.delta.safetensors",
    threads=2,
    level=Level.AUTO,
):
    store.make_dirs(folder)
    known = {home.digest: home for home in homes}
    sources = [
        DeltaSource(
            spec=spec_of(name, one),
            read=lambda one=one: one[2],
            base=(bases or {}).get(name),
            wide=[wide[name]] if wide and name in wide else (),
        )
        for name, one in tensors.items()
    ]
    written = write_delta(
        store, f"{folder}/{file}", sources, homes=known.get, level=level, threads=threads
    )
    home = as_source(written.file)
    return written, {
        one.spec.name: Home(file=home, name=one.spec.name, spec=one.spec, digest=one.digest)
        for one in written.recipes
    }


def open_written(store, written):
    return open_tensors(store, written.path, expected=written.digest, size_bytes=written.size_bytes)


def read_all(reader, threads=2):
    outs = {one.spec.name: bytearray(one.spec.nbytes) for one in reader.header.entries}
    jobs = [(reader, one, memoryview(outs[one.spec.name])) for one in reader.header.entries]
    read_tensors(jobs, threads=threads)
    return {name: bytes(out) for name, out in outs.items()}


def load_all(reader, threads=2):
    """As a load does it: what they are made out of is checked, then they are filled."""
    outs = {one.spec.name: bytearray(one.spec.nbytes) for one in reader.header.entries}
    jobs = [(reader, one, memoryview(outs[one.spec.name])) for one in reader.header.entries]
    proofs = check_inputs(jobs, {}, threads=threads)
    assert not any(any(out) for out in outs.values()), "a check touches no destination"
    fill_tensors(zip(jobs, proofs, strict=True), threads=threads)
    return {name: bytes(out) for name, out in outs.items()}


def assert_reads_as(store, written, tensors, threads=2):
    with open_written(store, written.file) as reader:
        assert {one.spec for one in reader.header.entries} == {
            spec_of(name, one) for name, one in tensors.items()
        }
        found = read_all(reader, threads)
        assert load_all(reader, threads) == found
    assert found.keys() == tensors.keys()
    for name, (_, _, data) in tensors.items():
        assert found[name] == data.tobytes(), name


def hows(written):
    return {one.spec.name: one.how for one in written.recipes}


# --- the law --------------------------------------------------------------------------------------


@st.composite
def saves(draw):
    """A state, and the one before it: of each tensor the same, changed, other bytes, or nothing."""
    before, after = {}, {}
    for number in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=2)))
        nbytes = ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
        old = noise(nbytes, draw(st.integers(0, 3)))
        new = old.copy()
        what = draw(st.sampled_from(("same", "changed", "other", "new")))
        if what == "changed" and nbytes:
            new[draw(st.integers(0, nbytes - 1)) :: 7] ^= draw(st.integers(1, 255))
        elif what == "other":
            new = noise(nbytes, 9)
        after[f"t{number}"] = dtype, shape, new
        if what != "new":
            before[f"t{number}"] = dtype, shape, old
    return before, after


@settings(max_examples=60)
@given(
    saves(),
    st.integers(1, 3),
    st.sampled_from(Level),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
)
def test_what_was_written_is_read(states, threads, level, names_homes, more):
    before, after = states
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", before)
    written, _ = save_delta(
        store,
        "checkpoint-2",
        after,
        bases=homes,
        homes=homes.values() if names_homes else (),
        threads=threads,
        level=level,
    )
    assert_reads_as(store, written, after, threads)


STATES = {
    "noise over noise": (tensor(noise(9 * MIB + 5)), tensor(noise(9 * MIB + 5, 1))),
    "noise over nothing": (None, tensor(noise(9 * MIB + 5))),
    "trained F32": (
        tensor(floats(BIG).data.cast("B"), "F32"),
        tensor(nudged(floats(BIG)).data.cast("B"), "F32"),
    ),
    "a byte of many": (
        tensor(bytes(10 * MIB)),
        tensor(b"".join((bytes(10 * MIB - 1), b"\1"))),
    ),
    "zeros over nothing": (None, tensor(bytes(10 * MIB), "F64")),
    "exactly two parts": (tensor(noise(2 * PART_BYTES)), tensor(noise(2 * PART_BYTES, 1))),
    "one byte": (tensor(b"a"), tensor(b"b")),
    "one byte over nothing": (None, tensor(b"b")),
    "0-d": (tensor(b"abcd", "F32", ()), tensor(b"abce", "F32", ())),
    "empty": (tensor(b"", "F32", (3, 0)), tensor(b"", "F32", (3, 0))),
    "empty over nothing": (None, tensor(b"", "BF16")),
}


@pytest.mark.parametrize("name", sorted(STATES))
def test_a_tensor_of_any_size_is_made_again(name):
    before, after = STATES[name]
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", {} if before is None else {"t": before})
    written, _ = save_delta(store, "checkpoint-2", {"t": after}, bases=homes)
    (recipe,) = written.recipes
    assert recipe.how is How.CODED
    assert len(recipe.parts) == -(-after[2].nbytes // PART_BYTES)
    assert (recipe.source is None) == (before is None or not after[2].nbytes)
    assert_reads_as(store, written, {"t": after})


def test_what_training_changes_little_takes_less_than_it_is():
    old = floats(BIG)
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", {"t": tensor(old.data.cast("B"), "F32")})
    new = {"t": tensor(nudged(old).data.cast("B"), "F32")}
    delta, _ = save_delta(store, "checkpoint-2", new, bases=homes)
    assert delta.file.size_bytes < 0.75 * old.nbytes


# --- the same -------------------------------------------------------------------------------------


def test_what_is_the_same_costs_its_line_in_the_header_only():
    state = {f"t{i}": tensor(noise(MIB + i, i)) for i in range(4)}
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", state)
    written, _ = save_delta(store, "checkpoint-2", state, bases=homes, homes=homes.values())
    assert set(hows(written).values()) == {How.SAME}
    assert written.file.entries == ()
    assert written.file.size_bytes < 4096
    assert_reads_as(store, written, state)


def test_what_is_at_home_under_another_name_is_named_there():
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", {"a": tensor(b"abcd")})
    written, _ = save_delta(store, "checkpoint-2", {"b": tensor(b"abcd")}, homes=homes.values())
    (recipe,) = written.recipes
    assert recipe.source == (homes["a"].file, "a")
    assert_reads_as(store, written, {"b": tensor(b"abcd")})


@pytest.mark.parametrize("other", [tensor(b"abcd", "F32"), tensor(b"abcd", "U8", (2, 2))])
def test_bytes_of_another_form_are_no_home(other):
    """Readers hold sources to the shape and dtype of what is made out of them."""
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", {"a": other})
    state = {"b": tensor(b"abcd")}
    written, _ = save_delta(store, "checkpoint-2", state, homes=homes.values())
    assert hows(written) == {"b": How.CODED}
    assert_reads_as(store, written, state)


def test_a_known_digest_saves_reading_for_it():
    store = MemoryStore()
    state = {"a": tensor(b"abcd")}
    _, homes = save_anchor(store, "checkpoint-1", state)
    store.make_dirs("checkpoint-2")
    calls = []

    def known(data):
        calls.append(data.tobytes())
        return homes["a"].digest

    source = DeltaSource(spec=spec_of("a", state["a"]), read=lambda: state["a"][2], known=known)
    written = write_delta(
        store,
        "checkpoint-2/m.delta.safetensors",
        [source],
        homes={homes["a"].digest: homes["a"]}.get,
        level=Level.AUTO,
        threads=1,
    )
    assert calls == [b"abcd"]
    assert hows(written) == {"a": How.SAME}


# --- casts ----------------------------------------------------------------------------------------


def rounded(wide, wide_dtype, dtype):
    out = np.empty(wide.nbytes // 2, np.uint8)
    cast(wide.view(np.uint8), wide_dtype, out, dtype)
    return out


WIDE_KINDS = {"F32": np.float32, "F64": np.float64}


@pytest.mark.parametrize("place", ["other delta", "own file", "shard"])
@pytest.mark.parametrize("dtype", sorted(CAST_FROM))
def test_a_cast_of_what_is_in_the_save_costs_nothing(dtype, place):
    wide_dtype = CAST_FROM[dtype]
    values = floats(2 * PART_BYTES // ITEM_BYTES[dtype] + 3, kind=WIDE_KINDS[wide_dtype])
    wide = tensor(values.data.cast("B"), wide_dtype)
    narrow = tensor(rounded(values, wide_dtype, dtype), dtype)
    store = MemoryStore()
    _, homes = save_anchor(
        store, "checkpoint-1", {"master": tensor(nudged(values).data.cast("B"), wide_dtype)}
    )
    own = {"w": narrow}
    file = "optimizer.delta.safetensors"
    if place == "other delta":
        save_delta(store, "checkpoint-2", {"master": wide}, bases=homes, file=file)
    elif place == "shard":
        file = "optimizer.safetensors"
        save_anchor(store, "checkpoint-2", {"master": wide}, file)
    else:
        file = "model.delta.safetensors"
        own["master"] = wide
    written, _ = save_delta(
        store, "checkpoint-2", own, bases=homes, wide={"w": (file, "master", lambda: wide[2])}
    )
    assert hows(written)["w"] is How.CAST
    assert "w" not in {entry.spec.name for entry in written.file.entries}
    assert_reads_as(store, written, own)


def test_what_is_nearly_a_cast_is_coded():
    values = floats(1000)
    narrow = rounded(values, "F32", "BF16")
    narrow[500] ^= 1
    state = {"w": tensor(narrow, "BF16")}
    store = MemoryStore()
    written, _ = save_delta(
        store,
        "checkpoint-1",
        state,
        wide={"w": ("optimizer.delta.safetensors", "master", lambda: values.view(np.uint8))},
    )
    assert hows(written) == {"w": How.CODED}
    assert_reads_as(store, written, state)


def test_a_cast_follows_its_folder():
    """`./` is where the file is, not where it was written."""
    values = floats(10)
    wide = tensor(values.data.cast("B"), "F32")
    narrow = {"w": tensor(rounded(values, "F32", "BF16"), "BF16")}
    store = MemoryStore()
    file = "model.delta.safetensors"
    state = {**narrow, "master": wide}
    given_wide = {"w": (file, "master", lambda: wide[2])}
    written, _ = save_delta(store, "staging", state, wide=given_wide)
    store.move_dir("staging", "checkpoint-7")
    moved = replace(written, file=replace(written.file, path=f"checkpoint-7/{file}"))
    assert_reads_as(store, moved, state)


# --- chains ---------------------------------------------------------------------------------------


def chain(store, links, count=BIG):
    """An anchor and deltas, each against the one before; some tensors stay, one is a cast."""
    values = floats(count)
    frozen = tensor(noise(100_001))
    state, written, all_homes, states = {}, None, [], []
    for step in range(links + 1):
        values = nudged(values, step) if step else values
        state = {
            "master": tensor(values.data.cast("B"), "F32"),
            "w": tensor(rounded(values, "F32", "BF16"), "BF16"),
            "frozen": frozen,
            "step": tensor(np.float32(step).tobytes(), "F32", ()),
        }
        states.append(state)
        folder = f"checkpoint-{step}"
        if not step:
            _, homes = save_anchor(store, folder, state)
        else:
            file = "model.delta.safetensors"
            written, homes = save_delta(
                store,
                folder,
                state,
                bases=homes,
                homes=all_homes,
                wide={"w": (file, "master", lambda state=state: state["master"][2])},
            )
        all_homes += homes.values()
    return written, state


@pytest.mark.parametrize("links", range(1, 7))
def test_a_chain_of_deltas_gives_the_last_state(links):
    store = MemoryStore()
    written, state = chain(store, links)
    assert hows(written) == {
        "master": How.CODED,
        "w": How.CAST,
        "frozen": How.SAME,
        "step": How.CODED,
    }
    assert_reads_as(store, written, state)


def test_each_file_of_a_chain_is_opened_once_and_all_are_closed():
    store = CountingStore()
    written, state = chain(store, 5, count=1000)
    assert store.is_open == []
    store.opened.clear()
    with open_written(store, written.file) as reader:
        assert read_all(reader, threads=3).keys() == state.keys()
        assert len(store.is_open) == len(store.opened)
    own = written.file.path
    assert store.opened.count(own) == 2  # once by its digest, once by its name beside itself
    others = [path for path in store.opened if path != own]
    assert len(others) == len(set(others)) == 5
    assert store.is_open == []


def test_a_file_is_not_opened_before_it_is_needed():
    store = CountingStore()
    written, _ = chain(store, 3, count=10)
    store.opened.clear()
    with open_written(store, written.file):
        pass
    assert store.opened == [written.file.path]


# --- reading --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_chain():
    store = MemoryStore()
    return (store, *chain(store, 3))


@pytest.mark.parametrize("name", ["master", "w", "frozen", "step"])
def test_whole_parts_can_be_read_alone(long_chain, name):
    store, written, state = long_chain
    data = state[name][2].tobytes()
    with open_written(store, written.file) as reader:
        entry = reader.find(name)
        starts = range(0, len(data), PART_BYTES)
        for start in reversed(starts):
            for end in (*starts[1:], len(data)):
                if end > start:
                    out = bytearray(end - start)
                    reader.read_range(entry, start, memoryview(out))
                    assert out == data[start:end]


@pytest.mark.parametrize(
    "span", [(1, PART_BYTES), (0, PART_BYTES - 1), (PART_BYTES, PART_BYTES + 9)]
)
def test_a_range_of_broken_parts_is_refused(long_chain, span):
    store, written, _ = long_chain
    with open_written(store, written.file) as reader:
        out = memoryview(bytearray(span[1] - span[0]))
        with pytest.raises(ConfigError, match="parts"):
            reader.read_range(reader.find("master"), span[0], out)


@pytest.mark.parametrize("threads", [1, 3])
def test_check_and_fill_agree_with_reading(long_chain, threads):
    store, written, state = long_chain
    with open_written(store, written.file) as reader:
        outs = {one.spec.name: bytearray(one.spec.nbytes) for one in reader.header.entries}
        jobs = [(reader, one, memoryview(outs[one.spec.name])) for one in reader.header.entries]
        check_tensors(jobs, threads=threads)
        assert not any(any(out) for out in outs.values())
        fingerprints = [reader.check(entry) for _, entry, _ in jobs]
        fill_tensors(zip(jobs, fingerprints, strict=True), threads=threads)
        assert {name: bytes(out) for name, out in outs.items()} == read_all(reader, threads)
    assert outs == {name: one[2].tobytes() for name, one in state.items()}


def no_decode(monkeypatch):
    def decode(*args, **more):
        raise AssertionError("decoded")

    monkeypatch.setattr(deltas, "decode", decode)


def test_checking_what_tensors_are_made_out_of_decodes_nothing(long_chain, monkeypatch):
    store, written, _ = long_chain
    no_decode(monkeypatch)
    with open_written(store, written.file) as reader:
        made = [one for one in reader.header.entries if hows(written)[one.spec.name] != How.SAME]
        jobs = [(reader, one, memoryview(b"")) for one in made]
        prints = [reader.recipes[one.spec.name].prints or None for one in made]
        assert check_inputs(jobs, {}, threads=2) == prints
        assert [one.spec.name for one, its in zip(made, prints, strict=True) if its] == ["master"]


@pytest.mark.parametrize("first", ["coded", "same"])
def test_what_only_others_are_made_out_of_needs_no_fingerprints(first):
    """It does where it is wanted, too."""
    store = MemoryStore()
    base = floats(MIB)
    _, homes = save_anchor(store, "checkpoint-1", {"w": tensor(base, "F32")})
    tensors = {"coded": tensor(nudged(base), "F32"), "same": tensor(base, "F32")}
    written, _ = save_delta(
        store, "checkpoint-2", tensors, bases={"coded": homes["w"]}, homes=homes.values()
    )
    assert hows(written) == {"coded": How.CODED, "same": How.SAME}
    place = ("checkpoint-1/model.safetensors", "w")
    with open_written(store, written.file) as reader:
        jobs = {
            name: (reader, reader.find(name), memoryview(bytearray(4 * MIB))) for name in tensors
        }
        known = {}
        check_inputs([jobs["coded"]], known, threads=1)
        assert known[place] is None
        known = {}
        both = sorted(jobs, key=lambda name: name != first)
        proofs = check_inputs([jobs[name] for name in both], known, threads=2)
        prints = b"".join(
            xxh3(base.tobytes()[at : at + (512 << 10)]) for at in range(0, 4 * MIB, 512 << 10)
        )
        assert dict(zip(both, proofs, strict=True))["same"] == known[place] == prints
        fill_tensors(
            [(jobs[name], proof) for name, proof in zip(both, proofs, strict=True)], threads=2
        )
        assert {name: job[2].tobytes() for name, job in jobs.items()} == {
            name: one[2].tobytes() for name, one in tensors.items()
        }


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_proven_is_held_to_fingerprints_and_needs_no_second_digest(
    long_chain, threads, monkeypatch
):
    store, written, state = long_chain
    with open_written(store, written.file) as reader:
        entry, out = reader.find("master"), bytearray(state["master"][2].nbytes)
        job = (reader, entry, memoryview(out))
        (proof,) = check_inputs([job], {}, threads=1)
        monkeypatch.setattr(Hasher, "update", lambda *_: pytest.fail("hashed again"))
        fill_tensors([(job, proof)], threads=threads)
        assert out == state["master"][2].tobytes()
        for at in range(0, len(proof), 16):
            other = bytearray(proof)
            other[at] ^= 1
            with pytest.raises(
                CorruptError, match=r"'master'.*not decoded to what its fingerprints say"
            ):
                fill_tensors([(job, bytes(other))], threads=threads)


def kept_elsewhere(store):
    """A delta that changes nothing of a tensor of several parts of a plain shard."""
    state = {"frozen": tensor(noise(PART_BYTES + 5000))}
    anchor, homes = save_anchor(store, "checkpoint-0", state)
    written, _ = save_delta(store, "checkpoint-1", state, bases=homes, homes=homes.values())
    assert hows(written) == {"frozen": How.SAME}
    return anchor, written, state["frozen"][2].tobytes()


def test_what_stands_elsewhere_is_proven_there_and_needs_no_second_digest(monkeypatch):
    store = MemoryStore()
    anchor, written, content = kept_elsewhere(store)
    with open_written(store, written.file) as reader, open_written(store, anchor) as plain:
        entry, out = reader.find("frozen"), bytearray(len(content))
        jobs = [(reader, entry, memoryview(out))]
        proofs = check_inputs(jobs, {}, threads=1)
        assert proofs == [plain.check(plain.find("frozen"))] == [reader.check(entry)]
        monkeypatch.setattr(readers, "Hasher", lambda: pytest.fail("hashed twice"))
        fill_tensors(zip(jobs, proofs, strict=True), threads=1)
        assert out == content


def test_what_stands_elsewhere_and_changes_after_its_check_is_found():
    store = MemoryStore()
    anchor, written, content = kept_elsewhere(store)
    with open_written(store, written.file) as reader:
        jobs = [(reader, reader.find("frozen"), memoryview(bytearray(len(content))))]
        proofs = check_inputs(jobs, {}, threads=1)
        bad = bytearray(store.read(anchor.path, limit_bytes=1 << 30))
        bad[-1] ^= 1
        store.put(anchor.path, bytes(bad))
    with (
        open_written(store, written.file) as reader,
        pytest.raises(CorruptError, match="changed between the check and the read") as caught,
    ):
        fill_tensors([((reader, reader.find("frozen"), jobs[0][2]), proofs[0])], threads=1)
    assert anchor.path in str(caught.value)


def test_what_was_checked_once_is_not_read_again(long_chain, monkeypatch):
    store, written, _ = long_chain
    with open_written(store, written.file) as reader:
        known, jobs = {}, [(reader, reader.find("w"), memoryview(b""))]
        check_inputs(jobs, known, threads=1)
        folders = [path.partition("/")[0] for path, _ in known]
        assert sorted(folders) == [f"checkpoint-{step}" for step in range(4)]
        assert {name for _, name in known} == {"master"}  # of which `w` is the cast
        monkeypatch.setattr(ShardReader, "read_range", lambda *about: pytest.fail("read again"))
        jobs.append((reader, reader.find("master"), memoryview(b"")))
        assert check_inputs(jobs, known, threads=1) == [None, reader.recipes["master"].prints]


def casts_elsewhere(store):
    """A delta over a cast, whose source stands beside it in another checkpoint."""
    values = [floats(1000), nudged(floats(1000))]
    wide = [tensor(one.data.cast("B"), "F32") for one in values]
    narrow = [tensor(rounded(one, "F32", "BF16"), "BF16") for one in values]
    file = "optimizer.delta.safetensors"
    save_delta(store, "checkpoint-1", {"master": wide[0]}, file=file)
    _, homes = save_delta(
        store,
        "checkpoint-1",
        {"w": narrow[0]},
        wide={"w": (file, "master", lambda: wide[0][2])},
    )
    written, _ = save_delta(store, "checkpoint-2", {"w": narrow[1]}, bases=homes)
    assert hows(written) == {"w": How.CODED}
    return written, {"w": narrow[1]}, f"checkpoint-1/{file}"


def test_where_nobody_vouches_for_a_source_the_tensor_is_made_to_be_checked(monkeypatch):
    store = MemoryStore()
    written, state, _ = casts_elsewhere(store)
    assert_reads_as(store, written, state)
    no_decode(monkeypatch)
    with (
        open_written(store, written.file) as reader,
        pytest.raises(AssertionError, match="decoded"),
    ):
        check_inputs([(reader, reader.find("w"), memoryview(b""))], {}, threads=1)


@pytest.mark.parametrize("at", range(0, 5000, 97))
def test_any_damage_to_a_file_that_nobody_vouches_for_is_found_by_the_check(at):
    store = MemoryStore()
    written, _, path = casts_elsewhere(store)
    content = bytearray(store.read(path, limit_bytes=1 << 20))
    content[at % len(content)] ^= 1
    store.put(path, bytes(content))
    with open_written(store, written.file) as reader:
        jobs = [(reader, reader.find("w"), memoryview(bytearray(2000)))]
        try:
            proofs = check_inputs(jobs, {}, threads=1)
        except (CorruptError, FormatVersionError):
            return
        fill_tensors(zip(jobs, proofs, strict=True), threads=1)  # what it says does not matter


def test_a_file_that_is_vouched_for_is_held_to_that(monkeypatch):
    store = MemoryStore()
    written, state, path = casts_elsewhere(store)
    with open_tensors(store, path, expected=None) as wide:
        digests = [one.digest for one in wide._shard.header.entries]
        found = shard_digest(wide._shard.header.raw, digests)
    with SourceFiles(store) as files:
        files.vouch(path, size_bytes=0, digest=found)
        with open_tensors(
            store, written.file.path, expected=written.file.digest, sources=files
        ) as reader:
            assert load_all(reader)["w"] == state["w"][2].tobytes()
            no_decode(monkeypatch)
            jobs = [(reader, reader.find("w"), memoryview(b""))]
            assert check_inputs(jobs, {}, threads=1) == [None]
            assert len(files) == 2
        assert len(files) == 2  # a reader closes only what is its own
    with SourceFiles(store) as files:
        files.vouch(path, size_bytes=0, digest=written.file.digest)
        with (
            open_tensors(
                store, written.file.path, expected=written.file.digest, sources=files
            ) as reader,
            pytest.raises(CorruptError, match=path),
        ):
            load_all(reader)


def test_threads_that_share_a_tensor_hash_it_in_order(long_chain, monkeypatch):
    """The first part is the last to be made: whoever makes it hashes those behind it, too."""
    store, written, state = long_chain
    others = threading.Event()
    read_range, made = DeltaReader.read_range, []

    def late(self, entry, offset, out, **more):
        if self.path == written.file.path:
            if not offset:
                assert others.wait(10)
            made.append(offset)
            if len(made) == 2:
                others.set()
        read_range(self, entry, offset, out, **more)

    monkeypatch.setattr(DeltaReader, "read_range", late)
    with open_written(store, written.file) as reader:
        out = bytearray(state["master"][2].nbytes)
        job = (reader, reader.find("master"), memoryview(out))
        fill_tensors([(job, None)], threads=2)
    assert out == state["master"][2].tobytes()
    assert made[-1] == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_tensor_that_threads_share_is_held_to_its_digest(long_chain, threads):
    store, written, state = long_chain
    with open_written(store, written.file) as reader:
        entry = replace(reader.find("master"), digest=blake3_digest(b""))
        job = (reader, entry, memoryview(bytearray(state["master"][2].nbytes)))
        with pytest.raises(DigestMismatchError, match="'master'"):
            fill_tensors([(job, None)], threads=threads)


def test_many_threads_read_one_tensor_at_once(long_chain):
    store, written, state = long_chain
    with open_written(store, written.file) as reader:
        names = ["master", "w", "frozen"] * 4
        outs = [bytearray(state[name][2].nbytes) for name in names]
        jobs = [
            (reader, reader.find(name), memoryview(out))
            for name, out in zip(names, outs, strict=True)
        ]
        read_tensors(jobs, threads=8)
    for name, out in zip(names, outs, strict=True):
        assert out == state[name][2].tobytes()


def test_an_unaligned_destination_is_filled_alike(long_chain):
    store, written, state = long_chain
    with open_written(store, written.file) as reader:
        for name, (_, _, data) in state.items():
            room = bytearray(data.nbytes + 1)
            reader.read_into(reader.find(name), memoryview(room)[1:])
            assert room[1:] == data.tobytes()


def test_a_plain_shard_opens_as_one():
    store = MemoryStore()
    written, _ = save_anchor(store, "checkpoint-1", {"a": tensor(b"abc")})
    with open_written(store, written) as reader:
        assert isinstance(reader, ShardReader)
    delta, _ = save_delta(store, "checkpoint-2", {"a": tensor(b"abc")})
    with open_written(store, delta.file) as reader:
        assert isinstance(reader, DeltaReader)


# --- approximations -------------------------------------------------------------------------------


def lossy_delta(new, old, lossy, dtype="F64"):
    """Write `new` with something given up against `old`; its recipe, and what is read."""
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", {"t": tensor(old.data.cast("B"), dtype)})
    store.make_dirs("checkpoint-2")
    source = DeltaSource(
        spec=homes["t"].spec, read=lambda: new.view(np.uint8), base=homes["t"], lossy=lossy
    )
    written = write_delta(
        store,
        "checkpoint-2/m.delta.safetensors",
        [source],
        homes=lambda _: None,
        level=Level.AUTO,
        threads=1,
    )
    with open_written(store, written.file) as reader:
        recipe, found = written.recipes[0], np.frombuffer(read_all(reader)["t"], new.dtype)
        assert recipe.prints in (b"", xxh3(found.view(np.uint8).data))
        assert bool(recipe.prints) == (recipe.is_stored and found.nbytes >= 64 << 10)
        return recipe, found


RULES = {
    "threshold": Lossy(change_threshold=0.01),
    "update": Lossy(update_fraction=0.1),
    "mantissa": Lossy(mantissa_bits=4),
    "all": Lossy(change_threshold=0.01, update_fraction=0.1, mantissa_bits=4),
}


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1.0, 1e155, 1e200, 1e308])
@pytest.mark.parametrize("change", [1e-6, 0.1, 0.7, -1.0])
def test_what_is_given_up_is_what_is_said_at_every_size_of_number(rule, scale, change):
    old = scale * (np.random.default_rng(0).random(1000) * 0.5 + 0.1)
    new = old * (1 + change)
    recipe, found = lossy_delta(new, old, RULES[rule])
    if recipe.given_up is None:
        assert np.array_equal(found, new)
        return
    apart = np.abs(found - new)
    assert recipe.given_up.max_abs == apart.max()
    unit = np.abs(new).max() or 1.0
    norm = np.linalg.norm(new / unit)
    want = np.linalg.norm(apart / unit) / norm if norm else 1.0
    assert recipe.given_up.relative_l2 == pytest.approx(want)
    if recipe.how is How.SAME:
        assert want < 0.01


@pytest.mark.parametrize(("rule", "how"), [
    ("threshold", How.SAME), ("update", How.UPDATE), ("mantissa", How.CODED), ("exact", How.CODED)
])  # fmt: skip
def test_fingerprints_are_of_what_is_read(rule, how):
    old = np.random.default_rng(0).random(20_000) + 0.5
    new = old * (1 + 1e-3 * np.random.default_rng(1).random(20_000))
    recipe, found = lossy_delta(new, old, RULES.get(rule, Lossy()))
    assert recipe.how is how
    assert bool(recipe.prints) == recipe.is_stored  # and right: see lossy_delta
    assert np.array_equal(found, new) == (rule == "exact")


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7])
def test_a_step_beyond_the_largest_float_is_not_taken(rule, share):
    largest = np.finfo(np.float32).max
    old = np.full(1000, largest * np.float32(share))
    new = np.linspace(0.9, 1.0, 1000).astype(np.float32) * largest
    recipe, found = lossy_delta(new, old, RULES[rule], "F32")
    assert np.isfinite(found).all()
    assert (recipe.given_up is None) <= np.array_equal(found, new)


# --- memory ---------------------------------------------------------------------------------------

LARGE = 48 * MIB


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def large():
    """A tensor and its cast, and both again with a change here and there: hardly a coded byte."""
    values = floats(LARGE // 4)
    store = MemoryStore()
    before = {
        "master": tensor(values.data, "F32"),
        "w": tensor(rounded(values, "F32", "BF16"), "BF16"),
    }
    _, homes = save_anchor(store, "checkpoint-1", before)
    values = values.copy()
    values[:: MIB // 4] += 1
    after = {
        "master": tensor(values.data, "F32"),
        "w": tensor(rounded(values, "F32", "BF16"), "BF16"),
    }
    written, _ = save(store, after, homes)
    return store, homes, after, written


def save(store, state, homes, folder="checkpoint-2"):
    wide = {"w": ("model.delta.safetensors", "master", lambda: state["master"][2])}
    return save_delta(store, folder, state, bases=homes, wide=wide)


def test_reading_takes_a_few_parts_beside_the_tensor(large):
    store, _, after, written = large
    outs = {name: bytearray(one[2].nbytes) for name, one in after.items()}
    with open_written(store, written.file) as reader:
        for name, how in (("master", How.CODED), ("w", How.CAST)):
            entry = reader.find(name)
            assert reader.recipes[name].how is how
            view = memoryview(outs[name])
            assert peak_of(lambda e=entry, v=view: reader.read_into(e, v)) < 5 * PART_BYTES
            assert peak_of(lambda e=entry: reader.check(e)) < 6 * PART_BYTES
            jobs = [(reader, entry, view)]
            assert peak_of(lambda j=jobs: check_inputs(j, {}, threads=2)) < PART_BYTES
            done = [(jobs[0], None)]
            assert peak_of(lambda d=done: fill_tensors(d, threads=2)) < 10 * PART_BYTES
            assert outs[name] == after[name][2].tobytes()


def test_writing_takes_a_few_parts_of_each_thread_beside_the_tensor(large):
    store, homes, after, _ = large
    assert peak_of(lambda: save(store, after, homes, "checkpoint-3")) < 8 * PART_BYTES


# --- what a caller gets wrong ---------------------------------------------------------------------


@pytest.mark.parametrize("other", [tensor(b"abcd", "F32"), tensor(b"abcde"), tensor(b"")])
def test_a_base_of_another_form_is_refused(other):
    store = MemoryStore()
    _, homes = save_anchor(store, "checkpoint-1", {"a": other})
    with pytest.raises(ConfigError, match=r"'a'.*base"):
        save_delta(store, "checkpoint-2", {"a": tensor(b"abcd")}, bases=homes)


def test_a_name_given_twice_is_refused():
    store = MemoryStore()
    store.make_dirs("checkpoint-1")
    one = DeltaSource(spec=spec_of("a", tensor(b"x")), read=lambda: tensor(b"x")[2])
    with pytest.raises(InvalidNameError, match="twice"):
        write_delta(
            store,
            "checkpoint-1/m.delta.safetensors",
            [one, one],
            homes=lambda _: None,
            level=Level.AUTO,
            threads=2,
        )


@pytest.mark.parametrize("nbytes", [3, 5, 0])
def test_a_source_that_gives_other_bytes_than_it_says_is_refused(nbytes):
    store = MemoryStore()
    dtype, shape, _ = tensor(b"abcd")
    with pytest.raises(ConfigError, match="'a'"):
        save_delta(store, "checkpoint-1", {"a": (dtype, shape, noise(nbytes))})


def test_the_first_failure_of_a_source_is_raised_and_no_file_is_left_open():
    store = CountingStore()
    _, homes = save_anchor(store, "checkpoint-1", {"t0": tensor(noise(MIB))})
    store.make_dirs("checkpoint-2")

    def fails():
        raise MemoryError("no room")

    sources = [
        DeltaSource(
            spec=spec_of("t0", tensor(noise(MIB))), read=lambda: noise(MIB, 1), base=homes["t0"]
        ),
        DeltaSource(spec=spec_of("t1", tensor(b"x")), read=fails),
    ]
    with pytest.raises(MemoryError, match="no room"):
        write_delta(
            store,
            "checkpoint-2/m.delta.safetensors",
            sources,
            homes=lambda _: None,
            level=Level.AUTO,
            threads=2,
        )
    assert store.is_open == []
    assert store.list("checkpoint-2") == ()


def test_a_tensor_is_read_once():
    calls = []

    def read(name, data):
        calls.append(name)
        return data

    store = MemoryStore()
    store.make_dirs("checkpoint-1")
    sources = [
        DeltaSource(
            spec=spec_of(f"t{i}", tensor(noise(5 * MIB, i))),
            read=lambda i=i: read(f"t{i}", noise(5 * MIB, i)),
        )
        for i in range(3)
    ]
    written = write_delta(
        store,
        "checkpoint-1/m.delta.safetensors",
        sources,
        homes=lambda _: None,
        level=Level.AUTO,
        threads=3,
    )
    assert sorted(calls) == ["t0", "t1", "t2"]
    assert [one.spec.name for one in written.recipes] == ["t0", "t1", "t2"]
    assert [one.digest for one in written.recipes] == [
        blake3_digest(noise(5 * MIB, i).data) for i in range(3)
    ]


# --- several files of one save


def files_of(states, bases, events=None):
    """A delta file of each state; what is asked for and read is noted."""
    events = [] if events is None else events
    for number, state in enumerate(states):
        events.append(f"ask {number}")

        def read(data, number=number):
            events.append(f"read {number}")
            return data

        yield DeltaFile(
            path=f"checkpoint-2/{number}.delta.safetensors",
            tensors=[
                DeltaSource(
                    spec=spec_of(name, one),
                    read=lambda one=one, read=read: read(one[2]),
                    base=bases.get(name),
                )
                for name, one in state.items()
            ],
            level=Level.AUTO,
        )


def several(count=3, nbytes=3 * MIB):
    """A store with what several files are made out of, and their tensors."""
    store = CountingStore()
    old = {f"t{i}": floats(nbytes // 4, i) for i in range(count)}
    _, homes = save_anchor(store, "checkpoint-1", {k: tensor(v, "F32") for k, v in old.items()})
    store.make_dirs("checkpoint-2")
    return store, homes, [{k: tensor(nudged(v), "F32")} for k, v in old.items()]


def in_turn(store, files, threads=2, coded=lambda: None):
    return write_deltas(store, files, homes=lambda _: None, threads=threads, coded=coded)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_files_of_a_save_are_as_if_each_were_written_alone(threads, count):
    store, homes, states = several(count)
    found = in_turn(store, files_of(states, homes), threads)
    alone, homes, states = several(count)
    expected = [written for file in files_of(states, homes) for written in in_turn(alone, [file])]
    assert [one.file for one in found] == [one.file for one in expected]
    assert [one.recipes for one in found] == [one.recipes for one in expected]
    assert store.is_open == []


def test_a_small_file_is_read_while_the_one_before_is_coded():
    store, homes, states = several()
    events = []
    in_turn(store, files_of(states, homes, events), coded=lambda: events.append("coded"))
    assert [one for one in events if not one.startswith("read")] == [
        *("ask 0", "ask 1", "coded", "ask 2", "coded", "coded")
    ]
    assert sorted(one for one in events if one.startswith("read")) == ["read 0", "read 1", "read 2"]


def test_a_large_file_is_not_read_before_its_turn(monkeypatch):
    monkeypatch.setattr(deltawriting, "AHEAD_BYTES", MIB)
    store, homes, states = several()
    events = []
    in_turn(store, files_of(states, homes, events), coded=lambda: events.append("coded"))
    assert events == [
        *("ask 0", "read 0", "ask 1", "coded", "read 1", "ask 2", "coded", "read 2", "coded")
    ]


@pytest.mark.parametrize("nbytes", [3 * MIB, 5])
def test_a_file_that_cannot_be_read_ends_the_one_before(nbytes):
    store, homes, states = several()
    dtype, shape, _ = states[1]["t1"]
    states[1]["t1"] = dtype, shape, noise(nbytes)[:5]
    with pytest.raises(ConfigError, match="'t1'"):
        in_turn(store, files_of(states, homes))
    assert store.is_open == []


def test_a_name_given_twice_in_a_later_file_is_refused():
    store, homes, states = several(2)
    files = list(files_of(states, homes))
    files[1] = replace(files[1], tensors=[*files[1].tensors] * 2)
    with pytest.raises(InvalidNameError, match="twice"):
        in_turn(store, files)
    assert store.is_open == []
