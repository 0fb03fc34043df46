from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.distributed.pipelines import Embed, Tiny
from tests.unit.trainers.tiny import plain
from torch import nn

from ckptcoord.errors import ConfigError
from ckptcoord.trainers.stages import Names, Stage, keep_only, split_layers

if TYPE_CHECKING:
    from collections.abc import Sequence


def stages_of(model: nn.Module, count: int) -> list[Stage]:
    names = Names(model)
    return [Stage(part, names) for part in split_layers(model, count)]


@given(layers=st.integers(1, 30), count=st.integers(1, 30))
def test_layers_are_dealt_out_in_order_and_evenly(layers: int, count: int) -> None:
    model = nn.Sequential(*(nn.Identity() for _ in range(layers)))
    if count > layers:
        with pytest.raises(ConfigError, match=f"has {layers} layers, fewer than the {count}"):
            split_layers(model, count)
        return
    parts = split_layers(model, count)
    sizes = [len([*part.children()]) for part in parts]
    assert [layer for part in parts for layer in part.children()] == [*model]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_are_the_model_by_names_order_and_tensors(count: int, *, tied: bool) -> None:
    model = Tiny(tied=tied)
    whole, order = model.state_dict(), [*model.state_dict()]
    found: dict[str, torch.Tensor] = {}
    for stage in stages_of(model, count):
        own = stage.state_dict()
        assert [*own] == sorted(own, key=order.index)
        for name, tensor in own.items():
            assert tensor.data_ptr() == whole[name].data_ptr()
            assert name == "tokens.weight" or name not in found
        found.update(own)
        named = {id(p): name for name, p in model.named_parameters()}
        assert all(named[id(p)] == name for name, p in stage.named_parameters())
    assert {*found} == {*whole}


@pytest.mark.parametrize("count", [1, 3])
def test_stages_one_after_the_other_are_the_model(count: int) -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    tokens = torch.randint(0, 17, (4, 6))
    hidden = tokens
    for stage in stages_of(model, count):
        hidden = stage(hidden)
    loss = nn.functional.cross_entropy(hidden.flatten(0, 1), tokens.flatten())
    assert torch.equal(loss, model(tokens, tokens))


def test_a_stage_moves_as_one_though_its_part_borrows() -> None:
    model = Tiny()
    stage = stages_of(model, 4)[0].to(torch.float64)
    part = stage.get_submodule("tokens")
    assert part is model.tokens
    assert {p.dtype for p in stage.parameters()} == {torch.float64}
    assert stage.get_buffer("scale").dtype == torch.float64
    assert "scale" not in stage.state_dict()
    assert stage(torch.zeros(1, 6, dtype=torch.long)).dtype == torch.float64
    (embed,) = (module for module in stage.all_modules() if isinstance(module, Embed))
    assert embed.scale is stage.get_buffer("scale")


def test_the_mode_reaches_modules_of_the_part_itself() -> None:
    stage = stages_of(Tiny(), 4)[0]
    stage.eval()
    assert not any(module.training for module in stage.all_modules())
    stage.train()
    assert all(module.training for module in stage.all_modules())


def test_a_whole_model_is_a_stage_too() -> None:
    model = Tiny()
    assert plain(Stage(model, Names(model)).state_dict()) == plain(model.state_dict())


def test_tensors_that_are_none_of_the_models_are_refused() -> None:
    model = Tiny()
    with pytest.raises(ConfigError, match=r"the parameter 'weight' of shape \[2, 3\]"):
        Stage(nn.Sequential(model.tokens, nn.Linear(3, 2)), Names(model))


def test_a_model_without_layers_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="is a Linear, neither"):
        split_layers(nn.Linear(2, 2), 1)


def test_ties_are_named_once_with_all_who_hold_them() -> None:
    model = Tiny(tied=True)
    parts = split_layers(model, 4)
    (tie,) = Names(model).ties(parts)
    assert (tie.name, tie.stages) == ("tokens.weight", (0, 3))
    assert tie.parameter is model.tokens.weight
    model.tokens.weight.requires_grad_(False)
    assert not Names(model).ties(parts)
    assert not Names(Tiny()).ties(split_layers(Tiny(), 4))


def grouped(parameters: Sequence[nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": 0.1},
        {"params": [p for p in parameters if p.ndim == 1]},
    ]


def test_an_optimizer_keeps_its_groups_and_what_is_the_stages() -> None:
    model = Tiny()
    optimizer = torch.optim.Adagrad(grouped([*model.parameters()]))
    optimizer.param_groups[0]["param_names"] = [
        name for name, p in model.named_parameters() if p.ndim > 1
    ]
    first = stages_of(model, 4)[0]
    keep_only(optimizer, first)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    assert optimizer.param_groups[0]["param_names"] == ["places", "tokens.weight"]
    assert {*optimizer.state} == {*first.parameters()}
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    stage = stages_of(Tiny(), 4)[0]
    with pytest.raises(ConfigError, match="steps no parameter of this rank's stage"):
        keep_only(torch.optim.SGD(Tiny().parameters(), lr=0.1), stage)
    stage.requires_grad_(False)
    keep_only(torch.optim.SGD(Tiny().parameters(), lr=0.1), stage)
