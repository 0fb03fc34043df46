"""Sources that mean harm: an error, nothing run, nothing allocated, nothing written."""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import pickle  # noqa: TID251 (what others write is the test input)
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptcoord.errors import (
    CkptError,
    CorruptError,
    FormatError,
    InvalidNameError,
    MissingFileError,
    StorageError,
    UnsafePathError,
)
from ckptcoord.formats.detect import find_source
from ckptcoord.formats.folder import SourceFolder
from ckptcoord.formats.importing import plan_import, run_import
from ckptcoord.formats.pickles import Call, Global, read_pickle
from ckptcoord.formats.statecheck import check_state
from ckptcoord.formats.torchfile import load_torch

GOLDEN = Path(__file__).parents[2] / "golden"
FLOAT = b"ctorch\nFloatStorage\n"


def bring(path, root):
    source = find_source(path)
    return list(run_import(source, plan_import(source), root))


def refused(path, root, kind=CkptError):
    """An error of that kind, and nothing is written."""
    with pytest.raises(kind) as caught:
        bring(path, root)
    assert not Path(root).exists()
    return caught.value


def packed(path, data, records=None, *, compression=zipfile.ZIP_STORED):
    """A file as torch.save lays them out, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def tensor_pickle(size, stride, *, numel=4, offset=0, kind=FLOAT, key=b"0"):
    """`_rebuild_tensor_v2` of these numbers."""

    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = (
        b"(X\x07\x00\x00\x00storage" + kind + b"X\x01\x00\x00\x00" + key
        + b"X\x03\x00\x00\x00cpu" + number(numel) + b"tQ"
    )  # fmt: skip
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset)
        + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ckptcoord-was-here",)


# --- files of torch.save -------------------------------------------------------------------------


def test_a_sound_one_of_these_is_read(tmp_path):
    packed(tmp_path / "a.pt", tensor_pickle([2, 2], [2, 1]), {"data/0": bytes(16)})
    assert torch.equal(load_torch(SourceFolder(tmp_path), "a.pt"), torch.zeros(2, 2))


def test_no_code_of_the_file_is_run(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "x": Evil()}, tmp_path / "a.pt")
    error = refused(tmp_path / "a.pt", tmp_path / "run", FormatError)
    assert "posix.system" in error.what
    assert "torch.save" in error.help
    assert not Path("/tmp/ckptcoord-was-here").exists()


@pytest.mark.parametrize(
    ("size", "stride", "more"),
    [
        ([10**9], [1], {}),
        ([10**9, 10**9, 10**9], [0, 0, 0], {}),
        ([10**12], [0], {}),
        ([5], [1], {}),
        ([1], [1], {"offset": 4}),
        ([-1], [1], {}),
        ([2], [-1], {}),
        ([2], [2**62], {}),
        ([2, 2], [1], {}),
        ([1] * 65, [1] * 65, {}),
        ([4], [1], {"numel": 10**12}),
        ([4], [1], {"key": b"1"}),
        ([4], [1], {"kind": b"cos\nFloatStorage2\n"}),
        ([4], [1], {"kind": b"ctorch\nDoubleStorage\n"}),
    ],
    ids=str,
)
def test_numbers_that_the_file_does_not_hold(tmp_path, size, stride, more):
    packed(tmp_path / "a.pt", tensor_pickle(size, stride, **more), {"data/0": bytes(16)})
    tracemalloc.start()
    refused(tmp_path / "a.pt", tmp_path / "run")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def called(name, *args):
    module, _, attribute = name.rpartition(".")
    given = b"".join(pickle.dumps(arg, 2)[2:-1] for arg in args)
    return b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"(" + given + b"tR."


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("builtins.bytearray", (10**12,)),
        ("builtins.bytearray", (10**12, 1)),
        ("torch.FloatTensor", (10**12,)),
        ("torch.Tensor", (10**12,)),
        ("torch.storage.UntypedStorage", (10**12,)),
        ("torch.Size", ((-1,),)),
        ("builtins.set", (10**9,)),
        ("builtins.eval", ("1",)),
        ("torch._utils._rebuild_meta_tensor_no_storage", (1,)),
        ("collections.OrderedDict", ([1, 2],)),
        ("_codecs.encode", ("x", "rot13")),
        ("numpy.core.multiarray._reconstruct", (1, (10**12,), "b")),
        ("numpy.dtype", ("O8", False, True)),
        ("numpy.dtype", ("V1000000000", False, True)),
        ("numpy.dtype", ("f4", False, True, 1)),
        ("torch.device", ("x" * 1000,)),
    ],
    ids=str,
)
def test_calls_that_no_checkpoint_needs(tmp_path, name, args):
    packed(tmp_path / "a.pt", called(name, *args))
    refused(tmp_path / "a.pt", tmp_path / "run", (FormatError, CorruptError))


def test_an_array_of_numpy_that_lacks_bytes(tmp_path):
    import numpy as np

    good = io.BytesIO()
    torch.save({"n": np.zeros(3, dtype=np.uint32)}, good)
    with zipfile.ZipFile(good) as archive:
        name = next(one for one in archive.namelist() if one.endswith("data.pkl"))
        data = archive.read(name)
    assert data.count(b"K\x03\x85") == 1
    packed(tmp_path / "a.pt", data)
    assert len(load_torch(SourceFolder(tmp_path), "a.pt")["n"]) == 3
    packed(tmp_path / "a.pt", data.replace(b"K\x03\x85", b"K\x09\x85"))
    refused(tmp_path / "a.pt", tmp_path / "run", CorruptError)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02K\x01",
        b"\x80\x02h\x05.",
        b"\x80\x02)\x94" + b"\x85" * 200 + b".",
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)R.",
        b"(i__main__\nX\n.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02\x8a\xff.",
        b"\x80\x02u.",
        b"\x80\x02(K\x01u.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02]K\x01b.",
    ],
    ids=count(),
)
def test_pickles_that_are_none(tmp_path, data):
    packed(tmp_path / "a.pt", data)
    refused(tmp_path / "a.pt", tmp_path / "run")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_are_named(tmp_path, protocol):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt", pickle_protocol=protocol)
    error = refused(tmp_path / "a.pt", tmp_path / "run", FormatError)
    assert f"protocol {protocol}" in error.what


@pytest.mark.parametrize("value", [[None], ["x"], [b"x"]], ids=str)
def test_arrays_of_numpy_that_are_no_numbers_are_named(tmp_path, value):
    import numpy as np

    torch.save({"a": np.array(value)}, tmp_path / "a.pt")
    assert "dtype" in refused(tmp_path / "a.pt", tmp_path / "run", FormatError).what


def test_nobody_is_told_to_run_the_code_of_a_file(tmp_path):
    for value in ({"a": Evil()}, {"a": frozenset([1])}, torch.nn.Linear(2, 2)):
        torch.save(value, tmp_path / "a.pt")
        assert "weights_only=False" not in str(refused(tmp_path / "a.pt", tmp_path / "run"))
    packed(tmp_path / "a.pt", b"\x80\x02K\x010N.")  # an opcode that torch does not know
    error = refused(tmp_path / "a.pt", tmp_path / "run", FormatError)
    assert "False" not in str(error)


def test_keys_of_any_depth_are_not_hashed():
    # Python hashes a tuple in a tuple in C, with no limit but that of its stack.
    for end in (b"K\x01s.", b"K\x01d."):
        deep = b"\x80\x02" + (b"}" if end[-2:-1] == b"s" else b"(") + b")" + b"\x85" * 50_000 + end
        with pytest.raises(CorruptError, match="no key"):
            read_pickle(deep, path="x")


def test_lists_that_multiply(tmp_path):
    # Ten lists, each holding the one before ten times: a few hundred bytes, 10**10 values.
    data = b"\x80\x02(]q\x00K\x01a"
    for level in range(10):
        data += b"](" + (b"h" + bytes([level])) * 10 + b"eq" + bytes([level + 1])
    packed(tmp_path / "a.pt", data + b"t.")
    error = refused(tmp_path / "a.pt", tmp_path / "run", CorruptError)
    assert "values" in error.what


def test_views_that_multiply():
    base = torch.zeros(1000)
    with pytest.raises(CorruptError, match="more than the file"):
        check_state([base[i:] for i in range(900)], "x", limit_bytes=400_000)
    check_state([base] * 900, "x", limit_bytes=4000)
    with pytest.raises(CorruptError, match="more than the file"):
        check_state(torch.zeros(1).expand(10**12), "x", limit_bytes=10**9)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CorruptError, match="itself"):
        check_state(loop, "x", limit_bytes=1)


def test_a_zip_bomb(tmp_path):
    packed(tmp_path / "a.pt", b"\x80\x02" + b"N0" * 50_000_000, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 1 << 20
    tracemalloc.start()
    refused(tmp_path / "a.pt", tmp_path / "run", CorruptError)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["data.pkl", "../evil", "data/../../evil"])
def test_records_twice_or_elsewhere(tmp_path, name):
    packed(tmp_path / "a.pt", tensor_pickle([1], [1]), {"data/0": bytes(16), name: b"x"})
    refused(tmp_path / "a.pt", tmp_path / "run", CorruptError)


def test_a_zip_with_something_behind_it(tmp_path):
    packed(tmp_path / "a.pt", tensor_pickle([1], [1]), {"data/0": bytes(16)})
    with (tmp_path / "a.pt").open("ab") as file:
        file.write(b"more")
    refused(tmp_path / "a.pt", tmp_path / "run", CorruptError)


@pytest.mark.parametrize("cut", [0, 1, 4, 30, 200, -30, -1])
def test_a_file_that_was_cut_off(tmp_path, cut):
    torch.save({"a": torch.ones(10)}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[:cut])
    refused(tmp_path / "a.pt", tmp_path / "run")


def test_old_files_and_scripts_are_refused_with_what_to_do(tmp_path):
    old = {"a": torch.ones(1)}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "save it again" in refused(tmp_path / "old.pt", tmp_path / "run", FormatError).help
    packed(tmp_path / "script.pt", b"\x80\x02}.", {"constants.pkl": b"\x80\x02)."})
    error = refused(tmp_path / "script.pt", tmp_path / "run", FormatError)
    assert "TorchScript" in error.what


@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_an_error_or_another_value(tmp_path_factory, where, bit):
    folder = tmp_path_factory.mktemp("flip")
    torch.save({"a": torch.ones(3), "n": [1, "x"], "o": OrderedDict(b=2.5)}, folder / "a.pt")
    data = bytearray((folder / "a.pt").read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    (folder / "a.pt").write_bytes(data)
    with suppress(CkptError):
        load_torch(SourceFolder(folder), "a.pt")


SOURCES = ["hf/one", "hf/trainer/checkpoint-6", "dcp/values", "gradient/sparse", "forgather/output"]


@settings(max_examples=40)
@given(
    source=st.sampled_from(SOURCES),
    file=st.integers(0, 50),
    where=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from([b"", b"\0", b"\xff", b"\x01\x02\x03\x04\x05"]),
    length=st.integers(0, 3),
)
def test_any_damage_is_an_error_or_another_value(
    tmp_path_factory, source, file, where, change, length
):
    folder = tmp_path_factory.mktemp("damage") / "s"
    shutil.copytree(GOLDEN / source, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[file % len(files)]
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    data[at : at + length] = change
    path.write_bytes(data)
    with suppress(CkptError):
        plan_import(find_source(folder))


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_pickle_or_an_error(data):
    with suppress(CorruptError):
        read_pickle(data, path="x")


@settings(max_examples=100)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
        | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
        | st.tuples(inner, inner),
        max_leaves=20,
    ),
    protocol=st.sampled_from([2, 3, 4, 5]),
)  # fmt: skip
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    found = read_pickle(data, path="x")
    if not found.calls:  # protocol 2 has no bytes
        assert found.value == value
    assert {call.name for call in found.calls} <= {
        "_codecs.encode",
        "builtins.bytes",
        "__builtin__.bytes",
    }


def test_what_a_pickle_wants_is_recorded_and_not_done():
    found = read_pickle(pickle.dumps(Evil(), 4), path="x")
    assert isinstance(found.value, Call)
    assert found.value.what in (Global("posix.system"), Global("os.system"))


# --- folders -------------------------------------------------------------------------------------


def test_a_header_that_lies(tmp_path):
    head = {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    text = json.dumps(head).encode()
    (tmp_path / "s").mkdir()
    file = tmp_path / "s/model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refused(tmp_path / "s", tmp_path / "run", CorruptError)
    file.write_bytes(struct.pack("<Q", 2**60) + text)
    refused(tmp_path / "s", tmp_path / "run", CorruptError)
    file.write_bytes(b"")
    refused(tmp_path / "s", tmp_path / "run", CorruptError)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "__metadata__", "a\0b", "x" * 5000, ""])
def test_names_of_tensors(tmp_path, name):
    value = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({name: value}).encode()
    (tmp_path / "s").mkdir()
    file = tmp_path / "s/model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(tmp_path / "s", tmp_path / "run", (CorruptError, InvalidNameError))


def test_names_of_tensors_in_files_of_torch_are_made_fit(tmp_path):
    import ckptcoord

    names = ["../a", "/etc/passwd", "a\0b", "x" * 10_000, "", "\x1b[31m", "a.lock"]
    torch.save({"model": {name: torch.ones(1) for name in names}}, tmp_path / "a.pt")
    bring(tmp_path / "a.pt", tmp_path / "run")
    assert list(ckptcoord.load(tmp_path / "run")["model"]) == names
    inside = {path.name for path in (tmp_path / "run/checkpoint-0").iterdir()}
    assert inside == {"checkpoint_manifest.json", "model.safetensors", "model.state.json"}


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "no.safetensors", "a/b.safetensors", 5]
)
def test_an_index_names_files_beside_it_only(tmp_path, file):
    shutil.copytree(GOLDEN / "hf/sharded", tmp_path / "m")
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    path = tmp_path / "m/model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    refused(tmp_path / "m", tmp_path / "run", (CorruptError, UnsafePathError))


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff"]
)
def test_an_index_that_is_none(tmp_path, text):
    shutil.copytree(GOLDEN / "hf/sharded", tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text(text, encoding="latin1")
    refused(tmp_path / "m", tmp_path / "run", CorruptError)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("hf/one", "model.safetensors"),
        ("hf/one", "config.json"),
        ("hf/trainer/checkpoint-6", "optimizer.pt"),
        ("hf/trainer/checkpoint-6", "trainer_state.json"),
        ("dcp/sharded", "__0_0.distcp"),
        ("dcp/sharded", ".metadata"),
        ("gradient/auto", "ckpt_main_s10.pt"),
        ("forgather/output/checkpoints/checkpoint-10", "scheduler_state.pt"),
    ],
)
def test_links_and_other_things_in_a_folder_are_not_opened(tmp_path, source, file):
    shutil.copytree(GOLDEN / source, tmp_path / "s")
    (tmp_path / "s" / file).rename(tmp_path / "elsewhere")
    (tmp_path / "s" / file).symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "s", tmp_path / "run", UnsafePathError)
    (tmp_path / "s" / file).unlink()
    os.mkfifo(tmp_path / "s" / file)
    refused(tmp_path / "s", tmp_path / "run", UnsafePathError)
    (tmp_path / "s" / file).unlink()
    (tmp_path / "s" / file).mkdir()
    refused(tmp_path / "s", tmp_path / "run", CkptError)


def test_a_folder_of_checkpoints_that_is_a_link_is_not_entered(tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(GOLDEN / "dcp/values", tmp_path / "elsewhere")
    (tmp_path / "out/checkpoint-5").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "out", tmp_path / "run", FormatError)
    (tmp_path / "out/checkpoints").symlink_to(tmp_path)
    refused(tmp_path / "out", tmp_path / "run", (FormatError, UnsafePathError))


def test_more_files_than_may_be_open_are_said_by_name(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mmap, "mmap", full)
    error = refused(GOLDEN / "hf/one", tmp_path / "run", StorageError)
    assert "model.safetensors" in error.what


def test_the_path_that_was_given_may_be_a_link(tmp_path):
    (tmp_path / "link").symlink_to(GOLDEN / "hf/one")
    (tmp_path / "file").symlink_to(GOLDEN / "hf/one/model.safetensors")
    assert bring(tmp_path / "link", tmp_path / "a")
    (tmp_path / "named.safetensors").symlink_to(GOLDEN / "hf/one/model.safetensors")
    assert bring(tmp_path / "named.safetensors", tmp_path / "b")


# --- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.fixture
def dcp(tmp_path):
    shutil.copytree(GOLDEN / "dcp/sharded", tmp_path / "d")
    return tmp_path / "d"


def test_metadata_is_read_and_not_run(dcp, tmp_path):
    (dcp / ".metadata").write_bytes(pickle.dumps({"a": Evil()}))
    refused(dcp, tmp_path / "run", CorruptError)
    assert not Path("/tmp/ckptcoord-was-here").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"__0_0.distcp", b"../.././../x"),
        (b"__0_0.distcp", b"/etc/passwd2"),
        (b"__0_0.distcp", b"__9_9.distcp"),
        (b"float32", b"float99"),
        (b"float32", b"float64"),
        (b"TensorStorageMetadata", b"TensorStorageMetadatb"),
        (b"state_dict_metadata", b"state_dict_metadatb"),
        (b"offsets", b"offsetz"),
        (b"relative_path", b"relative_patH"),
        (b"length", b"lengtH"),
    ],
)
def test_metadata_that_lies(dcp, tmp_path, old, new):
    data = (dcp / ".metadata").read_bytes()
    assert old in data
    (dcp / ".metadata").write_bytes(data.replace(old, new))
    refused(dcp, tmp_path / "run")


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_metadata_that_was_cut_off(dcp, tmp_path, cut):
    (dcp / ".metadata").write_bytes((dcp / ".metadata").read_bytes()[:cut])
    refused(dcp, tmp_path / "run", CorruptError)


def test_sizes_that_the_files_do_not_hold(tmp_path):
    import torch.distributed.checkpoint as dist_cp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    with pytest.warns(UserWarning, match="single process"):
        dist_cp.save({"a": torch.ones(4)}, checkpoint_id=tmp_path / "d", no_dist=True)
    path = tmp_path / "d/.metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 (made three lines above)
    entry = metadata.state_dict_metadata["a"]
    big = torch.Size([10**12])
    entry.size, entry.chunks = big, [ChunkStorageMetadata(torch.Size([0]), big)]
    path.write_bytes(pickle.dumps(metadata))
    assert "fewer bytes" in refused(tmp_path / "d", tmp_path / "run", CorruptError).what
    for boxes in ([], [(0, 10**12), (0, 10**12)], [(0, 4), (10, 4)], [(10**12, 4)]):
        entry.chunks = [ChunkStorageMetadata(torch.Size([a]), torch.Size([n])) for a, n in boxes]
        path.write_bytes(pickle.dumps(metadata))
        refused(tmp_path / "d", tmp_path / "run", CorruptError)


def test_paths_of_values_that_cross(tmp_path):
    import torch.distributed.checkpoint as dist_cp

    with pytest.warns(UserWarning, match="single process"):
        dist_cp.save(
            {"a": {"b": torch.ones(4)}, "c": 1}, checkpoint_id=tmp_path / "d", no_dist=True
        )
    path = tmp_path / "d/.metadata"
    for paths in (
        {"a.b": ("a",), "c": ("a", "b")},
        {"a.b": ("x",), "c": ("x",)},
        {"a.b": (), "c": ("c",)},
    ):
        metadata = pickle.loads(path.read_bytes())  # noqa: S301 (as above)
        metadata.planner_data = paths
        path.write_bytes(pickle.dumps(metadata))
        refused(tmp_path / "d", tmp_path / "run", CorruptError)


# --- gradient-desc, Forgather, Trainer -----------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"checkpoints": 5}',
        '{"checkpoints": [5]}',
        '{"checkpoints": [{"branch": "main", "step": -1}]}',
        '{"checkpoints": [{"branch": "main", "step": true}]}',
        '{"checkpoints": [{"branch": "main", "step": 1e99}]}',
        '{"checkpoints": [{"branch": 5, "step": 1}]}',
    ],
)
def test_a_manifest_of_gradient_desc_that_is_none(tmp_path, text):
    shutil.copytree(GOLDEN / "gradient/off", tmp_path / "g")
    (tmp_path / "g/manifest.json").write_text(text)
    refused(tmp_path / "g", tmp_path / "run", CorruptError)


@pytest.mark.parametrize("branch", ["..", "a b", ".lock", "x.lock", "latest", "-x"])
def test_branches_that_can_be_none(tmp_path, branch):
    shutil.copytree(GOLDEN / "gradient/off", tmp_path / "g")
    shutil.copy(tmp_path / "g/ckpt_main_s10.pt", tmp_path / f"g/ckpt_{branch}_s10.pt")
    refused(tmp_path / "g", tmp_path / "run", InvalidNameError)


@pytest.mark.parametrize("branch", ["../../x", "/etc/x", "a\0b", "x" * 10_000, ""])
def test_branches_in_the_manifest_lead_nowhere(tmp_path, branch):
    shutil.copytree(GOLDEN / "gradient/off", tmp_path / "g")
    document = {"checkpoints": [{"branch": branch, "step": 10}]}
    (tmp_path / "g/manifest.json").write_text(json.dumps(document))
    source = find_source(tmp_path / "g")
    assert len(source.left_out) == 1
    assert len(source.checkpoints) == 5


@pytest.mark.parametrize(
    "blob",
    [
        {"__compressed__": True, "scheme": "fp16", "shape": (2, 2), "values": torch.ones(4)},
        {"__compressed__": True, "scheme": "fp16", "shape": (6, 4), "values": torch.ones(3)},
        {"__compressed__": True, "scheme": "fp16", "shape": (6, 4), "values": "x"},
        {"__compressed__": True, "scheme": "fp16", "shape": 5, "values": torch.ones(24)},
        {"__compressed__": True, "scheme": "new", "shape": (6, 4), "values": torch.ones(24)},
        {
            "__compressed__": True,
            "scheme": "sparse_fp16",
            "shape": (6, 4),
            "indices": torch.tensor([[99, 99]]),
            "values": torch.ones(1),
        },
        {"__compressed__": True, "scheme": "sparse_fp16", "shape": (6, 4), "values": torch.ones(1)},
        torch.ones(7),
    ],
    ids=lambda blob: str(blob)[:80],
)
def test_differences_that_do_not_fit(tmp_path, blob):
    shutil.copytree(GOLDEN / "gradient/auto", tmp_path / "g")
    file = tmp_path / "g/ckpt_main_s20.pt"
    payload = torch.load(file, weights_only=True)  # noqa: TID251 (to change it)
    payload["data"]["model"]["0.weight"] = blob
    torch.save(payload, file)
    refused(tmp_path / "g", tmp_path / "run", (CorruptError, FormatError))


@pytest.mark.parametrize("payload", [[], {"data": 5}, {"is_delta": True}, torch.ones(2)], ids=str)
def test_files_of_gradient_desc_that_are_none(tmp_path, payload):
    shutil.copytree(GOLDEN / "gradient/auto", tmp_path / "g")
    torch.save(payload, tmp_path / "g/ckpt_main_s20.pt")
    refused(tmp_path / "g", tmp_path / "run", (CorruptError, FormatError))


def test_the_absolute_paths_in_gradient_desc_are_not_followed(tmp_path):
    shutil.copytree(GOLDEN / "gradient/auto", tmp_path / "g")
    elsewhere = tmp_path / "elsewhere.pt"
    shutil.move(tmp_path / "g/ckpt_main_s10.pt", elsewhere)
    file = tmp_path / "g/ckpt_main_s20.pt"
    payload = torch.load(file, weights_only=True)  # noqa: TID251 (to change it)
    payload["anchor_path"] = str(elsewhere)
    torch.save(payload, file)
    refused(tmp_path / "g", tmp_path / "run", MissingFileError)


@pytest.mark.parametrize("text", ["[]", "{}", '{"global_step": "x"}', '{"global_step": -5}', "{"])
def test_a_trainer_state_that_is_none(tmp_path, text):
    shutil.copytree(GOLDEN / "hf/trainer/checkpoint-6", tmp_path / "c")
    (tmp_path / "c/trainer_state.json").write_text(text)
    refused(tmp_path / "c", tmp_path / "run", CorruptError)


@pytest.mark.parametrize(
    "change",
    [
        {"log_history": 5, "epoch": "x", "best_metric": []},
        {"log_history": [5, {"step": 6, "loss": "x", "n": 1e300, "b": True}], "epoch": -1},
    ],
)
def test_a_trainer_state_with_odd_fields_is_read_without_them(tmp_path, change):
    shutil.copytree(GOLDEN / "hf/trainer/checkpoint-6", tmp_path / "c")
    path = tmp_path / "c/trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert bring(tmp_path / "c", tmp_path / "run")


def test_parts_that_need_more_than_data_are_left_out_by_name(tmp_path):
    shutil.copytree(GOLDEN / "hf/trainer/checkpoint-6", tmp_path / "c")
    for name in ("rng_state.pth", "scheduler.pt"):
        torch.save(Evil(), tmp_path / "c" / name)
    (done,) = bring(tmp_path / "c", tmp_path / "run")
    assert {"rng", "scheduler"}.isdisjoint(done.plan.components)
    assert [why.partition(":")[0] for why in done.plan.left_out] == [
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    ]


def test_a_manifest_of_forgather_with_odd_fields(tmp_path):
    shutil.copytree(GOLDEN / "forgather/output/checkpoints/checkpoint-10", tmp_path / "c")
    path = tmp_path / "c/checkpoint_manifest.json"
    path.write_text(json.dumps({"checkpoint_path": "x", "components": 5}))
    refused(tmp_path / "c", tmp_path / "run", CorruptError)
    odd = {"a": 5, "b": {"sharing_pattern": "per_rank", "ranks": "x"}, "../c": {"ranks": [1]}}
    path.write_text(json.dumps({"checkpoint_path": "x", "components": odd}))
    assert bring(tmp_path / "c", tmp_path / "run")


# --- what is given -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "absent", "\0", "x" * 10_000, "/dev/null", "/dev/zero"])
def test_paths_that_are_no_source(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CkptError):
        find_source(path)


def test_a_folder_that_holds_nothing_known(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match="safetensors"):
        find_source(tmp_path)


def test_a_file_whose_reads_fail_is_named():
    with pytest.raises(StorageError, match="mem: read failed"):
        plan_import(find_source(Path("/proc/self/mem")))
