"""ONNX: a graph from the user's module with the checkpoint's weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ckptcoord
from ckptcoord import CheckpointCoordinator, SharingPattern, StateComponent
from ckptcoord.errors import CkptError, ConfigError, CorruptError, DigestMismatchError
from ckptcoord.formats import to_onnx
from ckptcoord.formats.exporting import Export, Target, export
from ckptcoord.formats.to_onnx import Factory

MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, wide=8):
        super().__init__()
        self.wte = torch.nn.Embedding(10, wide)
        self.head = torch.nn.Linear(wide, 10)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x):
        return self.head(self.wte(x)) * self.scale

INPUT = torch.zeros(1, 3, dtype=torch.long)

class Branching(Net):
    def forward(self, x):
        return self.wte(x) if self.scale.item() > 1 else x

def make(): return Net(), (INPUT,)
def by_name(): return Net(), {"x": INPUT}
def wider(): return Net(9), (INPUT,)
def bare(): return Net()
def nothing(): return None
def fails(): raise KeyError("why")
def leaves(): raise SystemExit(0)
def dummy():
    net = Net()
    net.dummy_inputs = {"x": INPUT}
    return net
def branching(): return Branching(), (INPUT,)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    name = f"nets_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    net = __import__(name).make()[0]
    component = StateComponent("model", net, SharingPattern.REPLICATED)
    with CheckpointCoordinator([component], output_dir=tmp_path / "run") as coordinator:
        coordinator.save_checkpoint(step=1)
    yield tmp_path, name, net
    sys.modules.pop(name)


def exported(run, function="make", **wanted):
    tmp_path, name, _ = run
    repository = ckptcoord.open_repository(tmp_path / "run")
    wanted = Export(to=Target.ONNX, factory=Factory(name=f"{name}:{function}"), **wanted)
    return export(repository, repository.resolve("latest"), tmp_path / "out", wanted)


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


@pytest.mark.parametrize("function", ["make", "by_name", "dummy"])
def test_the_graph_has_the_weights(run, onnx, function) -> None:
    tmp_path, _, net = run

    report = exported(run, function)

    assert {name for name, _ in report.files} >= {"model.onnx", "ckptcoord_export.json"}
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    found = {one.name: one.raw_data for one in graph.initializer}
    for name, tensor in net.state_dict().items():
        assert found[name] == tensor.numpy().tobytes()


def test_weights_may_be_cast(run, onnx) -> None:
    tmp_path, _, net = run

    exported(run, dtype="F16")

    graph = onnx.load(tmp_path / "out/model.onnx").graph
    found = {one.name: one.raw_data for one in graph.initializer}
    assert found["wte.weight"] == net.wte.weight.detach().half().numpy().tobytes()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("wider", "is not the model of this checkpoint"),
        ("bare", "no module with example inputs"),
        ("nothing", "no module with example inputs"),
        ("fails", "KeyError: 'why'"),
        ("leaves", "SystemExit"),
        ("absent", "AttributeError"),
        ("a-b", "is not package.module:function"),
    ],
)
def test_a_factory_that_does_not_fit_is_named(run, monkeypatch, function, why) -> None:
    monkeypatch.setattr(to_onnx, "check_onnx", lambda: None)

    with pytest.raises(ConfigError, match=why):
        exported(run, function)

    assert not list(run[0].glob("*out*"))


@pytest.mark.parametrize(
    "name", ["", ":", "a", "a:", ":b", "../x:y", "a:b:c", "no.such:thing", "a\0:b"]
)
def test_a_factory_must_be_named(name) -> None:
    with pytest.raises(ConfigError, match="--model"):
        Factory(name=name).make()


def test_what_torch_cannot_export_is_said_in_short(run, onnx) -> None:
    with pytest.raises(CkptError, match="cannot export"):
        exported(run, "branching")

    assert not list(run[0].glob("*out*"))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(run, monkeypatch, missing) -> None:
    monkeypatch.setitem(sys.modules, "onnx", sys)
    monkeypatch.setitem(sys.modules, missing, None)

    with pytest.raises(ConfigError, match=r"ckptcoord\[onnx\]"):
        exported(run)


def test_weights_that_changed_on_their_way_are_found(run, onnx, monkeypatch) -> None:
    write = torch.onnx.export

    def flipped(module, args, path, **rest):
        write(module, args, path, **rest)
        bias = run[2].head.bias.detach().numpy().tobytes()
        for file in Path(path).parent.iterdir():
            data = bytearray(file.read_bytes())
            if bias in data:
                data[data.index(bias)] ^= 1
                file.write_bytes(data)

    monkeypatch.setattr(torch.onnx, "export", flipped)
    with pytest.raises(DigestMismatchError, match=r"head\.bias"):
        exported(run)


def test_a_graph_without_the_weights_is_refused(run, onnx, monkeypatch) -> None:
    monkeypatch.setattr(onnx, "load", lambda _: type("G", (), {"graph": onnx.GraphProto()}))

    with pytest.raises(CorruptError, match="none of the model's weights"):
        exported(run)
