"""An optimizer's state by the names of parameters, where the file proves which name is which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NOT_KEPT = frozenset({"params", "param_names"})
_BUFFERS = re.compile(r"(?:^|\.)(running_mean|running_var|num_batches_tracked|inv_freq)$")
_UNDECAYED = re.compile(r"(?:^|[._])(bias|norm\w*|ln\w*|layernorm)(?:[._]|$)", re.IGNORECASE)
BY_INDEX = (
    "the optimizer's state stays by the index of parameters, since nothing proves their names: "
    "it loads into the optimizer itself, not into a trainer"
)


def is_optimizer(state: object) -> bool:
    """Whether a state is what torch's optimizers give."""
    return (
        isinstance(state, Mapping)
        and {"state", "param_groups"} <= state.keys()
        and isinstance(state["state"], Mapping)
        and isinstance(state["param_groups"], list | tuple)
        and all(
            isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)
            for group in state["param_groups"]
        )
    )


def named_state(
    state: Mapping[str, Any], model: Mapping[str, Any], *, ordered: bool
) -> dict[str, Any] | None:
    """An optimizer's state in the form of `OptimizerState`; None where names cannot be proved.

    torch keeps state by the index of a parameter among those of all groups. The names are in the
    state itself, or follow from the order of the model's tensors: taken as a whole, or with the
    matrices (or all but biases and norms) first; and every tensor of the state must have the shape
    of its parameter. Where two such readings differ, neither is believed.

    Args:
        state: of which `is_optimizer` holds.
        model: the model's tensors by name.
        ordered: they stand in the order in which the model has them.
    """
    groups = state["param_groups"]
    flat = [key for group in groups for key in group["params"]]
    if len(set(map(str, flat))) < len(flat):
        return None
    names = _own_names(groups, flat) or (_guessed(state, model, flat) if ordered else None)
    if names is None or len(set(names)) < len(names):
        return None
    by_key = dict(zip(map(str, flat), names, strict=True))
    return {
        "state": {by_key[str(key)]: dict(one) for key, one in state["state"].items()},
        "groups": {
            str(index): {key: group[key] for key in group if key not in _NOT_KEPT}
            for index, group in enumerate(groups)
        },
        "group_of": {
            by_key[str(key)]: str(index)
            for index, group in enumerate(groups)
            for key in group["params"]
        },
    }


def by_index(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state by index as torch has it: some formats turn the indices into text."""
    keys = {str(key): key for group in state["param_groups"] for key in group["params"]}
    if state["state"].keys() <= keys.keys():
        return {**state, "state": {keys[key]: one for key, one in state["state"].items()}}
    return state


def _own_names(groups: Sequence[Mapping[str, Any]], flat: list[Any]) -> list[str] | None:
    """Names that the state has itself: torch's `param_names`, or names in the place of indices."""
    if flat and all(type(key) is str for key in flat):
        return flat
    given = [name for group in groups for name in group.get("param_names") or ()]
    return given if flat and len(given) == len(flat) and _texts(given) else None


def _texts(values: list[Any]) -> bool:
    return all(type(value) is str for value in values)


def _guessed(
    state: Mapping[str, Any], model: Mapping[str, Any], flat: list[Any]
) -> list[str] | None:
    parameters = _parameters(model)
    if len(parameters) != len(flat):
        return None
    sizes = [len(group["params"]) for group in state["param_groups"]]
    rules: list[Callable[[str], bool]] = [lambda _: True]
    if len(sizes) == 2:
        rules = [
            lambda name: parameters[name].ndim >= 2,
            lambda name: _UNDECAYED.search(name) is None,
        ]
    elif len(sizes) > 2:
        return None
    readings = [_reading(parameters, rule) for rule in rules]
    fit = [
        names
        for first, names in readings
        if first == sizes[0] and _fits(state, flat, names, parameters)
    ]
    return fit[0] if fit and all(names == fit[0] for names in fit) else None


def _reading(
    parameters: Mapping[str, torch.Tensor], rule: Callable[[str], bool]
) -> tuple[int, list[str]]:
    """How many parameters are in the first group, and the names in the order of the groups."""
    first = [name for name in parameters if rule(name)]
    return len(first), first + [name for name in parameters if not rule(name)]


def _fits(
    state: Mapping[str, Any],
    flat: list[Any],
    names: list[str],
    parameters: Mapping[str, torch.Tensor],
) -> bool:
    by_key = dict(zip(map(str, flat), names, strict=True))
    for key, entry in state["state"].items():
        if str(key) not in by_key or not isinstance(entry, Mapping):
            return False
        shape = parameters[by_key[str(key)]].shape
        for value in entry.values():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != shape:
                return False
    return True


def _parameters(model: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What may be parameters, in order, tied ones once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        memory = (tensor.data_ptr(), tuple(tensor.shape))
        if _BUFFERS.search(name) or (tensor.numel() and memory in seen):
            continue
        seen.add(memory)
        found[name] = tensor
    return found
