"""`ckptcoord.save` and `load` in the place of torch's: any tree, incremental, atomic."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptcoord
import ckptcoord.dist.objects
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent, open_repository
from ckptcoord.errors import (
    ConfigError,
    CorruptError,
    OutputDirError,
    RefNotFoundError,
    RepositoryNotFoundError,
    StorageError,
    UnsupportedStateError,
)
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.testing.ranks import run_ranks


@pytest.mark.parametrize(
    "obj",
    [
        {"a": 1, "b": [1.5, None, ("x", b"y")], 3: True},
        [],
        {},
        7,
        "text",
        None,
        float("inf"),
        OrderedDict([("z", 1), ("a", 2)]),
        (1, (2, (3,))),
    ],
    ids=repr,
)
def test_any_tree_comes_back_with_its_types(tmp_path, obj):
    ckptcoord.save(obj, tmp_path / "it")
    found = ckptcoord.load(tmp_path / "it")
    assert found == obj
    assert type(found) is type(obj)


def test_tensors_and_arrays_come_back_bit_for_bit(tmp_path):
    shared = torch.randn(7)
    obj: dict[str, Any] = {
        "f": torch.tensor([float("nan"), -0.0, 1e-40]),
        "b": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int16),
        "bf": torch.randn(5).bfloat16(),
        "strided": torch.randn(4, 6).t(),
        "numpy": np.arange(5, dtype=np.uint16),
        "one": shared,
        "two": shared,
    }
    ckptcoord.save(obj, tmp_path / "it")
    found = ckptcoord.load(tmp_path / "it")
    assert isinstance(found, dict)
    for name in set(obj) - {"numpy"}:
        assert found[name].dtype == obj[name].dtype
        want = obj[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(found[name].view(-1).view(torch.uint8), want), name
    assert np.array_equal(found["numpy"], obj["numpy"])
    assert found["one"] is found["two"], "tied is tied again"


def test_a_bare_tensor_and_what_an_optimizer_says(tmp_path):
    ckptcoord.save(torch.arange(5), tmp_path / "tensor")
    assert torch.equal(ckptcoord.load(tmp_path / "tensor"), torch.arange(5))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    ckptcoord.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path / "both")
    found = ckptcoord.load(tmp_path / "both")
    assert isinstance(found, dict)
    model.load_state_dict(found["m"])
    optimizer.load_state_dict(found["o"])


def test_saving_again_costs_what_has_changed_and_keeps_what_it_is_told_to(tmp_path):
    place = tmp_path / "it"
    obj = {f"w{i}": torch.randn(100, 100) for i in range(20)}
    folders = [ckptcoord.save(obj, place, keep=2)]
    for _ in range(3):
        obj["w3"] = torch.randn(100, 100)
        folders.append(ckptcoord.save(obj, place, keep=2))
    sizes = [sum(e.stat().st_size for e in os.scandir(f)) for f in (folders[0], folders[-1])]
    assert sizes[1] < sizes[0] / 10
    assert torch.equal(ckptcoord.load(place)["w3"], obj["w3"])  # type: ignore[index]
    assert ckptcoord.load(place, "main@3") is not None
    with pytest.raises(RefNotFoundError):
        ckptcoord.load(place, "main@1")


def test_compression_off_writes_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    for _ in range(2):
        folder = ckptcoord.save({"w": torch.ones(3)}, tmp_path / "it", compression="off")
    assert torch.equal(load_file(f"{folder}/object.safetensors")["w"], torch.ones(3))
    with pytest.raises(ConfigError, match=r"compression\.level"):
        ckptcoord.save({}, tmp_path / "other", compression="fast")
    assert not (tmp_path / "other").exists()


def test_a_mistake_leaves_what_was_saved_before(tmp_path):
    place = tmp_path / "it"
    ckptcoord.save({"n": 1}, place)
    with pytest.raises(UnsupportedStateError, match="model"):
        ckptcoord.save({"model": torch.nn.Linear(1, 1)}, place)
    assert ckptcoord.load(place) == {"n": 1}
    ckptcoord.save({"n": 2}, place)
    assert ckptcoord.load(place) == {"n": 2}


def test_a_place_that_is_none_is_said_to_be_none(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputDirError):
        ckptcoord.save({}, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(RepositoryNotFoundError):
        ckptcoord.load(tmp_path / "nowhere")


def test_no_repository_is_made_where_a_checkpoint_would_take_it_along(tmp_path):
    run = tmp_path / "run"
    ckptcoord.save({"a": 1}, run)
    (checkpoint,) = run.glob("checkpoint-*")
    (tmp_path / "link").symlink_to(checkpoint)
    before = sorted(run.rglob("*"))
    for place in (checkpoint, checkpoint / "mine", run / "checkpoint-77/x", tmp_path / "link"):
        with pytest.raises(OutputDirError, match="would be deleted with that"):
            ckptcoord.save({"b": 2}, place)
    with pytest.raises(OutputDirError, match="would be deleted with that"):
        ckptcoord.save({"b": 2}, run / ".ckptcoord/log")
    assert sorted(run.rglob("*")) == before
    ckptcoord.save({"b": 2}, tmp_path / "checkpoint-5")
    ckptcoord.save({"b": 2}, run / "other")
    assert ckptcoord.load(run) == {"a": 1}


@pytest.mark.parametrize("path", ["", "\0", "x" * 10_000, "/" + "x" * 300])
def test_a_path_that_cannot_be_is_an_error_of_ckptcoord(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputDirError):
        ckptcoord.save({"a": 1}, path)
    with pytest.raises(RepositoryNotFoundError) as caught:
        ckptcoord.load(path)
    assert len(str(caught.value)) < 2000
    assert not list(tmp_path.iterdir())


def test_damage_is_an_error(tmp_path):
    folder = ckptcoord.save({"w": torch.ones(99)}, tmp_path / "it")
    with open(f"{folder}/object.safetensors", "r+b") as file:  # noqa: PTH123
        file.seek(-3, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(CorruptError, match="'w'"):
        ckptcoord.load(tmp_path / "it")


def test_what_is_saved_again_while_it_is_read_is_read_as_it_is_then(tmp_path, monkeypatch):
    def save(value: float) -> None:
        for _ in range(3):  # what one retires, the next but one has deleted
            ckptcoord.save(torch.full((70, 70), value), tmp_path / "x", compression="off")

    def meanwhile(contents, key, shards):
        if values:
            save(values.pop())
        return read(contents, key, shards)

    save(0.0)
    read, values = ckptcoord.dist.objects.state_of, [2.0, 1.0]
    monkeypatch.setattr("ckptcoord.dist.objects.state_of", meanwhile)
    assert torch.equal(ckptcoord.load(tmp_path / "x"), torch.full((70, 70), 2.0))
    values[:] = [3.0] * 5
    with pytest.raises(CorruptError, match="missing"):
        ckptcoord.load(tmp_path / "x")
    assert not values
    values[:] = [4.0]
    newest = ckptcoord.open_repository(tmp_path / "x").latest.ref
    with pytest.raises(RefNotFoundError, match=newest):
        ckptcoord.load(tmp_path / "x", newest)


def test_a_save_that_another_was_quicker_than_takes_the_next_number(tmp_path, monkeypatch):
    ckptcoord.save([1], tmp_path / "x")
    find, stale = ckptcoord.dist.objects.head, [None]
    monkeypatch.setattr(
        "ckptcoord.dist.objects.head", lambda *args: stale.pop() if stale else find(*args)
    )
    assert ckptcoord.save([2], tmp_path / "x").endswith("checkpoint-2")
    assert ckptcoord.load(tmp_path / "x") == [2]


def test_a_checkpoint_that_was_dropped_since_is_said_to_be_gone(tmp_path):
    ckptcoord.save({"w": torch.ones(70, 70)}, tmp_path / "x", compression="off")
    one = ckptcoord.open_repository(tmp_path / "x").latest
    for _ in range(3):
        ckptcoord.save({"w": torch.ones(70, 70)}, tmp_path / "x", compression="off")
    for read in (lambda: one.load("object.w"), lambda: one.state("object")):
        with pytest.raises(RefNotFoundError, match=one.ref) as caught:
            read()
        assert "retired" in caught.value.__notes__[0]


@pytest.mark.parametrize("damage", ["missing", "header", "data"])
def test_a_damaged_base_does_not_stop_later_saves(tmp_path, damage, caplog):
    """Each call knows only what is stored; of damaged data it learns while it saves."""
    torch.manual_seed(0)
    obj = {"a": torch.randn(40_000)}
    rule = ckptcoord.Compression(
        level="auto",
        base="previous",  # type: ignore[arg-type]
        lossy={"object": ckptcoord.Lossy(update_fraction=0.1)},
    )
    for _ in range(3):
        newest = ckptcoord.save(obj, tmp_path, compression=rule)
        obj["a"] += 1e-3 * torch.randn(40_000)
    path = Path(newest) / "object.delta.safetensors"
    data = bytearray(path.read_bytes())
    at = 20 if damage == "header" else len(data) - 3000
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    if damage == "missing":
        path.unlink()
    with caplog.at_level("WARNING", "ckptcoord"):
        for _ in range(2):
            obj["a"] += 1e-3 * torch.randn(40_000)
            newest = ckptcoord.save(obj, tmp_path, compression=rule)
    assert "checkpoint-3" in caplog.text
    found = ckptcoord.load(tmp_path)
    assert isinstance(found, dict)
    assert torch.allclose(found["a"], obj["a"], atol=1e-3)
    assert newest.endswith("checkpoint-5")


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 16
    path.write_bytes(data)


def _linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _newer(path: Path) -> None:
    """Of a version of the format that there is not yet."""
    data = path.read_bytes()
    version = rb"\"format_version\":1"
    assert version in data
    path.write_bytes(data.replace(version, version.replace(b"1", b"9"), 1))


@pytest.mark.parametrize("damage", [_flipped, _linked, _newer])
def test_nothing_is_coded_against_a_base_that_no_load_accepts(tmp_path, damage):
    obj = {"a": torch.randn(40_000)}
    newest = ckptcoord.save(obj, tmp_path, compression="auto")
    damage(Path(newest) / "object.safetensors")
    for _ in range(2):
        change_and_save(obj, tmp_path)
    repository = open_repository(tmp_path)
    assert verify_checkpoint(repository, repository.resolve("latest")).ok


def test_a_base_that_cannot_be_read_is_none(tmp_path, monkeypatch):
    obj = {"a": torch.randn(40_000)}
    ckptcoord.save(obj, tmp_path, compression="auto")
    read = ShardReader.read_range

    def failing(self, *args, **kwargs):
        if self.path.startswith("checkpoint-1/"):
            why = os.strerror(errno.EIO)
            raise StorageError(operation="read", path=self.path, why=why, errno=errno.EIO)
        read(self, *args, **kwargs)

    monkeypatch.setattr(ShardReader, "read_range", failing)
    for _ in range(2):
        change_and_save(obj, tmp_path)


def change_and_save(obj: dict[str, torch.Tensor], path: Path) -> None:
    """A few elements; what is loaded then must be all of it."""
    obj["a"][:100] += 1.0
    ckptcoord.save(obj, path, compression="auto")
    found = ckptcoord.load(path)
    assert isinstance(found, dict)
    assert torch.equal(found["a"], obj["a"])


def test_what_a_job_saved_can_be_looked_at_without_it(tmp_path):
    groups = [(0, 1), (0, 1)]

    def work(world: Any) -> None:
        components = [
            StateComponent("model", {"w": torch.ones(3)}, SharingPattern.REPLICATED),
            StateComponent("rng", {"n": world.rank}, SharingPattern.PER_RANK),
            StateComponent(
                "stage",
                {f"layer{world.rank}": torch.full((2,), float(world.rank))},
                SharingPattern.PER_GROUP,
                process_group_name="pp",
            ),
        ]
        with CheckpointCoordinator(
            components, {"pp": groups[world.rank]}, world, tmp_path / "run"
        ) as coordinator:
            coordinator.save_checkpoint(step=1)

    run_ranks(2, work).values  # noqa: B018
    found = ckptcoord.load(tmp_path / "run")
    assert isinstance(found, dict)
    assert torch.equal(found["model"]["w"], torch.ones(3))
    assert found["rng"] == {"rank00000": {"n": 0}, "rank00001": {"n": 1}}
    assert {name: t.tolist() for name, t in found["stage"].items()} == {
        "layer0": [0.0, 0.0],
        "layer1": [1.0, 1.0],
    }
