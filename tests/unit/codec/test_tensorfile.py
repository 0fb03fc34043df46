"""The tensor file: its layout, and headers by us, by others and by someone who means harm."""

import gc
import json
import struct
import time

import blake3
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptcoord.codec import tensorfile
from ckptcoord.codec.digest import blake3_digest
from ckptcoord.codec.tensorfile import (
    TensorSpec,
    encode_header,
    parse_header,
    plan_layout,
    shard_digest,
)
from ckptcoord.codec.tensorspec import ITEM_BYTES, MAX_DIMS, STORED_BYTES
from ckptcoord.core.digest import Digest
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    CorruptError,
    FormatVersionError,
    InvalidNameError,
)

DIGEST = str(Digest(bytes(32)))


def spec(name, dtype="F32", shape=(2,)):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def parse(data):
    def read(offset, length):
        assert 0 <= offset <= offset + length <= len(data), "asked for more than the file has"
        return data[offset : offset + length]

    return parse_header(read, len(data), path="f")


def build(contents, metadata=None):
    """A file of {spec: bytes}, and its digests in offset order."""
    layout = plan_layout(contents, metadata)
    by_name = {spec.name: data for spec, data in contents.items()}
    digests = [blake3_digest(by_name[entry.spec.name]) for entry in layout.entries]
    header = encode_header(layout, digests)
    assert len(header) == layout.data_start
    body = b"".join(by_name[entry.spec.name] for entry in layout.entries)
    assert len(header) + len(body) == layout.size_bytes
    return header + body, digests


def file_of(document, body=b"", *, length=None):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def row(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def own(**fields):
    """A `__metadata__` as ckptcoord's."""
    return {"format": "pt", "ckptcoord": json.dumps({"format_version": 1, **fields})}


# Hypothesis also tries constants of the source, so the reserved name comes up, if rarely.
names = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12
).filter(lambda name: name.isprintable() and ".." not in name and name != "__metadata__")
specs = st.lists(
    st.builds(
        TensorSpec,
        name=names,
        dtype=st.sampled_from(sorted(ITEM_BYTES)),
        shape=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda s: s.name,
)


@settings(max_examples=60)
@given(specs=specs, seed=st.integers(0, 2**32 - 1))
@example(specs=[spec("a"), spec("z", shape=(0,)), spec("b", "U8", (0,)), spec("c", "U8")], seed=0)
@example(specs=[], seed=0)
def test_what_was_encoded_is_parsed(specs, seed):
    rng = np.random.default_rng(seed)
    data, digests = build({s: rng.bytes(s.nbytes) for s in specs}, {"note": "x"})
    header = parse(data)
    assert header.metadata == {"note": "x", "format": "pt"}
    assert data.startswith(header.raw)
    assert header.data_start == len(header.raw)
    assert [e.digest for e in header.entries] == digests
    assert {e.spec for e in header.entries} == set(specs)
    for entry in header.entries:
        assert blake3_digest(data[entry.begin : entry.end]) == entry.digest


@settings(max_examples=60)
@given(specs=specs)
def test_every_tensor_is_aligned_to_its_element_and_the_file_has_no_hole(specs):
    layout = plan_layout(specs)
    assert layout.data_start % 8 == 0
    position = layout.data_start
    for entry in layout.entries:
        assert entry.begin == position
        assert entry.begin % STORED_BYTES[entry.spec.stored[0]] == 0
        assert entry.end - entry.begin == entry.spec.nbytes
        position = entry.end
    assert position == layout.size_bytes


@settings(max_examples=30)
@given(specs=specs, seed=st.integers(0, 2**32 - 1))
def test_safetensors_reads_what_was_written(specs, seed):
    rng = np.random.default_rng(seed)
    contents = {s: rng.bytes(s.nbytes) for s in specs}
    data, _ = build(contents)
    found = dict(safetensors.deserialize(data))
    assert len(found) == len(specs)
    for s, raw in contents.items():
        assert bytes(found[s.name]["data"]) == raw
        assert (found[s.name]["dtype"], tuple(found[s.name]["shape"])) == s.stored


@given(specs=specs, other=st.randoms(use_true_random=False))
def test_the_layout_does_not_depend_on_the_order_given(specs, other):
    shuffled = list(specs)
    other.shuffle(shuffled)
    assert plan_layout(shuffled) == plan_layout(specs)


def test_larger_elements_come_first_then_names():
    layout = plan_layout(
        [spec("b"), spec("a"), spec("z", "C128"), spec("y", "U8"), spec("x", "BF16")]
    )
    assert [entry.spec.name for entry in layout.entries] == ["z", "a", "b", "x", "y"]


def test_a_name_given_twice_is_refused():
    with pytest.raises(InvalidNameError, match="twice"):
        plan_layout([spec("a"), spec("a", "U8")])


@pytest.mark.parametrize("key", ["format", "ckptcoord"])
def test_metadata_that_is_ours_is_refused(key):
    with pytest.raises(ConfigError, match="reserved"):
        plan_layout([spec("a")], {key: "x"})


def test_a_header_that_safetensors_would_not_read_is_refused(monkeypatch):
    monkeypatch.setattr(tensorfile, "MAX_HEADER_BYTES", 10_000)
    with pytest.raises(ConfigError, match="max_shard_size"):
        plan_layout([spec(f"tensor{i}") for i in range(100)])


def test_digests_of_another_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        encode_header(plan_layout([spec("a")]), [])


def test_the_digest_of_a_shard_is_that_of_its_header_and_of_its_tensors_digests():
    data, digests = build({spec("a"): b"12345678", spec("b", "U8"): b"ab"})
    header = parse(data).raw
    want = blake3.blake3(header + digests[0].value + digests[1].value).digest()
    assert shard_digest(header, digests).value == want


def test_a_header_written_down_stays_as_it_is():
    """The bytes on disk are an interface: docs/format.md."""
    data, _ = build({spec("w", "C128", (1,)): bytes(16), spec("b", "BF16", ()): b"\x80\x3f"})
    text = data[8:].split(b"}   ")[0] if b"}   " in data else data
    assert b'"b":{"data_offsets":[16,18],"dtype":"BF16","shape":[]}' in text
    assert b'"w":{"data_offsets":[0,16],"dtype":"F64","shape":[1,2]}' in text
    inner = json.loads(json.loads(data[8 : parse(data).data_start])["__metadata__"]["ckptcoord"])
    assert inner["format_version"] == 1
    assert inner["logical"] == {"w": {"dtype": "C128", "shape": [1]}}
    assert sorted(inner["digests"]) == ["b", "w"]


# --- files of others ---------------------------------------------------------------------------

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def test_all_stored_dtypes_are_torchs():
    assert TORCH_DTYPES.keys() == STORED_BYTES.keys()


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_a_file_of_safetensors_itself_is_read_without_digests(name):
    tensor = torch.zeros(3, 2, dtype=torch.uint8).view(torch.uint8).to(torch.float32)
    tensor = tensor.to(TORCH_DTYPES[name])
    data = safetensors.torch.save({"w": tensor, "empty": tensor[:0]}, {"format": "pt"})
    header = parse(data)
    assert [(e.spec.name, e.spec.dtype, e.spec.shape, e.digest) for e in header.entries] == [
        ("empty", name, (0, 2), None),
        ("w", name, (3, 2), None),
    ]
    assert header.metadata == {"format": "pt"}


def test_a_file_without_metadata_or_tensors_is_read():
    assert parse(file_of({})).entries == ()
    assert parse(file_of({"w": row()}, b"abcd")).metadata == {}


def test_a_header_padded_to_a_page_is_read():
    text = json.dumps({"w": row()}).encode()
    assert parse(file_of(text.ljust(4096 - 8), b"abcd")).data_start == 4096


# --- attacks -----------------------------------------------------------------------------------

GOOD = {"w": row()}
ATTACKS = {
    "empty file": b"",
    "half a prefix": b"\0\0\0",
    "no header": struct.pack("<Q", 0),
    "header of one byte": file_of(b"{"),
    "never written": bytes(4096),
    "header longer than the file": file_of(GOOD, b"abcd", length=10_000),
    "header of 2**64-1": file_of(GOOD, b"abcd", length=2**64 - 1),
    "header of 2**63": file_of(GOOD, b"abcd", length=2**63),
    "header cut off": file_of(GOOD, b"abcd", length=20),
    "header of white space": file_of(b" " * 10_000),
    "padding of line feeds": file_of(json.dumps(GOOD).encode() + b"\n" * 5000, b"abcd")[:4000],
    "leading space": file_of(b" " + json.dumps(GOOD).encode(), b"abcd"),
    "a list": file_of(b"[]"),
    "not JSON": file_of(b"{]"),
    "not UTF-8": file_of(b'{"\xff\xfe":{}}'),
    "two documents": file_of(b"{}{}"),
    "duplicate tensor": file_of(
        b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b"abcd",
    ),
    "duplicate field": file_of(
        b'{"w":{"dtype":"F32","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abcd"
    ),
    "duplicate metadata": file_of(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "truncated data": file_of(GOOD, b"abc"),
    "trailing data": file_of(GOOD, b"abcde"),
    "data and no tensor": file_of({}, b"a"),
    "overlap": file_of({"a": row(), "b": row(offsets=(2, 6))}, b"abcdef"),
    "same bytes twice": file_of({"a": row(), "b": row()}, b"abcd"),
    "hole": file_of({"a": row(), "b": row(offsets=(5, 9))}, b"abcdefghi"),
    "hole at the start": file_of({"a": row(offsets=(1, 5))}, b"abcde"),
    "empty tensor inside another": file_of(
        {"a": row(), "b": row(shape=(0,), offsets=(2, 2))}, b"abcd"
    ),
    "empty tensor past the end": file_of(
        {"a": row(), "b": row(shape=(0,), offsets=(9, 9))}, b"abcd"
    ),
    "past the end": file_of({"w": row(shape=(8,), offsets=(0, 8))}, b"abcd"),
    "far past the end": file_of({"w": row(shape=(2**62,), offsets=(0, 2**62))}, b"abcd"),
    "negative offset": file_of({"w": row(offsets=(-4, 0))}, b"abcd"),
    "backwards": file_of({"w": row(offsets=(4, 0))}, b"abcd"),
    "offsets of three": file_of({"w": row(offsets=(0, 4, 4))}, b"abcd"),
    "offsets of one": file_of({"w": row(offsets=(0,))}, b"abcd"),
    "offsets as text": file_of({"w": {**row(), "data_offsets": "04"}}, b"abcd"),
    "offset as float": file_of({"w": row(offsets=(0, 4.0))}, b"abcd"),
    "offset as bool": file_of({"w": row(shape=(1,), offsets=(False, True))}, b"a"),
    "offset of 5000 digits": file_of({"w": row(offsets=(0, 10**4000))}, b"abcd"),
    "dimension as float": file_of({"w": row(shape=(4.0,))}, b"abcd"),
    "dimension as bool": file_of({"w": row(shape=(True, 4))}, b"abcd"),
    "dimension as text": file_of({"w": row(shape=("4",))}, b"abcd"),
    "dimension null": file_of({"w": row(shape=(None,))}, b"abcd"),
    "negative dimensions": file_of({"w": row(shape=(-2, -2))}, b"abcd"),
    "dimension 1e999": file_of(
        b'{"w":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}', b"abcd"
    ),
    "dimension NaN": file_of(b'{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', b"abcd"),
    "shape as number": file_of({"w": {**row(), "shape": 4}}, b"abcd"),
    "shape as text": file_of({"w": {**row(offsets=(0, 0)), "shape": ""}}, b""),
    "shape too small": file_of({"w": row(shape=(3,))}, b"abcd"),
    "shape too large": file_of({"w": row(shape=(5,))}, b"abcd"),
    "10,000 dimensions": file_of({"w": row(shape=(1,) * 10_000, offsets=(0, 1))}, b"a"),
    "one dimension too many": file_of(
        {"w": row(shape=(1,) * (MAX_DIMS + 1), offsets=(0, 1))}, b"a"
    ),
    "product wraps to 4": file_of({"w": row(shape=(2**32 + 1, 2**32 - 1, 4))}, b"abcd"),
    "product wraps to 0": file_of({"w": row(shape=(2**32, 2**32), offsets=(0, 0))}),
    "product with a zero overflows": file_of({"w": row(shape=(2**62, 2**62, 0), offsets=(0, 0))}),
    "wrong dtype": file_of({"w": row("F32")}, b"abcd"),
    "unknown dtype": file_of({"w": row("X8")}, b"abcd"),
    "dtype in lower case": file_of({"w": row("u8")}, b"abcd"),
    "dtype only we have": file_of({"w": row("C32", shape=(1,))}, b"abcd"),
    "dtype of half bytes": file_of({"w": row("F4", shape=(4,))}, b"abcd"),
    "dtype as list": file_of({"w": row(["U8"])}, b"abcd"),
    "dtype as number": file_of({"w": row(8)}, b"abcd"),
    "dtype missing": file_of({"w": {"shape": [4], "data_offsets": [0, 4], "x": 1}}, b"abcd"),
    "field too many": file_of({"w": {**row(), "strides": [1]}}, b"abcd"),
    "field too few": file_of({"w": {"dtype": "U8", "shape": [4]}}, b"abcd"),
    "tensor as list": file_of({"w": [1, 2, 3]}, b"abcd"),
    "tensor as null": file_of({"w": None}, b""),
    "NUL in a name": file_of({"a\0b": row()}, b"abcd"),
    "line feed in a name": file_of({"a\nb": row()}, b"abcd"),
    "lone surrogate in a name": file_of(b'{"\\ud800":{}}'),
    "name that climbs": file_of({"../w": row()}, b"abcd"),
    "name that climbs inside": file_of({"a/../../w": row()}, b"abcd"),
    "name that climbs on Windows": file_of({"a\\..\\w": row()}, b"abcd"),
    "name empty": file_of({"": row()}, b"abcd"),
    "name of 10,000 characters": file_of({"x" * 10_000: row()}, b"abcd"),
    "metadata as list": file_of({"__metadata__": ["a"]}),
    "metadata as null": file_of({"__metadata__": None}),
    "metadata value as number": file_of({"__metadata__": {"a": 1}}),
    "metadata as a tensor": file_of({"__metadata__": row()}, b"abcd"),
    "deep": file_of(b'{"w":' * 100_000 + b"1" + b"}" * 100_000),
    "our metadata as list": file_of({"__metadata__": {"ckptcoord": "[]"}}),
    "our metadata empty": file_of({"__metadata__": {"ckptcoord": ""}}),
    "our metadata as object": file_of({"__metadata__": {"ckptcoord": {}}}),
    "our metadata with a lone surrogate": file_of(b'{"__metadata__":{"ckptcoord":"\\udc00"}}'),
    "our metadata with a duplicate": file_of(
        {"__metadata__": {"ckptcoord": '{"format_version":1,"digests":{},"digests":{}}'}}
    ),
    "no format version": file_of({"__metadata__": {"ckptcoord": '{"digests":{}}'}}),
    "format version 0": file_of(
        {"__metadata__": {"ckptcoord": '{"format_version":0,"digests":{}}'}}
    ),
    "format version true": file_of(
        {"__metadata__": {"ckptcoord": '{"format_version":true,"digests":{}}'}}
    ),
    "format version as float": file_of(
        {"__metadata__": {"ckptcoord": '{"format_version":1.0,"digests":{}}'}}
    ),
    "unknown field of ours": file_of({"__metadata__": own(digests={}, base="x")}),
    "no digests": file_of({"__metadata__": own()}),
    "digests as list": file_of({"__metadata__": own(digests=[])}),
    "digest missing": file_of({"__metadata__": own(digests={}), **GOOD}, b"abcd"),
    "digest too many": file_of(
        {"__metadata__": own(digests={"w": DIGEST, "v": DIGEST}), **GOOD}, b"abcd"
    ),
    "digest of another name": file_of(
        {"__metadata__": own(digests={"v": DIGEST}), **GOOD}, b"abcd"
    ),
    "digest too short": file_of({"__metadata__": own(digests={"w": DIGEST[:-1]}), **GOOD}, b"abcd"),
    "digest in capitals": file_of(
        {"__metadata__": own(digests={"w": DIGEST[:-1] + "A"}), **GOOD}, b"abcd"
    ),
    "digest null": file_of({"__metadata__": own(digests={"w": None}), **GOOD}, b"abcd"),
    "logical of no tensor": file_of(
        {"__metadata__": own(digests={}, logical={"v": {"dtype": "F4", "shape": [0]}})}
    ),
    "logical of another size": file_of(
        {
            "__metadata__": own(
                digests={"w": DIGEST}, logical={"w": {"dtype": "F4", "shape": [5]}}
            ),
            **GOOD,
        },
        b"abcd",
    ),
    "logical of another storage": file_of(
        {
            "__metadata__": own(
                digests={"w": DIGEST}, logical={"w": {"dtype": "F4", "shape": [4]}}
            ),
            "w": row("F32", (1,)),
        },
        b"abcd",
    ),
    "logical that needs none": file_of(
        {
            "__metadata__": own(
                digests={"w": DIGEST}, logical={"w": {"dtype": "F32", "shape": [1]}}
            ),
            **GOOD,
        },
        b"abcd",
    ),
    "logical that says what is stored": file_of(
        {
            "__metadata__": own(
                digests={"w": DIGEST}, logical={"w": {"dtype": "U8", "shape": [4]}}
            ),
            **GOOD,
        },
        b"abcd",
    ),
    "logical unknown": file_of(
        {
            "__metadata__": own(
                digests={"w": DIGEST}, logical={"w": {"dtype": "Q4", "shape": [4]}}
            ),
            **GOOD,
        },
        b"abcd",
    ),
    "logical with a field too many": file_of(
        {
            "__metadata__": own(
                digests={"w": DIGEST}, logical={"w": {"dtype": "F4", "shape": [4], "x": 1}}
            ),
            **GOOD,
        },
        b"abcd",
    ),
}


def test_a_header_may_be_followed_by_much_room():
    """Data that was written first left room for the longest header that there could be."""
    padded = file_of(json.dumps(GOOD).encode() + b" " * (9 << 20), b"abcd")
    header = parse_header(lambda at, size: padded[at : at + size], len(padded), path="f")
    assert header.data_start == len(padded) - 4


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_with_the_files_name(attack):
    with pytest.raises(CorruptError, match=r"^f: ") as caught:
        parse(ATTACKS[attack])
    assert len(str(caught.value)) < 1000


def test_what_the_attacks_are_variations_of_is_sound():
    """Else the corpus could be refused for another reason than its own."""
    parse(file_of(GOOD, b"abcd"))
    parse(file_of({"__metadata__": own(digests={"w": DIGEST}), **GOOD}, b"abcd"))
    logical = {"w": {"dtype": "F4", "shape": [4]}}
    parse(file_of({"__metadata__": own(digests={"w": DIGEST}, logical=logical), **GOOD}, b"abcd"))
    parse(file_of({"w": row(shape=(1,) * MAX_DIMS, offsets=(0, 1))}, b"a"))
    parse(file_of({"a": row(), "b": row(shape=(0,), offsets=(4, 4))}, b"abcd"))


def test_a_newer_format_is_said_to_be_newer_whatever_is_in_it():
    notes = {"ckptcoord": '{"format_version":2,"planes":[]}'}
    with pytest.raises(FormatVersionError) as caught:
        parse(file_of({"__metadata__": notes, "w": row("F3", (9,))}, b"abcd"))
    assert (caught.value.found, caught.value.supported) == (2, 1)


def test_a_header_too_long_is_not_read():
    read = []

    def reader(offset, length):
        read.append(length)
        return struct.pack("<Q", 100_000_001)[:length]

    with pytest.raises(CorruptError, match="claims"):
        parse_header(reader, 10**12, path="f")
    assert read == [8]


def test_too_many_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(tensorfile, "MAX_ENTRIES", 2)
    empty = row(shape=(0,), offsets=(0, 0))
    parse(file_of({"a": empty, "b": empty}))
    with pytest.raises(CorruptError, match="3 tensors"):
        parse(file_of({"a": empty, "b": empty, "c": empty}))


@settings(max_examples=200)
@given(data=st.data())
def test_a_header_of_other_bytes_is_an_error_of_ours_or_sound(data):
    base, _ = build({spec("a"): b"12345678", spec("b", "F4", (3,)): b"abc"}, {"note": "é"})
    at = data.draw(st.integers(0, len(base) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=4))
    changed = base[:at] + junk + base[at + len(junk) :]
    try:
        header = parse(changed)
    except CkptError:
        return
    assert sum(e.end - e.begin for e in header.entries) == len(changed) - header.data_start


def test_100_000_empty_tensors_are_parsed_in_seconds():
    empty = row("F32", (0,), (0, 0))
    data = file_of({f"t{i}": empty for i in range(100_000)})
    start = time.thread_time()
    header = parse(data)
    # 0.9 s on a core of 2.5 GHz; the margin is for slower ones and for tracers.
    assert time.thread_time() - start < 8
    assert len(header.entries) == 100_000


def test_the_collector_is_as_it_was_after_a_parse_and_after_a_failed_one():
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            parse(file_of(GOOD, b"abcd"))
            assert gc.isenabled() is was_on
            with pytest.raises(CorruptError):
                parse(file_of(GOOD, b"abc"))
            assert gc.isenabled() is was_on
        finally:
            gc.enable()
