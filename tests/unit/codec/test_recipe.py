"""Recipes: what is written is read, and nothing that is malformed raises anything untyped."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord.codec.bounded import UPDATE_DTYPES, GivenUp
from ckptcoord.codec.recipe import (
    CAST_FROM,
    PART_BYTES,
    How,
    Recipe,
    SourceFile,
    parse_recipes,
    part_count,
    render_recipes,
)
from ckptcoord.codec.tensorfile import TensorEntry, TensorHeader
from ckptcoord.codec.tensorspec import ITEM_BYTES, TensorSpec, check_tensor_name
from ckptcoord.core.digest import Digest
from ckptcoord.errors import CorruptError, FormatVersionError, InvalidNameError

PATH = "checkpoint-7/model.delta.safetensors"
DIGEST = Digest(bytes(range(32)))
BASE = SourceFile(path="checkpoint-5/model.safetensors", size_bytes=4096, digest=DIGEST)
BESIDE = SourceFile(path="./optimizer.delta.safetensors")


def header(recipes):
    """What the file stores for these recipes."""
    entries, at = [], 8
    for one in recipes:
        if one.is_stored:
            spec = TensorSpec(name=one.spec.name, dtype="U8", shape=(sum(one.parts),))
            entries.append(TensorEntry(spec=spec, begin=at, end=at + spec.nbytes))
            at += spec.nbytes
    return TensorHeader(entries=tuple(entries), metadata={}, data_start=8, raw=b"")


def recipe(name, how, source=None, parts=(), *, dtype="F32", shape=(8,)):
    spec = TensorSpec(name=name, dtype=dtype, shape=shape)
    return Recipe(spec=spec, digest=DIGEST, how=how, source=source, parts=parts)


SOME = (
    recipe("coded", How.CODED, (BASE, "coded"), (20,)),
    replace(
        recipe("fresh", How.CODED, None, (1, 2), shape=(PART_BYTES // 4 + 1,)),
        prints=bytes(range(32)),
    ),
    recipe("same", How.SAME, (BASE, "same")),
    recipe("cast", How.CAST, (BESIDE, "same"), dtype="BF16"),
    replace(
        recipe("update", How.UPDATE, (BASE, "update"), (5,)),
        step=0.125,
        given_up=GivenUp(max_abs=0.5, relative_l2=1e-3),
    ),
)


def document():
    return json.loads(render_recipes(SOME))


def in_the_files_order(recipes):
    """A recipe that was renamed may stand elsewhere when it is written again."""
    return tuple(sorted(recipes, key=lambda one: one.spec.name))


def parse(value, recipes=SOME):
    text = value if isinstance(value, str) else json.dumps(value)
    return tuple(parse_recipes(text, header(recipes), path=PATH).values())


# --- round trip -----------------------------------------------------------------------------------


def is_name(text):
    try:
        check_tensor_name(text)
    except InvalidNameError:
        return False
    return True


NAMES = st.text(min_size=1, max_size=4).filter(is_name) | st.sampled_from(("h.0.weight", "\\", '"'))
DIGESTS = st.binary(min_size=32, max_size=32).map(Digest)
FILES = st.sampled_from(("model-00001-of-00002.safetensors", "rng.rank00003.safetensors", "_x-"))
FOLDERS = st.sampled_from(("checkpoint-0", "checkpoint-12@exp", "checkpoint-3@a.b.0123abcd"))
SHARES = st.floats(0.0, allow_infinity=False)
GIVEN_UP = st.builds(GivenUp, max_abs=SHARES, relative_l2=SHARES)
BESIDES = FILES.map(lambda name: SourceFile(path=f"./{name}"))
SOURCES = st.builds(
    lambda folder, name, size, digest: SourceFile(
        path=f"{folder}/{name}", size_bytes=size, digest=digest
    ),
    FOLDERS,
    FILES,
    st.integers(1, 2**60),
    DIGESTS,
)


@st.composite
def recipes(draw):
    how = draw(st.sampled_from(How))
    dtypes = {How.CAST: CAST_FROM, How.UPDATE: UPDATE_DTYPES}.get(how, ITEM_BYTES)
    dtype = draw(st.sampled_from(sorted(dtypes)))
    shape = draw(
        st.lists(st.integers(0, 9), max_size=4)
        | st.lists(st.integers(0, 2 * PART_BYTES), max_size=1)
    )
    spec = TensorSpec(name=draw(NAMES), dtype=dtype, shape=tuple(shape))
    source = draw(st.tuples(SOURCES | BESIDES, NAMES))
    parts: tuple[int, ...] = ()
    prints, step = b"", 0.0
    if how in (How.CODED, How.UPDATE):
        count = part_count(spec.nbytes)
        parts = tuple(draw(st.lists(st.integers(0, PART_BYTES), min_size=count, max_size=count)))
        prints = draw(st.just(b"") | st.binary(min_size=16 * count, max_size=16 * count))
    if how is How.CODED:
        source = draw(st.none() | st.just(source))
    elif how is How.UPDATE:
        step = draw(st.floats(min_value=1e-300, allow_infinity=False))
    return Recipe(
        spec=spec,
        digest=draw(DIGESTS),
        how=how,
        source=source,
        parts=parts,
        prints=prints,
        step=step,
        given_up=draw(st.none() | GIVEN_UP),
    )


@given(st.lists(recipes(), max_size=6, unique_by=lambda one: one.spec.name))
def test_what_is_rendered_is_parsed(given_recipes):
    found = parse(render_recipes(given_recipes), given_recipes)
    assert found == tuple(sorted(given_recipes, key=lambda one: one.spec.name))


def test_a_source_is_listed_once_however_often_it_is_used():
    some = [recipe(name, How.SAME, (BASE, name)) for name in "abc"]
    assert len(json.loads(render_recipes(some))["sources"]) == 1


@pytest.mark.parametrize(
    ("nbytes", "count"), [(0, 0), (1, 1), (PART_BYTES, 1), (PART_BYTES + 1, 2)]
)
def test_a_tensor_has_as_many_parts_as_it_takes(nbytes, count):
    assert part_count(nbytes) == count


def test_a_source_names_its_checkpoints_folder():
    assert BASE.folder == "checkpoint-5"
    assert BESIDE.folder == ""


# --- malformed ------------------------------------------------------------------------------------


def put(*steps, value):
    def change(found):
        for step in steps[:-1]:
            found = found[step]
        found[steps[-1]] = value

    return change


def drop(*steps):
    def change(found):
        for step in steps[:-1]:
            found = found[step]
        del found[steps[-1]]

    return change


def source(path=BASE.path, size=4096, digest=str(DIGEST)):
    return put("sources", 0, value=[path, size, digest])


MALFORMED = {
    "no format version": drop("format_version"),
    "version 0": put("format_version", value=0),
    "version true": put("format_version", value=True),
    "version of a float": put("format_version", value=1.0),
    "other parts": put("part_bytes", value=PART_BYTES // 2),
    "parts true": put("part_bytes", value=True),
    "unknown field": put("surprise", value=1),
    "no sources": drop("sources"),
    "sources in an object": put("sources", value={}),
    "too many sources": lambda d: d.update(sources=[["./x", 0, None]] * 100_001),
    "tensors in a list": put("tensors", value=[]),
    "source above": source("../model.safetensors"),
    "source above its folder": source("checkpoint-5/../model.safetensors"),
    "source twice above": source("checkpoint-5/.."),
    "source absolute": source("/etc/passwd"),
    "source in no folder": source("model.safetensors"),
    "source in a subfolder": source("checkpoint-5/sub/model.safetensors"),
    "source hidden": source("checkpoint-5/.hidden"),
    "source an option": source("checkpoint-5/-rf"),
    "source of no name": source("checkpoint-5/"),
    "source of dots": source("checkpoint-5/..."),
    "source of a long name": source("checkpoint-5/" + "a" * 256),
    "source with NUL": source("checkpoint-5/a\0b"),
    "source with a newline": source("checkpoint-5/a\n"),
    "source with a backslash": source("checkpoint-5/..\\x"),
    "source not ASCII": source("checkpoint-5/ä"),
    "source with Arabic digits": source("checkpoint-\u0665/model.safetensors"),
    "source in the log": source(".ckptcoord/log"),
    "source in no checkpoint's folder": source("checkpoint-x/model.safetensors"),
    "source in a folder with a leading zero": source("checkpoint-05/model.safetensors"),
    "source in the branch ..": source("checkpoint-5@../model.safetensors"),
    "source in no branch": source("checkpoint-5@/model.safetensors"),
    "source of size 0": source(size=0),
    "source of size -1": source(size=-1),
    "source of size true": source(size=True),
    "source of a float size": source(size=1.0),
    "source without digest": source(digest=None),
    "source of a short digest": source(digest="blake3:00"),
    "source of another digest": source(digest="sha256:" + "0" * 64),
    "source of two fields": put("sources", 0, value=[BASE.path, 1]),
    "source of four fields": put("sources", 0, value=[BASE.path, 1, str(DIGEST), 0]),
    "source as text": put("sources", 0, value="abc"),
    "beside: nothing": source("./", 0, None),
    "beside: above": source("./../checkpoint-5/x", 0, None),
    "beside: dots": source("./..", 0, None),
    "beside: subfolder": source("./a/b", 0, None),
    "beside: absolute": source(".//etc/passwd", 0, None),
    "beside: with a size": source("./x", 5, None),
    "beside: with a digest": source("./x", 0, str(DIGEST)),
    "beside: size false": source("./x", False, None),
    "beside: size 0.0": source("./x", 0.0, None),
    "recipe no object": put("tensors", "same", value=[]),
    "recipe of an unknown how": put("tensors", "same", "how", value="copied"),
    "how a list": put("tensors", "same", "how", value=[]),
    "how CODED in capitals": put("tensors", "coded", "how", value="CODED"),
    "recipe with an unknown field": put("tensors", "same", "offset", value=0),
    "fingerprints of one part of two": put("tensors", "fresh", "xxh3", value="00" * 16),
    "fingerprints of three parts of two": put("tensors", "fresh", "xxh3", value="00" * 48),
    "fingerprints in capitals": put("tensors", "fresh", "xxh3", value="AA" * 32),
    "fingerprints that are no hexadecimal": put("tensors", "fresh", "xxh3", value=" 0" * 32),
    "fingerprints as null": put("tensors", "fresh", "xxh3", value=None),
    "same with fingerprints": put("tensors", "same", "xxh3", value="00" * 16),
    "same with parts": put("tensors", "same", "parts", value=[]),
    "coded without parts": drop("tensors", "coded", "parts"),
    "same from nothing": drop("tensors", "same", "from"),
    "cast from null": put("tensors", "cast", "from", value=None),
    "cast to what nothing is rounded to": put("tensors", "cast", "dtype", value="F64"),
    "update of what has no steps": put("tensors", "update", "dtype", value="I32"),
    "update from nothing": drop("tensors", "update", "from"),
    "update without step": drop("tensors", "update", "step"),
    "update of an int's step": put("tensors", "update", "step", value=1),
    "update without parts": drop("tensors", "update", "parts"),
    "step of what is coded": put("tensors", "coded", "step", value=1.0),
    "given up: one number": put("tensors", "update", "given_up", value=[0.5]),
    "given up: negative": put("tensors", "update", "given_up", value=[0.5, -1.0]),
    "given up: whole": put("tensors", "update", "given_up", value=[0.5, 1]),
    "given up: text": put("tensors", "update", "given_up", value="much"),
    "unknown dtype": put("tensors", "same", "dtype", value="F12"),
    "dtype a number": put("tensors", "same", "dtype", value=4),
    "shape of true": put("tensors", "same", "shape", value=[True]),
    "shape of a float": put("tensors", "same", "shape", value=[8.0]),
    "shape of lists": put("tensors", "same", "shape", value=[[8]]),
    "shape negative": put("tensors", "same", "shape", value=[-8]),
    "shape huge": put("tensors", "same", "shape", value=[2**40, 2**40]),
    "shape huge behind a zero": put("tensors", "same", "shape", value=[0, 2**63 - 1, 2**63 - 1]),
    "shape of many dimensions": put("tensors", "same", "shape", value=[1] * 33),
    "shape null": put("tensors", "same", "shape", value=None),
    "no digest": drop("tensors", "same", "digest"),
    "digest in capitals": put("tensors", "same", "digest", value=str(DIGEST).upper()),
    "source out of range": put("tensors", "same", "from", value=[2, "same"]),
    "source negative": put("tensors", "same", "from", value=[-1, "same"]),
    "source true": put("tensors", "same", "from", value=[True, "same"]),
    "source a float": put("tensors", "same", "from", value=[0.0, "same"]),
    "from a number": put("tensors", "same", "from", value=0),
    "from three": put("tensors", "same", "from", value=[0, "same", 1]),
    "from no name": put("tensors", "same", "from", value=[0, None]),
    "one part too many": put("tensors", "coded", "parts", value=[10, 10]),
    "one part too few": put("tensors", "fresh", "parts", value=[3]),
    "no part": put("tensors", "coded", "parts", value=[]),
    "part negative": put("tensors", "fresh", "parts", value=[4, -1]),
    "part true": put("tensors", "fresh", "parts", value=[True, 2]),
    "part a float": put("tensors", "coded", "parts", value=[20.0]),
    "parts of other bytes": put("tensors", "coded", "parts", value=[19]),
    "more shape than parts": put("tensors", "coded", "shape", value=[PART_BYTES]),
    "an entry without recipe": drop("tensors", "coded"),
    "an entry of what is the same": lambda d: (
        d["tensors"]["coded"].update(how="same"),
        d["tensors"]["coded"].pop("parts"),
    ),
    "coded without entry": lambda d: (
        d["tensors"].update(more=d["tensors"]["coded"]),
        drop("tensors", "coded")(d),
    ),
    "a name with a .. part": lambda d: d["tensors"].update({"../x": d["tensors"]["same"]}),
    "an empty name": lambda d: d["tensors"].update({"": d["tensors"]["same"]}),
    "the reserved name": lambda d: d["tensors"].update(__metadata__=d["tensors"]["same"]),
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_what_is_malformed_is_corrupt_and_the_file_is_named(name):
    value = document()
    MALFORMED[name](value)
    with pytest.raises(CorruptError) as caught:
        parse(value)
    assert caught.value.path == PATH
    assert len(str(caught.value)) < 1_000


def test_one_that_is_malformed_is_met_when_it_is_asked_for_and_no_other_is():
    value = document()
    first, *others = value["tensors"]
    value["tensors"][first]["dtype"] = "F31"
    recipes = parse_recipes(json.dumps(value), header(SOME), path=PATH)
    assert list(recipes) == [first, *others]
    assert [recipes[name].spec.name for name in others] == others
    for _ in range(2):
        with pytest.raises(CorruptError):
            recipes[first]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"format_version":1,"format_version":1}', "[" * 100_000, '"\\ud800"',
     "NaN", '{"a":1e999}', '{"a":' + "9" * 10_000 + "}"],
)  # fmt: skip
def test_what_is_no_document_is_corrupt(text):
    with pytest.raises(CorruptError):
        parse(text)


@pytest.mark.parametrize("more", [{}, {"tensors": 5}, {"sources": None, "surprise": 1}])
def test_a_newer_version_is_said_to_be_one_whatever_else_there_is(more):
    with pytest.raises(FormatVersionError) as caught:
        parse({**document(), "format_version": 2, **more})
    assert (caught.value.path, caught.value.found) == (PATH, 2)


def test_a_part_that_takes_far_more_than_it_codes_is_refused():
    big = [replace(SOME[0], parts=(3 * PART_BYTES,))]
    with pytest.raises(CorruptError, match="'coded'"):
        parse(render_recipes(big), big)


@pytest.mark.parametrize("dtype", ["I8", "F32"])
def test_an_entry_of_another_dtype_is_refused(dtype):
    (entry,) = header(SOME[:1]).entries
    spec = TensorSpec(name="coded", dtype=dtype, shape=(20 // ITEM_BYTES[dtype],))
    stored = replace(header([]), entries=(replace(entry, spec=spec),))
    with pytest.raises(CorruptError, match="'coded'"):
        tuple(parse_recipes(render_recipes(SOME[:1]), stored, path=PATH).values())


ODD = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 2**63, 10**63, 1.5, -0.0, "", "x", "..", "./..", "\0", [], {},
     [[]], [0, "x"], ["./x", 0, None], {"": None}, [[[[[[[[[0]]]]]]]]], "coded", str(DIGEST)]
)  # fmt: skip


def places(value, steps=()):
    """The way to everything in a JSON value."""
    if steps:
        yield steps
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*steps, key))


@given(
    changes=st.lists(
        st.tuples(st.sampled_from(sorted(places(document()), key=str)), ODD), min_size=1, max_size=3
    )
)
def test_an_odd_value_anywhere_is_refused_by_type_or_means_something(changes):
    value = document()
    for steps, odd in changes:
        try:
            put(*steps, value=deepcopy(odd))(value)
        except (TypeError, KeyError, IndexError):
            continue  # the way there is gone
    try:
        found = parse(value)
    except (CorruptError, FormatVersionError):
        return
    assert parse(render_recipes(found), found) == in_the_files_order(found)


@given(st.data())
def test_a_text_that_was_cut_or_scribbled_on_is_refused_by_type_or_means_something(data):
    text = render_recipes(SOME)
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 30)))
    scribble = data.draw(st.text(st.sampled_from('0123456789-.eE{}[]",:\\utrfn\x00'), max_size=4))
    try:
        found = parse(text[:begin] + scribble + text[end:])
    except (CorruptError, FormatVersionError):
        return
    assert parse(render_recipes(found), found) == in_the_files_order(found)
