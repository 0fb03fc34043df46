"""A state as others keep it, dealt out to components as our trainers name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ckptcoord.core.refs import MAX_STEP
from ckptcoord.core.sharing import check_component_key
from ckptcoord.errors import InvalidNameError
from ckptcoord.formats.hf import is_tensors
from ckptcoord.formats.optimizers import BY_INDEX, by_index, is_optimizer, named_state
from ckptcoord.formats.source import SourceState

MODEL, OPTIMIZER, SCHEDULER, RNG, PROGRESS = "model", "optimizer", "scheduler", "rng", "progress"
EXTRA = "extra"
"""What has no component of its own: numbers, texts, and what is called as no component can be."""
OBJECT = "object"
"""A state that is no mapping by name, as ckptcoord.save keeps one."""
_OURS = frozenset({MODEL, OPTIMIZER, SCHEDULER, RNG, PROGRESS, "dataset", EXTRA, OBJECT})
_ALIASES = {
    **dict.fromkeys(("model", "model_state_dict", "state_dict", "model_state", "module"), MODEL),
    **dict.fromkeys(
        ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "optim"),
        OPTIMIZER,
    ),
    **dict.fromkeys(
        ("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_schedulers", "scheduler_state"),
        SCHEDULER,
    ),
    **dict.fromkeys(("rng", "rng_state"), RNG),
}
_STEPS = ("global_step", "step", "iteration", "iter")


def deal_out(state: object, *, ordered: bool = True) -> SourceState:
    """The components of a state: model, optimizer, scheduler, generators, and all else.

    A mapping of names to tensors is a model. What is known by another tool's name gets ours, if it
    is what it is called. All else stays by its own name where that can be a component's; numbers
    and the rest are in the component `extra`.

    Args:
        state: as it was saved.
        ordered: the model's tensors stand in the order in which the model has them.
    """
    if isinstance(state, Mapping) and set(state) == {"app"} and isinstance(state["app"], Mapping):
        state = state["app"]  # as torch's own examples of distributed checkpoints call it
    if is_tensors(state):
        return SourceState(components={MODEL: state})
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return SourceState(components={OBJECT: state})
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in state.items():
        if value is None:
            continue
        name, held = _placed(key, value)
        if not name or name.lower() in {one.lower() for one in found}:
            extra[key] = value
        else:
            found[name] = held
    notes = _name_optimizer(found, ordered=ordered)
    if extra:
        found[EXTRA] = extra
    return SourceState(components=found, step=_step_in(state), epoch=_epoch_in(state), notes=notes)


def progress(
    step: int, epoch: float | None, *, best_metric: float | None = None, best: str | None = None
) -> dict[str, Any]:
    """Where a run stands, as our trainers' `progress` has it.

    Args:
        step: optimizer steps done.
        epoch: position in the data, in epochs; None: at the beginning of the first.
        best_metric: of the best checkpoint.
        best: its ref.
    """
    done = epoch or 0.0
    per_epoch = step / done if done else 0.0
    return {
        "global_step": step,
        "epoch_index": int(done),
        "steps_in_epoch": round((done - int(done)) * per_epoch),
        "steps_missed": 0,
        "samples_seen": 0,
        "best_metric": best_metric,
        "best_model_checkpoint": best,
    }


def generators(state: object) -> dict[str, Any] | None:
    """The states of Python's, numpy's and torch's generators as our `rng` has them.

    None where one of the three is not there.
    """
    if not isinstance(state, Mapping):
        return None
    python, numbers = state.get("python"), state.get("numpy")
    cpu = state.get("cpu", state.get("torch"))
    if not (isinstance(python, tuple) and len(python) == 3 and isinstance(cpu, torch.Tensor)):
        return None
    if not isinstance(numbers, tuple) or len(numbers) != 5 or numbers[0] != "MT19937":
        return None
    try:
        return _generators(python, numbers, cpu, state.get("cuda"))
    except (ValueError, TypeError, OverflowError):
        return None


def _generators(
    python: tuple[Any, ...], numbers: tuple[Any, ...], cpu: torch.Tensor, cuda: object
) -> dict[str, Any]:
    version, words, gauss = python
    return {
        "python": {
            "version": version,
            "words": np.array(words, dtype=np.uint32),
            "gauss": gauss,
        },
        "numpy": {
            "bit_generator": numbers[0],
            "state": {"key": np.asarray(numbers[1], dtype=np.uint32), "pos": int(numbers[2])},
            "has_gauss": int(numbers[3]),
            "gauss": float(numbers[4]),
        },
        "torch": cpu,
        "cuda": list(cuda) if isinstance(cuda, list | tuple) else [] if cuda is None else [cuda],
    }


def is_step(value: object) -> bool:
    """Whether it can be a step's number."""
    return type(value) is int and 0 <= value < MAX_STEP


def epoch_of(value: object) -> float | None:
    """A position in the data, in epochs; None: it is none."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9
    return float(value) if known else None  # type: ignore[arg-type]


def _placed(key: str, value: Any) -> tuple[str, Any]:  # noqa: ANN401 (whatever was saved)
    """The component that a value goes to, and the value as it is there; "": to the extras."""
    known = _ALIASES.get(key)
    if known is not None:
        # Lightning has lists of them, of which most runs have one.
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        held = _as_ours(known, one)
        if held is not None:
            return known, held
    number = isinstance(value, torch.Tensor) and not value.ndim
    if number or key in _OURS:
        return "", value
    if not isinstance(value, Mapping | list | tuple | torch.Tensor | np.ndarray):
        return "", value
    try:
        check_component_key(key)
    except InvalidNameError:
        return "", value
    return key, value


def _as_ours(name: str, value: Any) -> Any:  # noqa: ANN401 (whatever was saved)
    """A value in the form of the component of that name; None where it is not."""
    if name == RNG:
        return generators(value)
    fits = {
        MODEL: isinstance(value, Mapping) and bool(value),
        OPTIMIZER: is_optimizer(value),
        SCHEDULER: isinstance(value, Mapping) and "last_epoch" in value,
    }
    return value if fits[name] else None


def _name_optimizer(found: dict[str, Any], *, ordered: bool) -> tuple[str, ...]:
    """Turn the optimizer's state into that by name, if it can be; what is to be said if not."""
    if OPTIMIZER not in found:
        return ()
    model = found.get(MODEL, {})
    named = named_state(found[OPTIMIZER], model, ordered=ordered)
    if named is None:
        found[OPTIMIZER] = by_index(found[OPTIMIZER])
        return (BY_INDEX,)
    found[OPTIMIZER] = named
    return ()


def _step_in(state: Mapping[str, Any]) -> int | None:
    for key in _STEPS:
        value = state.get(key)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = int(value)
        if is_step(value):
            return value
    return None


def _epoch_in(state: Mapping[str, Any]) -> float | None:
    return epoch_of(state.get("epoch"))
