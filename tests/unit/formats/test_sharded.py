"""`ckptcoord.sharded`: a model's folder, written and read as Hugging Face tools do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptcoord import sharded
from ckptcoord.errors import (
    ConfigError,
    CorruptError,
    DigestMismatchError,
    FormatError,
    InvalidNameError,
    OutputDirError,
    StateMismatchError,
    StorageError,
    UnsafePathError,
    UnsupportedStateError,
)
from ckptcoord.sharded import (
    find_latest_checkpoint,
    load_checkpoint,
    next_checkpoint_path,
    save_checkpoint,
    validate_checkpoint,
)

GOLDEN = Path(__file__).parents[2] / "golden/hf"
LAYOUTS = [(True, 2**31), (True, 100), (False, 2**31), (False, 100)]


class Tied(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize(("safetensors", "size"), LAYOUTS)
def test_what_is_saved_comes_back_in_every_layout(tmp_path, safetensors, size):
    model = Tied()
    save_checkpoint(tmp_path, model, safetensors=safetensors, max_shard_size=size)
    assert len(files(tmp_path)) == (1 if size > 10**6 else 3)
    found = load_checkpoint(tmp_path)
    assert equal(found, model.state_dict())
    assert found["head.weight"] is found["embed.weight"], "tied is tied again"
    other = Tied(seed=1)
    load_checkpoint(tmp_path, other)
    assert equal(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight


def test_tied_weights_are_stored_once_unless_that_is_not_wanted(tmp_path):
    save_checkpoint(tmp_path / "once", Tied())
    save_checkpoint(tmp_path / "twice", Tied(), include_param_sharing=False)
    once, twice = (tmp_path / name / "model.safetensors" for name in ("once", "twice"))
    assert twice.stat().st_size > once.stat().st_size + 7 * 4 * 4
    found = load_checkpoint(tmp_path / "twice")
    assert equal(found, Tied().state_dict())
    assert found["head.weight"] is not found["embed.weight"]


def test_groups_of_tied_names_can_be_given_for_a_plain_state(tmp_path):
    state = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3)}
    save_checkpoint(tmp_path, state, param_sharing_metadata=[["a", "b", "elsewhere"]])
    found = load_checkpoint(tmp_path)
    assert found["a"] is found["b"]
    assert equal(found, state)
    with pytest.raises(ConfigError, match="they differ"):
        save_checkpoint(tmp_path, state, param_sharing_metadata=[["a", "c"]])
    with pytest.raises(ConfigError, match="two groups"):
        save_checkpoint(tmp_path, state, param_sharing_metadata=[["a", "b"], ["b", "a"]])
    assert equal(load_checkpoint(tmp_path), state)


def test_a_module_on_meta_gets_its_tensors_by_assignment_and_stays_tied(tmp_path):
    model = Tied()
    save_checkpoint(tmp_path, model)
    with torch.device("meta"):
        other = Tied()
    other.head.weight = other.embed.weight
    load_checkpoint(tmp_path, other, assign=True)
    assert equal(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embed.weight
    save_checkpoint(tmp_path, Tied(seed=3))
    assert equal(other.state_dict(), model.state_dict()), "what is loaded is no view of the files"


def test_some_names_only(tmp_path):
    model = Tied()
    save_checkpoint(tmp_path, model, max_shard_size=100)
    found = load_checkpoint(tmp_path, keys={"norm.bias", "head.weight"})
    assert sorted(found) == ["head.weight", "norm.bias"]
    assert torch.equal(found["head.weight"], model.embed.weight)
    other = Tied(seed=1)
    before = other.embed.weight.clone()
    load_checkpoint(tmp_path, other, keys={"norm.running_mean"})
    assert torch.equal(other.embed.weight, before)
    with pytest.raises(StateMismatchError, match="nowhere"):
        load_checkpoint(tmp_path, keys={"nowhere"})
    assert load_checkpoint(tmp_path, keys={"nowhere"}, strict=False) == {}


def test_a_misfit_names_all_and_changes_nothing(tmp_path):
    save_checkpoint(tmp_path, {"weight": torch.ones(2, 3), "more": torch.ones(1)})
    live = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(StateMismatchError) as caught:
        load_checkpoint(tmp_path, live)
    assert caught.value.missing == ("bias",)
    assert caught.value.unexpected == ("more",)
    assert equal(live.state_dict(), before)
    load_checkpoint(tmp_path, live, strict=False)
    assert torch.equal(live.weight, torch.ones(2, 3))
    with pytest.raises(StateMismatchError, match="mismatched 1"):
        load_checkpoint(tmp_path, nn.Linear(4, 2), strict=False)


def test_saving_again_leaves_nothing_of_the_set_before(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for number, (safetensors, size) in enumerate(LAYOUTS * 2):
        save_checkpoint(tmp_path, Tied(number), safetensors=safetensors, max_shard_size=size)
        assert equal(load_checkpoint(tmp_path), Tied(number).state_dict())
        assert len(files(tmp_path)) == (2 if size > 10**6 else 4)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_first_save_has_the_names_that_everyone_knows(tmp_path):
    save_checkpoint(tmp_path / "many", Tied(), max_shard_size=150)
    assert files(tmp_path / "many") == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    save_checkpoint(tmp_path / "bin", Tied(), safetensors=False)
    assert files(tmp_path / "bin") == ["pytorch_model.bin"]
    loaded = torch.load(  # noqa: TID251 (as others read it)
        tmp_path / "bin/pytorch_model.bin", weights_only=True
    )
    assert torch.equal(loaded["embed.weight"], Tied().embed.weight)


def test_a_small_view_is_stored_without_its_large_storage(tmp_path):
    large = torch.zeros(100_000)
    save_checkpoint(tmp_path, {"a": large[5:7], "b": large[:4].view(2, 2).t()}, safetensors=False)
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 10_000


def test_safetensors_go_before_bin_however_many_files_that_has(tmp_path):
    save_checkpoint(tmp_path / "bin", Tied(1), safetensors=False, max_shard_size=100)
    save_checkpoint(tmp_path / "both", Tied(0))
    for file in (tmp_path / "bin").iterdir():
        file.rename(tmp_path / "both" / file.name)
    assert equal(load_checkpoint(tmp_path / "both"), Tied(0).state_dict())


def test_metadata_is_for_others_to_read(tmp_path):
    from safetensors import safe_open

    save_checkpoint(tmp_path / "one", Tied(), metadata={"dtype": "f32", "of": {"run": 7}})
    with safe_open(tmp_path / "one/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["dtype"] == "f32"
    assert json.loads(metadata["of"]) == {"run": 7}
    save_checkpoint(tmp_path / "two", Tied(), metadata={"of": {"run": 7}}, max_shard_size=150)
    index = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())
    assert index["metadata"]["of"] == {"run": 7}
    with pytest.raises(ConfigError, match="JSON"):
        save_checkpoint(tmp_path / "three", Tied(), metadata={"of": object()})
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("value", [3, "text", None, torch.ones(2).to_sparse()])
def test_what_is_no_plain_tensor_is_refused_and_the_old_set_stays(tmp_path, value):
    save_checkpoint(tmp_path, Tied())
    with pytest.raises(UnsupportedStateError, match="here"):
        save_checkpoint(tmp_path, {"here": value})
    assert equal(load_checkpoint(tmp_path), Tied().state_dict())


def test_no_tensors_no_folder_no_size(tmp_path):
    with pytest.raises(ConfigError, match="no tensors"):
        save_checkpoint(tmp_path, {})
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_checkpoint(tmp_path, Tied(), max_shard_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(OutputDirError):
        save_checkpoint(tmp_path / "file", Tied())


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abc.", min_size=1, max_size=6).filter(lambda name: ".." not in name),
        st.lists(st.integers(0, 3), max_size=3),
        min_size=1,
        max_size=6,
    ),
    size=st.integers(1, 200),
    safetensors=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_any_state_comes_back(tmp_path_factory, shapes, size, safetensors, dtype):
    folder = tmp_path_factory.mktemp("any")
    state = {name: torch.randint(0, 2, shape).to(dtype) for name, shape in shapes.items()}
    save_checkpoint(folder, state, max_shard_size=size, safetensors=safetensors)
    found = load_checkpoint(folder)
    assert equal(found, state)
    assert all(found[name].dtype == dtype for name in state)
    assert validate_checkpoint(folder)


# --- transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["one", "sharded", "bin", "bin_sharded"])
def test_what_transformers_wrote_is_read(layout):
    whole = torch.load(GOLDEN / "whole.pt", weights_only=True)  # noqa: TID251 (as it was written)
    found = load_checkpoint(GOLDEN / layout)
    assert found
    assert all(torch.equal(found[name], whole[name]) for name in found)
    assert set(whole) - set(found) <= {"lm_head.weight"}, "all but what is tied is there"
    assert validate_checkpoint(GOLDEN / layout)


@pytest.mark.parametrize("size", [2**31, 3000])
def test_transformers_reads_what_is_written(tmp_path, size):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(GOLDEN / "one")
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    save_checkpoint(tmp_path, model, max_shard_size=size)
    model.config.save_pretrained(tmp_path)
    found = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert equal(found.state_dict(), model.state_dict())
    other = GPT2LMHeadModel.from_pretrained(GOLDEN / "one")
    load_checkpoint(tmp_path, other)
    assert equal(other.state_dict(), model.state_dict())
    assert other.lm_head.weight is other.transformer.wte.weight


# --- which checkpoint ----------------------------------------------------------------------------


def test_steps_are_numbers_and_what_is_not_whole_does_not_count(tmp_path):
    assert find_latest_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        save_checkpoint(next_checkpoint_path(tmp_path, step), Tied())
    assert find_latest_checkpoint(tmp_path) == next_checkpoint_path(tmp_path, 100)
    whole = Path(next_checkpoint_path(tmp_path, 100)) / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1])
    assert find_latest_checkpoint(tmp_path) == next_checkpoint_path(tmp_path, 20)
    torn = Path(next_checkpoint_path(tmp_path, 30))
    save_checkpoint(torn, Tied(), max_shard_size=100)
    (torn / "model-00001-of-00002.safetensors").unlink()
    assert not validate_checkpoint(torn)
    assert find_latest_checkpoint(tmp_path) == next_checkpoint_path(tmp_path, 20)
    save_checkpoint(next_checkpoint_path(tmp_path, "2026-02-03T04-05-06"), Tied())
    assert find_latest_checkpoint(tmp_path) == next_checkpoint_path(tmp_path, 20)


def test_checkpoints_in_the_folder_itself_and_the_folder_itself(tmp_path):
    save_checkpoint(tmp_path, Tied())
    assert find_latest_checkpoint(tmp_path) == str(tmp_path)
    save_checkpoint(tmp_path / "checkpoint-5", Tied())
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-5")


def test_in_a_repository_only_commits_count(tmp_path):
    from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
    from ckptcoord.dist.world import Solo

    component = StateComponent("model", Tied(), SharingPattern.GLOBAL)
    with CheckpointCoordinator([component], dist=Solo(), output_dir=tmp_path) as one:
        one.save_checkpoint(step=7)
    save_checkpoint(tmp_path / "checkpoint-8", Tied())  # debris
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint-7")["norm.bias"], torch.zeros(4))


@pytest.mark.parametrize("word", ["", "..", "a/b", "\0", "a..b", "x" * 10_000, "-5", True, " "])
def test_an_id_that_can_be_no_name_is_refused(tmp_path, word):
    with pytest.raises(InvalidNameError):
        next_checkpoint_path(tmp_path, word)


@pytest.mark.parametrize("path", ["absent", "", "\0", "x" * 10_000])
def test_what_is_no_folder_is_no_checkpoint(tmp_path, path):
    assert not validate_checkpoint(f"{tmp_path}/{path}")
    with pytest.raises(FormatError):
        load_checkpoint(f"{tmp_path}/{path}")


# --- what means harm -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "m", Tied(), max_shard_size=100)
    return tmp_path / "m"


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "absent.safetensors", "x\0.safetensors"]
)
def test_an_index_names_files_beside_it_only(folder, file):
    (folder.parent / "secret.safetensors").write_bytes(b"x")
    reindex(folder, lambda names: names.update({"norm.bias": file}))
    assert not validate_checkpoint(folder)
    with pytest.raises((CorruptError, UnsafePathError)):
        load_checkpoint(folder)


def test_an_index_that_names_the_wrong_shard(folder):
    reindex(folder, lambda names: names.update({"norm.extra": names["norm.bias"]}))
    with pytest.raises(CorruptError, match=r"norm\.extra"):
        load_checkpoint(folder)


def test_a_shard_that_is_a_link_is_not_opened(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UnsafePathError):
        load_checkpoint(folder)


def test_a_name_in_two_shards(tmp_path):
    for number in (1, 2):
        part = {"a": torch.ones(1), f"b{number}": torch.ones(1)}
        torch.save(part, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {"a": 1, "b1": 1, "b2": 2}
    index = {n: f"pytorch_model-0000{f}-of-00002.bin" for n, f in weight_map.items()}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(CorruptError, match="too"):
        load_checkpoint(tmp_path)


def test_a_flipped_bit_is_found_before_anything_changes(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    live = Tied(seed=5)
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(DigestMismatchError):
        load_checkpoint(folder, live)
    assert equal(live.state_dict(), before)


def test_a_file_of_torch_that_holds_more_than_tensors(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="more than tensors"):
        load_checkpoint(tmp_path)


# --- interrupted ---------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
import torch
from ckptcoord import sharded
from ckptcoord.formats import modelfiles
from ckptcoord.store.local import LocalStore

SAVES = [(True, 10**9), (True, 60), (True, 60), (False, 60), (False, 10**9), (True, 10**9)]
calls = at = 0
mortal = False

def counted(kind, name):
    work = getattr(kind, name)
    def call(*args, **kwargs):
        die_if_due()
        result = work(*args, **kwargs)
        die_if_due()
        return result
    setattr(kind, name, call)

def die_if_due():
    global calls
    calls += 1
    if mortal and calls == at:
        os.kill(os.getpid(), signal.SIGKILL)

for name in ("put", "sync_dir", "remove_tree", "create"):
    counted(LocalStore, name)
for name in ("_write_safe", "_write_bin", "_rename"):
    counted(modelfiles._Saver, name)

def child(folder):
    for number, (safe, size) in enumerate(SAVES):
        state = {f"w{i}": torch.full((10,), float(number)) for i in range(3)}
        sharded.save_checkpoint(folder, state, safetensors=safe, max_shard_size=size)
        open(f"{folder}.said", "a").write(f"{number}\\n")

ended = False
while not ended:
    at += int(sys.argv[2])
    folder = f"{sys.argv[1]}/{at}"
    pid = os.fork()
    if not pid:
        mortal, calls = True, 0
        child(folder)
        os._exit(0)
    ended = os.waitpid(pid, 0)[1] == 0
    said = len(open(f"{folder}.said").readlines()) if os.path.exists(f"{folder}.said") else 0
    if said:
        found = {v for t in sharded.load_checkpoint(folder).values() for v in t.tolist()}
        assert len(found) == 1, (at, found)
        assert found <= {said - 1.0, float(said)}, (at, found, said)
    sharded.save_checkpoint(folder, {"w": torch.ones(1)})
    assert os.listdir(folder) == ["model.safetensors"], (at, os.listdir(folder))
print(at)
"""


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_a_kill_at_any_step_leaves_the_old_model_or_the_new_one(tmp_path, every):
    words = [sys.executable, "-c", KILLED, tmp_path, str(every)]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 80, "places to be killed at"


def test_a_full_disk_leaves_the_old_model_and_no_debris(tmp_path, monkeypatch):
    from ckptcoord.store.local import LocalStore

    save_checkpoint(tmp_path, Tied(), max_shard_size=100)
    before = files(tmp_path)
    real = LocalStore.create

    def create(self, path, **more):
        if path.endswith("-00002-of-00002.safetensors"):
            raise StorageError(operation="create", path=path, why="no space")
        return real(self, path, **more)

    monkeypatch.setattr(LocalStore, "create", create)
    with pytest.raises(StorageError):
        save_checkpoint(tmp_path, Tied(seed=1), max_shard_size=100)
    assert files(tmp_path) == before
    assert equal(load_checkpoint(tmp_path), Tied().state_dict())


def test_the_public_names_are_five():
    assert sorted(sharded.__all__) == [
        "find_latest_checkpoint",
        "load_checkpoint",
        "next_checkpoint_path",
        "save_checkpoint",
        "validate_checkpoint",
    ]
    assert os.fspath(save_checkpoint.__module__) == "ckptcoord.sharded"
