"""An optimizer and a scheduler as they were when attached, for forks that begin them anew."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from ckptcoord.core.context import MAX_SEED
from ckptcoord.dist.rng import seed_everything
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import Stateful

_PARAMETERS = frozenset({"params", "param_names"})
# What schedulers write to a group, and what those that cycle momentum write besides.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum")
_CYCLED = ("momentum", "betas")


class Beginning:
    """What `reset_optimizer` and `reset_scheduler` go back to.

    An optimizer that has moments by then is copied with them.

    Args:
        optimizer: as it is now.
        scheduler: as it is now; None: there is none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Stateful | None) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self._state = {key: _copy(entry) for key, entry in optimizer.state.items()}
        self._groups = [
            {key: _copy(group[key]) for key in group if key not in _PARAMETERS}
            for group in optimizer.param_groups
        ]
        self._schedule = None if scheduler is None else _copy(scheduler.state_dict())

    @property
    def has_scheduler(self) -> bool:
        """Whether there is one to begin anew."""
        return self._scheduler is not None

    def reset_optimizer(self) -> None:
        """No moments but those it had then; hyperparameters as they were.

        So are learning rates, where no scheduler is attached: one that is not begun anew goes on
        with those that it has set. Of groups and parameters that were added since, the moments go
        and the rest stays.
        """
        live = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._optimizer.state.clear()
        for parameter in live:
            if parameter in self._state:
                self._optimizer.state[parameter] = _copy(self._state[parameter])
        for group, began in self._pairs():
            kept = () if self._scheduler is None else _set_by_schedulers(group)
            _restore(group, began, [key for key in began if key not in kept])

    def reset_scheduler(self) -> None:
        """At its first step again, and what it sets in the optimizer's groups with it."""
        if self._scheduler is None:
            return
        self._scheduler.load_state_dict(_copy(self._schedule))
        for group, began in self._pairs():
            _restore(group, began, _set_by_schedulers(group))

    def _pairs(self) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        return zip(self._optimizer.param_groups, self._groups, strict=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resets:
    """What a fork begins anew."""

    optimizer: bool = False
    scheduler: bool = False
    seed: int | None = None

    @property
    def any(self) -> bool:
        """Whether there is anything."""
        return bool(self.optimizer or self.scheduler or self.seed is not None)

    def checked(self, beginning: Beginning) -> list[JsonValue]:
        """What all ranks must say alike.

        Raises:
            ConfigError: there is no scheduler, or the seed is none.
        """
        if self.scheduler and not beginning.has_scheduler:
            raise ConfigError(
                field="reset_scheduler",
                why="asks for a scheduler to begin anew, and none was attached",
                help="CheckpointEngine.attach(model, optimizer, scheduler)",
            )
        seed = self.seed
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            why = f"is {ascii(seed)[:40]}, not a whole number from 0 to {MAX_SEED}"
            raise ConfigError(field="reset_rng_seed", why=why)
        return [bool(self.optimizer), bool(self.scheduler), seed]

    def apply(self, beginning: Beginning, *, rank: int) -> None:
        """Begin it anew; the generators by seed and rank, as trainers do."""
        if self.optimizer:
            beginning.reset_optimizer()
        if self.scheduler:
            beginning.reset_scheduler()
        if self.seed is not None:
            seed_everything(self.seed, rank)

    def __str__(self) -> str:
        """`a new optimizer, seed 7`."""
        names = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        new = [f"a new {name}" for name, is_new in names.items() if is_new]
        return ", ".join([*new, *([] if self.seed is None else [f"seed {self.seed}"])])


def _set_by_schedulers(group: dict[str, Any]) -> tuple[str, ...]:
    cycled = _CYCLED if "max_momentum" in group or "base_momentum" in group else ()
    return (*_SCHEDULED, *cycled)


def _restore(group: dict[str, Any], began: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if key not in began:
            continue
        live = group.get(key)
        if isinstance(live, torch.Tensor) and isinstance(began[key], torch.Tensor):
            live.copy_(began[key])  # a captured CUDA graph reads that very tensor
        else:
            group[key] = _copy(began[key])


def _copy(value: Any) -> Any:  # noqa: ANN401 (any state)
    """A copy of a state tree, with tensors on their own devices."""
    return tree_map(_copy_leaf, value)


def _copy_leaf(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else deepcopy(leaf)
