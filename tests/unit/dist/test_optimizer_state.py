from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as c10d
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.trainers.tiny import plain
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckptcoord
from ckptcoord.core.sharing import Stateful
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
}


def layers() -> nn.Sequential:
    """Four linear layers, the same at every call."""
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))


def grouped(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices and vectors in groups of their own; a third group is empty."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.5},
    ]


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    batch = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module(batch).square().mean().backward()
    optimizer.step()


def copies(state: Any) -> Any:
    """The state with tensors of its own, as a load makes them."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copies(value) for key, value in state.items()}
    return state


def pieces(module: nn.Sequential, cuts: Sequence[int]) -> list[dict[str, nn.Module]]:
    """The layers dealt out to stages, each layer by its full name."""
    bounds = [0, *sorted(cuts), len(module)]
    return [
        {str(place): module[place] for place in range(first, last)}
        for first, last in pairwise(bounds)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str) -> None:
    module, twin = layers(), layers()
    optimizer, other = KINDS[kind](grouped(module)), KINDS[kind](grouped(twin))
    for seed in range(3):
        step(module, optimizer, seed)
    optimizer.param_groups[1]["lr"] = 0.003
    saved = copies(OptimizerState(optimizer, module).state_dict())
    twin.load_state_dict(module.state_dict())
    OptimizerState(other, twin).load_state_dict(saved)
    for seed in range(3, 6):
        step(module, optimizer, seed)
        step(twin, other, seed)
    assert plain(twin.state_dict()) == plain(module.state_dict())
    assert plain(other.state_dict()) == plain(optimizer.state_dict())


@given(
    saving=st.lists(st.integers(1, 3), unique=True),
    loading=st.lists(st.integers(1, 3), unique=True),
    kind=st.sampled_from(["AdamW", "SGD", "Adagrad"]),
)
@settings(max_examples=25, deadline=None)
def test_any_stages_load_what_any_other_stages_saved(
    saving: list[int], loading: list[int], kind: str
) -> None:
    module, twin = layers(), layers()
    optimizer = KINDS[kind](grouped(module))
    for seed in range(2):
        step(module, optimizer, seed)
    merged: dict[str, dict[str, Any]] = {"state": {}, "groups": {}, "group_of": {}}
    for stage in pieces(module, saving):
        part = OptimizerState(_of_stage(optimizer, stage), stage).state_dict()
        assert not {*merged["group_of"]} & {*part["group_of"]}
        assert merged["groups"] in ({}, part["groups"])
        for name, found in part.items():
            merged[name].update(copies(found))
    whole = OptimizerState(optimizer, module).state_dict()
    assert plain(merged) == plain(whole)

    twin.load_state_dict(module.state_dict())
    for stage in pieces(twin, loading):
        one = KINDS[kind](grouped(nn.ModuleList(stage.values())))
        state = OptimizerState(one, stage)
        wanted = {
            part: {name: v for name, v in found.items() if state.wants_state((part, name))}
            for part, found in merged.items()
        }
        state.load_state_dict(wanted)
        assert plain(state.state_dict()) == plain(wanted)
        state.load_state_dict(merged)  # what belongs to others is left alone
        assert plain(state.state_dict()) == plain(wanted)


def _of_stage(optimizer: torch.optim.Optimizer, stage: dict[str, nn.Module]) -> Any:
    """An optimizer over some of another's parameters that has its state of these."""
    own = {id(p) for module in stage.values() for p in module.parameters()}
    groups = [
        {**group, "params": [p for p in group["params"] if id(p) in own]}
        for group in optimizer.param_groups
    ]
    part = type(optimizer)(groups)
    part.state.clear()
    part.state.update({p: s for p, s in optimizer.state.items() if id(p) in own})
    return part


def test_its_tensors_are_the_live_ones_and_what_is_loaded_is_not_copied() -> None:
    module = layers()
    optimizer = torch.optim.AdamW(module.parameters())
    step(module, optimizer, 0)
    state = OptimizerState(optimizer, module)
    shown = state.state_dict()
    live = optimizer.state[module[0].weight]
    assert all(shown["state"]["0.weight"][key] is live[key] for key in live)
    assert isinstance(state, Stateful)
    assert state.fills_in_place
    loaded = copies(shown)
    state.load_state_dict(loaded)
    after = optimizer.state[module[0].weight]
    assert all(loaded["state"]["0.weight"][key] is after[key] for key in after)
    state.load_state_dict(state.state_dict())
    assert all(optimizer.state[module[0].weight][key] is after[key] for key in after)


def test_hyperparameters_follow_but_how_to_compute_is_the_live_ones() -> None:
    module, twin = layers(), layers()
    saved = torch.optim.AdamW(module.parameters(), lr=0.5, foreach=True, amsgrad=True)
    torch.optim.lr_scheduler.LambdaLR(saved, lambda _: 0.5)
    live = torch.optim.AdamW(twin.parameters(), lr=0.1, fused=True)
    held = live.param_groups[0]
    state = OptimizerState(saved, module).state_dict()
    for group in (held, state["groups"]["0"]):
        group.pop("maximize")  # as if made and saved by an older torch
    OptimizerState(live, twin).load_state_dict(state)
    assert live.param_groups[0] is held
    assert (held["lr"], held["initial_lr"], held["amsgrad"]) == (0.25, 0.5, True)
    assert (held["foreach"], held["fused"], held["maximize"]) == (None, True, False)


def test_a_learning_rate_that_is_a_tensor_is_not_shared() -> None:
    module, twin = layers(), layers()
    saved = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.5), foreach=False)
    live = torch.optim.AdamW(twin.parameters(), lr=torch.tensor(0.1), foreach=False)
    OptimizerState(live, twin).load_state_dict(OptimizerState(saved, module).state_dict())
    saved.param_groups[0]["lr"].fill_(7.0)
    assert float(live.param_groups[0]["lr"]) == 0.5


def test_state_of_parameters_that_had_none_is_dropped() -> None:
    module = layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    before = OptimizerState(optimizer, module).state_dict()
    assert before["state"] == {}
    step(module, optimizer, 0)
    OptimizerState(optimizer, module).load_state_dict(before)
    assert not optimizer.state


def test_frozen_parameters_have_a_group_and_no_state() -> None:
    module = layers()
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters())
    step(module, optimizer, 0)
    state = OptimizerState(optimizer, module).state_dict()
    assert state["group_of"]["0.weight"] == "0"
    assert "0.weight" not in state["state"]
    assert "1.weight" in state["state"]


def test_tied_parameters_are_one_and_may_be_called_as_elsewhere() -> None:
    module = layers()
    module[3].weight = module[0].weight
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert "3.weight" not in OptimizerState(optimizer, module).state_dict()["group_of"]
    last = torch.optim.SGD(module[3].parameters(), lr=0.1)
    state = OptimizerState(last, {"3": module[3]}, names={"3.weight": "0.weight"})
    assert [*state.state_dict()["group_of"]] == ["0.weight", "3.bias"]
    assert state.wants_state(("state", "0.weight", "step"))
    assert not state.wants_state(("state", "3.weight", "step"))


def test_parameters_that_nothing_names_are_refused() -> None:
    module = layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"do not name parameter 2 of group 0, of shape \[6, 6\]"):
        OptimizerState(optimizer, {"0": module[0], "2": module[2], "3": module[3]})
    state = OptimizerState(optimizer, module)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ConfigError, match=r"do not name parameter 0 of group 1, of shape \[2\]"):
        state.state_dict()


def test_one_name_for_two_parameters_is_refused() -> None:
    module = layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"give the name 'weight' to two parameters"):
        OptimizerState(optimizer, list(module))


def test_state_that_is_of_no_parameter_is_not_left_out_in_silence() -> None:
    module = layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state["counter"] = {"calls": 3}  # type: ignore[index]
    with pytest.raises(ConfigError, match="an entry of a str that is none of its parameters"):
        OptimizerState(optimizer, module).state_dict()


def _without(part: str, name: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state[part].pop(name)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_without("group_of", "3.bias"), r"lacks 1 parameters: 3\.bias"),
        (lambda s: s["group_of"].clear(), r"lacks 8 parameters: .*2\.weight, .* and 3 more"),
        (lambda s: s["group_of"].update({"3.bias": "0"}), r"'3\.bias' in group 0, live it is in 1"),
        (_without("groups", "1"), "lacks the settings of group 1"),
        (lambda s: s["groups"]["0"].update(rho=0.1, alpha=1), "an AdamW lacks: alpha, rho"),
        (lambda s: s["state"].update({"3.bias": 7}), r"of '3\.bias' is no mapping"),
        (lambda s: s.update(state=[]), "is no mapping of state, groups, group_of"),
    ],
)
def test_what_does_not_fit_changes_nothing(spoil: Callable[[Any], object], why: str) -> None:
    module = layers()
    optimizer = torch.optim.AdamW(grouped(module))
    step(module, optimizer, 0)
    state = OptimizerState(optimizer, module)
    other = copies(state.state_dict())
    for entry in other["state"].values():
        entry["exp_avg"] += 1
    other["groups"]["0"]["lr"] = 9.0
    spoil(other)
    before = plain(state.state_dict())
    with pytest.raises(ConfigError, match=why.replace("an AdamW", "a AdamW")):
        state.load_state_dict(other)
    assert plain(state.state_dict()) == before


def test_settings_of_an_empty_group_may_be_absent() -> None:
    module = layers()
    optimizer = torch.optim.AdamW(grouped(module))
    saved = OptimizerState(optimizer, module).state_dict()
    del saved["groups"]["2"]
    OptimizerState(optimizer, module).load_state_dict(saved)
    assert optimizer.param_groups[2]["weight_decay"] == 0.5


def test_memory_for_state_is_like_the_parameter_or_plain() -> None:
    module = layers().to(torch.bfloat16)
    state = OptimizerState(torch.optim.AdamW(module.parameters()), module)
    made = state.new_state(("state", "1.weight", "exp_avg"), torch.float32, (6, 6))
    assert made is not None
    assert (made.shape, made.dtype, made.requires_grad) == ((6, 6), torch.float32, False)
    count = state.new_state(("state", "1.weight", "step"), torch.float32, ())
    assert count is not None
    assert (count.shape, count.device.type) == ((), "cpu")
    for path in (("state", "9.weight", "exp_avg"), ("groups", "0", "lr"), ("state",)):
        assert state.new_state(path, torch.float32, (6, 6)) is None
    assert all(map(state.wants_state, [("state",), ("groups", "0", "lr"), ("group_of", "0.bias")]))
    assert not state.wants_state(("group_of", "9.bias"))


@pytest.fixture
def lone_group() -> Iterator[None]:
    """A process group of one, in this process."""
    c10d.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    yield
    ckptcoord.shutdown()


@pytest.mark.usefixtures("lone_group")
def test_tensors_over_a_mesh_keep_their_layout() -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))

    def spread() -> nn.Linear:
        torch.manual_seed(3)
        module = nn.Linear(6, 4)
        for name, parameter in list(module.named_parameters()):
            placements = [Shard(0)] if name == "weight" else [Replicate()]
            module.register_parameter(
                name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
            )
        return module

    module, twin = spread(), spread()
    optimizer, other = (torch.optim.AdamW(one.parameters(), lr=0.1) for one in (module, twin))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = OptimizerState(optimizer, module).state_dict()
    assert isinstance(saved["state"]["weight"]["exp_avg"], DTensor)
    state = OptimizerState(other, twin)
    loaded: dict[str, Any] = {**saved, "state": {}}
    for name, entry in saved["state"].items():
        loaded["state"][name] = {}
        for key, value in entry.items():
            made = state.new_state(("state", name, key), value.dtype, tuple(value.shape))
            assert made is not None
            loaded["state"][name][key] = made.copy_(value)
    weight = loaded["state"]["weight"]
    assert weight["exp_avg"].placements == (Shard(0),)
    assert not isinstance(weight["step"], DTensor)
    state.load_state_dict(loaded)
    assert other.state[twin.weight]["exp_avg"] is weight["exp_avg"]
    twin.load_state_dict(module.state_dict())
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        ours.grad = theirs.grad
    optimizer.step()  # takes what is live in `saved` along
    other.step()
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())  # type: ignore[attr-defined]
