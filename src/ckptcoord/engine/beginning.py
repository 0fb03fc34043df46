"""An optimizer and a scheduler as they were when attached, for forks that begin them anew."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._pytree import tree_map

from ckptcoord.core.context import MAX_SEED, Reset
from ckptcoord.dist.rng import seed_everything
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptcoord.core.context import Anew
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import Stateful

_PARAMETERS = frozenset({"params", "param_names"})
# What schedulers write to a group, and what those that cycle momentum write besides.
_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum")
_CYCLED = ("momentum", "betas")
# What the schedulers that write them read again, and keep nowhere else.
_OF_SCHEDULE = frozenset(_SCHEDULED) - {"lr", "initial_lr"}


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

    def check(self, anew: Anew) -> list[JsonValue]:
        """What all ranks must say alike.

        Raises:
            ConfigError: there is no scheduler, or the seed is none.
        """
        if Reset.SCHEDULER in anew.resets and self._scheduler is None:
            raise ConfigError(
                field="reset_scheduler",
                why="asks for a scheduler to begin anew, and none was attached",
                help="CheckpointEngine.attach(model, optimizer, scheduler)",
            )
        seed = anew.seed
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            why = f"is {ascii(seed)[:40]}, not a whole number from 0 to {MAX_SEED}"
            raise ConfigError(field="reset_rng_seed", why=why)
        return [*map(str, anew.resets), seed]

    def takes_over(self, key: str, anew: Anew) -> bool:
        """Whether a component is loaded, of which there is one; see `Anew.takes_over`.

        An optimizer that is begun anew is loaded all the same where a schedule that goes on keeps
        in it what its own state does not say.
        """
        goes_on = self._scheduler is not None and Reset.SCHEDULER not in anew
        in_groups = goes_on and key == Reset.OPTIMIZER and not self._tells_rates
        return in_groups or anew.takes_over(key)

    def begin(self, anew: Anew, *, rank: int) -> None:
        """Begin it anew; the generators by seed and rank, as trainers do."""
        if Reset.OPTIMIZER in anew:
            self.reset_optimizer()
        if Reset.SCHEDULER in anew:
            self.reset_scheduler()
        if anew.seed is not None:
            seed_everything(anew.seed, rank)

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
        if self._tells_rates:  # the groups do not have them where the optimizer was not loaded
            rates = cast("Any", self._scheduler).get_last_lr()
            for group, rate in zip(self._optimizer.param_groups, rates, strict=False):
                _set_rate(group, float(rate))

    def reset_scheduler(self) -> None:
        """At its first step again, and what it sets in the optimizer's groups with it."""
        if self._scheduler is None:
            return
        self._scheduler.load_state_dict(_copy(self._schedule))
        for group, began in self._pairs():
            _restore(group, began, _set_by_schedulers(group))

    @property
    def _tells_rates(self) -> bool:
        """Whether there is a scheduler whose own state has all that it sets in the groups."""
        has_rates = isinstance(self._schedule, dict) and "_last_lr" in self._schedule
        groups = self._optimizer.param_groups
        return has_rates and not any(_OF_SCHEDULE & set(group) for group in groups)

    def _pairs(self) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
        return zip(self._optimizer.param_groups, self._groups, strict=False)


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


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _copy(value: Any) -> Any:  # noqa: ANN401 (any state)
    """A copy of a state tree, with tensors on their own devices."""
    return tree_map(_copy_leaf, value)


def _copy_leaf(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else deepcopy(leaf)
