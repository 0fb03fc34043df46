"""Exports: what the other tool loads is what was saved, and nothing else is ever in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import ckptcoord
from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    CorruptError,
    OutputDirError,
    StorageError,
    StorageFullError,
)
from ckptcoord.formats.exporting import NOTE, Export, Target, export
from ckptcoord.formats.spilled import Spilled
from ckptcoord.formats.to_onnx import Factory
from ckptcoord.testing.ranks import run_ranks


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def model() -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(40, 8)
    return OrderedDict(
        [
            ("wte.weight", shared),
            ("h.0.norm", torch.tensor([1.0, float("nan"), -0.0, 1e30])),
            ("h.0.half", torch.randn(6, 7).bfloat16()),
            ("h.0.count", torch.tensor(7)),
            ("h.0.mask", torch.tensor([True, False])),
            ("empty", torch.empty(0, 3)),
            ("lm_head.weight", shared),
        ]
    )


def saved(root, state=None, **config):
    """A repository with one checkpoint that has a delta under it if compression is on."""
    state = model() if state is None else state
    other = {"state": {0: {"m": torch.arange(9.0)}}, "groups": [{"lr": 0.1, "params": [0]}]}
    numbers = {"np": np.arange(5, dtype=np.uint32), "one": np.float32(2.5), "t": (1, "x", None)}
    components = [
        StateComponent("model", state, SharingPattern.REPLICATED),
        StateComponent("optimizer", other, SharingPattern.REPLICATED),
        StateComponent("extra", numbers, SharingPattern.GLOBAL),
    ]
    config = CoordinatorConfig(**config)
    with CheckpointCoordinator(components, output_dir=root, config=config) as coordinator:
        coordinator.save_checkpoint(step=1)
        for tensor in state.values():
            if tensor.is_floating_point() and tensor.numel() > 10:
                tensor.reshape(-1)[:3] += 1
        coordinator.save_checkpoint(step=2)
    return state


def exported(root, folder, to, **wanted):
    repository = ckptcoord.open_repository(root)
    return export(repository, repository.resolve("latest"), folder, Export(to=to, **wanted))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def read_torch(path):
    return torch.load(path, weights_only=True)  # noqa: TID251 (what a user does)


def load_dcp(state, path):
    with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
        dcp.load(state, checkpoint_id=path, no_dist=True)


def same(found, expected) -> bool:
    bits = [
        t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (found, expected)
    ]
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*bits)


@pytest.mark.parametrize("compression", ["off", "auto"])
def test_hf_is_the_model_in_files_of_a_size(tmp_path, compression) -> None:
    state = saved(tmp_path / "run", compression=compression)

    report = exported(tmp_path / "run", tmp_path / "out", Target.HF, max_shard_size=500)

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name, _ in report.files] == names
    assert "model.safetensors.index.json" in names
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in {*index.values()}:
        found |= load_file(tmp_path / "out" / file)
    assert found.keys() == index.keys() == state.keys() - {"lm_head.weight"}, "tied, stored once"
    assert all(same(found[name], state[name]) for name in found)
    assert (report.tensors, report.cast, report.left_out) == (6, 0, ())


@pytest.mark.parametrize("compression", ["off", "auto"])
def test_torch_is_one_file_that_weights_only_reads(tmp_path, compression) -> None:
    state = saved(tmp_path / "run", compression=compression)

    report = exported(tmp_path / "run", tmp_path / "out", Target.TORCH)

    assert [name for name, _ in report.files] == [NOTE, "model.pt"]
    found = read_torch(tmp_path / "out/model.pt")
    assert list(found) == list(state)
    assert all(same(found[name], state[name]) for name in state)
    assert found["wte.weight"].data_ptr() == found["lm_head.weight"].data_ptr(), "tied again"
    assert found["h.0.norm"].untyped_storage().nbytes() == 16


def test_torch_with_all_components(tmp_path) -> None:
    state = saved(tmp_path / "run")

    exported(tmp_path / "run", tmp_path / "out", Target.TORCH, everything=True)

    found = read_torch(tmp_path / "out/checkpoint.pt")
    assert all(same(found["model"][name], state[name]) for name in state)
    assert found["optimizer"]["groups"] == [{"lr": 0.1, "params": [0]}]
    assert torch.equal(found["optimizer"]["state"][0]["m"], torch.arange(9.0))
    assert found["extra"]["np"].dtype == torch.uint32
    assert found["extra"]["np"].tolist() == [0, 1, 2, 3, 4]
    assert (found["extra"]["one"], found["extra"]["t"]) == (2.5, (1, "x", None))


def test_dcp_loads_it(tmp_path) -> None:
    state = saved(tmp_path / "run", compression="auto")

    exported(tmp_path / "run", tmp_path / "one", Target.DCP)
    exported(tmp_path / "run", tmp_path / "all", Target.DCP, everything=True)

    alone = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_dcp(alone, tmp_path / "one")
    assert all(same(alone[name], state[name]) for name in state)
    nested = {"model": {name: torch.zeros_like(t) for name, t in state.items()}}
    load_dcp(nested, tmp_path / "all")
    assert all(same(nested["model"][name], state[name]) for name in state)


LOAD_IN_PARTS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
state = {"wte.weight": distribute_tensor(torch.zeros(40, 8), mesh, [Shard(1)])}
dcp.load(state, checkpoint_id=sys.argv[1])
assert state["wte.weight"].to_local().shape == (40, 4)
torch.save(state["wte.weight"].to_local().clone(), f"{sys.argv[2]}.{dist.get_rank()}")
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_dcp_loads_it_on_two_ranks_in_parts(tmp_path) -> None:
    state = saved(tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "out", Target.DCP)

    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29731"}
    words = [sys.executable, "-c", LOAD_IN_PARTS, tmp_path / "out", tmp_path / "part"]
    environ = [os.environ | place | {"RANK": str(rank)} for rank in (0, 1)]  # noqa: TID251
    ranks = [subprocess.Popen(words, env=one) for one in environ]

    assert [one.wait(120) for one in ranks] == [0, 0]
    parts = [read_torch(f"{tmp_path}/part.{rank}") for rank in (0, 1)]
    assert torch.equal(torch.cat(parts, 1), state["wte.weight"])


@pytest.mark.parametrize("to", [Target.HF, Target.TORCH, Target.DCP])
@pytest.mark.parametrize(("code", "dtype"), [("BF16", torch.bfloat16), ("F64", torch.float64)])
def test_a_cast_rounds_as_torch_does_and_leaves_integers(tmp_path, to, code, dtype) -> None:
    state = saved(tmp_path / "run")

    report = exported(tmp_path / "run", tmp_path / "out", to, dtype=code)

    if to is Target.HF:
        found = load_file(tmp_path / "out/model.safetensors")
    elif to is Target.TORCH:
        found = read_torch(tmp_path / "out/model.pt")
    else:
        found = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
        found = {n: torch.zeros_like(t) for n, t in found.items()}
        load_dcp(found, tmp_path / "out")
    for name, tensor in found.items():
        expected = state[name].to(dtype) if state[name].is_floating_point() else state[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.nan_to_num(), expected.nan_to_num()), name
    assert report.cast == (3 if code == "BF16" else 4)


def test_what_a_cast_makes_infinite_is_counted_by_name(tmp_path) -> None:
    saved(tmp_path / "run")

    report = exported(tmp_path / "run", tmp_path / "out", Target.HF, dtype="F16")

    assert report.overflowed == {"h.0.norm": 1}


def test_only_the_named_component_is_cast(tmp_path) -> None:
    saved(tmp_path / "run")

    exported(tmp_path / "run", tmp_path / "out", Target.TORCH, everything=True, dtype="BF16")

    found = read_torch(tmp_path / "out/checkpoint.pt")
    assert found["model"]["wte.weight"].dtype == torch.bfloat16
    assert found["optimizer"]["state"][0]["m"].dtype == torch.float32


# --- read back ------------------------------------------------------------------------------------


def _nothing_left(folder: Path) -> bool:
    return not folder.exists() and not [one for one in folder.parent.iterdir() if "out" in one.name]


@pytest.mark.parametrize("to", [Target.TORCH, Target.DCP, Target.HF])
def test_bytes_that_change_on_their_way_are_found(tmp_path, monkeypatch, to) -> None:
    saved(tmp_path / "run")
    flipped = []

    def fresh() -> Path:
        return next(tmp_path.glob(".out*"))

    def flip(folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.suffix in (".safetensors", ".pt", ".distcp") and not flipped:
                data = bytearray(file.read_bytes())
                at = data.index(model()["h.0.half"].view(torch.uint8).numpy().tobytes()[-10:])
                data[at] ^= 1
                file.write_bytes(data)
                flipped.append(file)

    if to is Target.HF:
        from ckptcoord.formats import to_hf

        check = to_hf._check

        def flipped_check(store, *rest):
            flip(Path(store.url))
            check(store, *rest)

        monkeypatch.setattr(to_hf, "_check", flipped_check)
    else:
        clear, save = Spilled.clear, torch.save
        monkeypatch.setattr(Spilled, "clear", lambda self: (flip(fresh()), clear(self)))
        if to is Target.TORCH:
            monkeypatch.setattr(torch, "save", lambda s, p: (save(s, p), flip(fresh())))

    with pytest.raises(CorruptError, match=r"h\.0\.half"):
        exported(tmp_path / "run", tmp_path / "out", to)

    assert flipped
    assert _nothing_left(tmp_path / "out")


def test_a_checkpoint_that_is_damaged_is_not_exported(tmp_path) -> None:
    saved(tmp_path / "run")
    shard = next((tmp_path / "run/checkpoint-2").glob("model*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)

    for to in (Target.HF, Target.TORCH, Target.DCP):
        with pytest.raises(CorruptError):
            exported(tmp_path / "run", tmp_path / "out", to)
        assert _nothing_left(tmp_path / "out")


def test_no_space_is_said_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    saved(tmp_path / "run")

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(StorageFullError):
        exported(tmp_path / "run", tmp_path / "out", Target.TORCH)
    assert _nothing_left(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


FILE, SPILL = 1 << 19, 1 << 20  # elements for which there is no room, in 3 MiB


@pytest.mark.parametrize(
    ("to", "elements"),
    [(Target.HF, SPILL), (Target.TORCH, FILE), (Target.TORCH, SPILL), (Target.DCP, FILE)],
)
def test_a_full_disk_is_said_by_its_name(tmp_path, small_disk, to, elements) -> None:
    saved(tmp_path / "run", {"w": torch.randn(elements)})

    with pytest.raises(StorageFullError):
        exported(tmp_path / "run", small_disk / "out", to)

    assert names_in(small_disk) == []


@pytest.mark.parametrize("to", [Target.TORCH, Target.DCP])
def test_a_file_that_torch_cannot_read_back_is_corrupt(tmp_path, monkeypatch, to) -> None:
    from ckptcoord.formats import to_dcp, to_torch

    saved(tmp_path / "run")
    module, name = (to_torch.torch, "save") if to is Target.TORCH else (to_dcp, "save")
    write = getattr(module, name)

    def cut(state, file=None, **rest):
        write(state, file, **rest) if file else write(state, **rest)
        folder = next(tmp_path.glob(".out*"))
        for path in folder.glob("*.distcp") if file is None else [Path(file.name)]:
            os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(module, name, cut)

    with pytest.raises(CorruptError, match="cannot be read back"):
        exported(tmp_path / "run", tmp_path / "out", to)
    assert _nothing_left(tmp_path / "out")


def test_what_weights_only_does_not_read_is_refused(tmp_path, monkeypatch) -> None:
    saved(tmp_path / "run")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda s, p: save({**s, "x": Path("x")}, p))

    with pytest.raises(ConfigError, match="weights_only"):
        exported(tmp_path / "run", tmp_path / "out", Target.TORCH)


def test_what_safetensors_has_no_dtype_for_is_said(tmp_path) -> None:
    saved(tmp_path / "run", {"c": torch.randn(3, dtype=torch.complex128), "w": torch.randn(2)})

    report = exported(tmp_path / "run", tmp_path / "out", Target.HF)

    assert report.notes == ("c is C128, which safetensors lacks: others see F64 [3, 2]",)
    assert load_file(tmp_path / "out/model.safetensors")["c"].shape == (3, 2)
    assert exported(tmp_path / "run", tmp_path / "pt", Target.TORCH).notes == ()


# --- where ----------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_if_it_is_an_export_and_by_force(tmp_path) -> None:
    saved(tmp_path / "run")
    (tmp_path / "out").mkdir()
    exported(tmp_path / "run", tmp_path / "out", Target.HF)
    with pytest.raises(ConfigError, match="--force"):
        exported(tmp_path / "run", tmp_path / "out", Target.TORCH)
    exported(tmp_path / "run", tmp_path / "out", Target.TORCH, force=True)
    assert names_in(tmp_path / "out") == [NOTE, "model.pt"]

    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="delete that one yourself"):
        exported(tmp_path / "run", tmp_path / "home", Target.HF, force=True)
    (tmp_path / "home" / NOTE).write_text("{}")
    with pytest.raises(ConfigError, match="delete that one yourself"):
        exported(tmp_path / "run", tmp_path / "home", Target.HF, force=True)
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"
    assert names_in(tmp_path) == ["home", "out", "run"]


def test_a_failed_export_leaves_the_one_before(tmp_path) -> None:
    saved(tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "out", Target.TORCH)
    before = (tmp_path / "out/model.pt").read_bytes()
    for shard in (tmp_path / "run/checkpoint-2").glob("model*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])

    with pytest.raises(CorruptError):
        exported(tmp_path / "run", tmp_path / "out", Target.TORCH, force=True)

    assert (tmp_path / "out/model.pt").read_bytes() == before
    assert names_in(tmp_path) == ["out", "run"]


KILLED = """
import os, sys, ckptcoord
from ckptcoord.formats import exporting
def die(*_):
    os.kill(os.getpid(), 9)
setattr(exporting, sys.argv[3], die)
repository = ckptcoord.open_repository(sys.argv[1])
wanted = exporting.Export(to=exporting.Target.TORCH, force=True)
exporting.export(repository, repository.resolve("latest"), sys.argv[2], wanted)
"""


@pytest.mark.parametrize("where", ["_seal", "_put_in_place", "_write"])
def test_a_kill_leaves_the_one_before_and_the_next_export_is_whole(tmp_path, where) -> None:
    state = saved(tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "out", Target.HF)

    words = [sys.executable, "-c", KILLED, tmp_path / "run", tmp_path / "out", where]
    assert subprocess.run(words, check=False).returncode == -9

    assert names_in(tmp_path / "out") == [NOTE, "model.safetensors"]
    left = [name for name in names_in(tmp_path) if name not in ("out", "run")]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert left[0].endswith(".new")
    exported(tmp_path / "run", tmp_path / "out", Target.TORCH, force=True)
    assert same(read_torch(tmp_path / "out/model.pt")["wte.weight"], state["wte.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "run",
        "run/checkpoint-2",
        "run/.ckptcoord",
        "run/checkpoint-9",
        "",
        ".",
        "/",
        "a\0b",
        "x" * 300,
    ],
)
def test_no_checkpoint_is_in_the_way_of_an_export(tmp_path, monkeypatch, name) -> None:
    saved(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))

    for force in (True, False):
        with pytest.raises(CkptError):
            exported("run", name, Target.HF, force=force)

    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_file_or_a_link_is_in_the_way(tmp_path) -> None:
    saved(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    (tmp_path / "aim").mkdir()
    (tmp_path / "link").symlink_to("aim")
    (tmp_path / "circle").symlink_to("circle")

    for name in ("file", "link", "file/below", "circle", "circle/below"):
        with pytest.raises(OutputDirError):
            exported(tmp_path / "run", tmp_path / name, Target.HF, force=True)
    exported(tmp_path / "run", tmp_path / "run/exports/hf", Target.HF)
    assert (tmp_path / "run/exports/hf/model.safetensors").is_file()


def test_a_dry_run_checks_and_writes_nothing(tmp_path) -> None:
    saved(tmp_path / "run")
    repository = ckptcoord.open_repository(tmp_path / "run")
    wanted = Export(to=Target.DCP, dtype="BF16")

    report = export(
        repository, repository.resolve("latest"), tmp_path / "out", wanted, dry_run=True
    )

    assert (report.tensors, report.cast, report.files) == (6, 3, ())
    assert _nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"to": Target.HF, "everything": True}, "--all"),
        ({"to": Target.ONNX, "everything": True}, "--all"),
        ({"to": Target.ONNX}, "--model"),
        ({"to": Target.HF, "factory": Factory(name="a:b")}, "--model"),
        ({"to": Target.TORCH, "config_from": Path()}, "--config-from"),
        ({"to": Target.HF, "max_shard_size": 0}, "--max-shard-size"),
    ],
)
def test_what_does_not_go_together_is_refused(wanted, why) -> None:
    with pytest.raises(ConfigError, match=why):
        Export(**wanted)


def test_an_unknown_component_and_what_is_no_model(tmp_path) -> None:
    saved(tmp_path / "run")

    with pytest.raises(ConfigError, match="no 'modle', but extra, model, optimizer"):
        exported(tmp_path / "run", tmp_path / "out", Target.HF, component="modle")
    report = exported(tmp_path / "run", tmp_path / "out", Target.HF, component="optimizer")
    assert report.left_out == ("groups.0.lr", "groups.0.params.0")


# --- ranks ----------------------------------------------------------------------------------------


def _save_in_parts(world, root):
    rank = world.rank
    mine = {f"stage.{rank}": torch.full((3,), float(rank))}
    components = [
        StateComponent("model", mine, SharingPattern.PER_GROUP, "pp"),
        StateComponent("rng", {"seed": rank, "t": torch.tensor([rank])}, SharingPattern.PER_RANK),
    ]
    groups = {"pp": [0, 1]}
    with CheckpointCoordinator(components, groups, world, root) as coordinator:
        coordinator.save_checkpoint(step=1)


def test_parts_are_put_together_and_copies_that_differ_stand_by_label(tmp_path) -> None:
    assert run_ranks(2, lambda world: _save_in_parts(world, tmp_path / "run")).values

    exported(tmp_path / "run", tmp_path / "hf", Target.HF)
    found = load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == {"stage.0", "stage.1"}
    exported(tmp_path / "run", tmp_path / "torch", Target.TORCH, everything=True)
    whole = read_torch(tmp_path / "torch/checkpoint.pt")
    assert whole["model"]["stage.1"].tolist() == [1.0, 1.0, 1.0]
    assert whole["rng"]["rank00001"]["seed"] == 1
    with pytest.raises(ConfigError, match="its copies differ"):
        exported(tmp_path / "run", tmp_path / "rng", Target.HF, component="rng")


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A run of a model of transformers; its folder, and what the model says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=16)
    net = GPT2LMHeadModel(config).eval()
    component = StateComponent("model", net, SharingPattern.REPLICATED)
    with CheckpointCoordinator([component], output_dir=root / "run") as coordinator:
        coordinator.save_checkpoint(step=1)
    return root / "run", net


WORDS = torch.arange(10)[None]


def test_transformers_opens_it(gpt2, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    root, net = gpt2
    exported(root, tmp_path / "out", Target.HF, max_shard_size=4000)
    exported(root, tmp_path / "half", Target.HF, dtype="BF16")

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(found(WORDS).logits, net(WORDS).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16, "its config says so, too"
    assert torch.equal(half.transformer.wpe.weight, net.transformer.wpe.weight.bfloat16())


def test_config_and_tokenizer_may_come_from_elsewhere(gpt2, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    root, net = gpt2
    blobs, given = tmp_path / "blobs", tmp_path / "given"
    blobs.mkdir()
    given.mkdir()
    (blobs / "0").write_text(json.dumps(net.config.to_dict() | {"bos_token_id": 7}))
    (given / "config.json").symlink_to(blobs / "0")  # as a hub's cache has it
    (given / "tokenizer.json").write_text("{}")
    (given / "secret.txt").write_text("not a tokenizer's")

    exported(root, tmp_path / "out", Target.HF, config_from=given)

    names = names_in(tmp_path / "out")
    assert names == [NOTE, "config.json", "model.safetensors", "tokenizer.json"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.bos_token_id == 7


def test_a_config_that_cannot_be_read_is_named(gpt2, tmp_path, monkeypatch) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/config.json").write_text("{}")

    def denied(*_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(StorageError, match="given"):
            exported(gpt2[0], tmp_path / "out", Target.HF, config_from=tmp_path / "given")


@pytest.mark.parametrize("config", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none_is_refused(gpt2, tmp_path, config) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/config.json").write_bytes(config)

    with pytest.raises(ConfigError, match=r"config\.json"):
        exported(gpt2[0], tmp_path / "out", Target.HF, config_from=tmp_path / "given")
    assert _nothing_left(tmp_path / "out")
