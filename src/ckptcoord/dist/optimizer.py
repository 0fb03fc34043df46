"""An optimizer's state by the full names of parameters, so that any layout of ranks can load it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Of how this process computes, not of what: they stay as the live optimizer has them.
_OWN_CHOICES = frozenset({"foreach", "fused", "capturable", "differentiable"})
# What torch's schedulers add to a group; a fresh optimizer may still be without.
_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
)
_NOT_SAVED = frozenset({"params", "param_names"})
_PARTS = ("state", "groups", "group_of")
_SHOWN = 5  # names in a message


class OptimizerState:
    """An optimizer as a component: what torch holds by index is held by name here.

    The state is `{"state": {name: {...}}, "groups": {"0": {...}}, "group_of": {name: "0"}}`: what
    the optimizer keeps of each parameter, the hyperparameters of each group, and which group a
    parameter is in. Stages of a pipeline, each with an optimizer over its own parameters, have
    states that merge by key, provided their groups are the same (a group may be empty).

    `foreach`, `fused`, `capturable` and `differentiable` say how a process computes: a load leaves
    them as they are.

    Args:
        optimizer: any of torch's kind.
        modules: what names its parameters: a module, several, or several by the prefix that their
            names lack. Parameters that are one object (tied) have the first name.
        names: what a parameter is called in checkpoints, by its name in the modules, where that
            differs: on the second of two ranks that hold a tied one, for instance.

    Attributes:
        optimizer: the live one.

    Raises:
        ConfigError: no module names a parameter of the optimizer, or two have one name.
    """

    # Says to a load: tensors that `state_dict` shows may be written to before `load_state_dict`.
    fills_in_place: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.nn.Module],
        *,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._modules = tuple(_by_prefix(modules))
        self._aliases = dict(names or {})
        self._group_of: dict[str, int] = {}
        self._parameters: dict[str, torch.Tensor] = {}
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """The live state itself: its tensors are no copies.

        Raises:
            ConfigError: as at construction; or the optimizer keeps something that is no
                parameter's.
        """
        self._look()
        state = self.optimizer.state
        own = {id(parameter) for parameter in self._parameters.values()}
        strays = [key for key in state if id(key) not in own]
        if strays:
            raise ConfigError(
                field="optimizer.state",
                why=f"has an entry of a {type(strays[0]).__name__} that is none of its parameters",
                help="Declare such state as a component of its own",
            )
        return {
            "state": {
                name: dict(state[parameter])
                for name, parameter in self._parameters.items()
                if parameter in state
            },
            "groups": {
                str(index): {key: group[key] for key in group if key not in _NOT_SAVED}
                for index, group in enumerate(self.optimizer.param_groups)
            },
            "group_of": {name: str(index) for name, index in self._group_of.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of this optimizer's parameters; names of others are left alone.

        Tensors are taken as they are, not copied: the optimizer will write to them. Nothing is
        changed unless all fits.

        Raises:
            ConfigError: names, groups or hyperparameters are missing or unknown.
        """
        self.check_state(state_dict)
        optimizer = self.optimizer
        for name, parameter in self._parameters.items():
            if name in state_dict["state"]:
                entry = state_dict["state"][name]
                optimizer.state[parameter] = {
                    key: self._at_home(name, key, value) for key, value in entry.items()
                }
            else:
                optimizer.state.pop(parameter, None)
        for index, group in enumerate(optimizer.param_groups):
            for key, value in state_dict["groups"].get(str(index), {}).items():
                if key not in _OWN_CHOICES and value is not group.get(key):
                    group[key] = deepcopy(value)
        # As torch does: here each kind of optimizer fills in what older states lack.
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})

    def check_state(self, saved: object) -> None:
        """Whether all that this optimizer needs is there, and fits. Nothing is changed.

        Raises:
            ConfigError: names, groups or hyperparameters are missing or unknown.
        """
        self._look()
        if not isinstance(saved, Mapping) or any(
            not isinstance(saved.get(part), Mapping) for part in _PARTS
        ):
            raise ConfigError(
                field="optimizer state",
                why=f"is no mapping of {', '.join(_PARTS)}, all by name",
                help="State that torch's optimizers save by index loads into the optimizer itself",
            )
        absent = [name for name in self._parameters if name not in saved["group_of"]]
        if absent:
            raise ConfigError(
                field="optimizer state",
                why=f"lacks {len(absent)} parameters: {_list(absent)}",
                help="Load into an optimizer over the saved parameters",
            )
        for name, index in self._group_of.items():
            if saved["group_of"][name] != str(index):
                raise ConfigError(
                    field="optimizer state",
                    why=f"has {name!r} in group {saved['group_of'][name]}, live it is in {index}",
                    help="Give the optimizer the groups that it was saved with",
                )
            if not isinstance(saved["state"].get(name, {}), Mapping):
                raise ConfigError(field="optimizer state", why=f"of {name!r} is no mapping")
        for index, group in enumerate(self.optimizer.param_groups):
            self._check_group(group, saved["groups"].get(str(index)), f"group {index}")

    def wants_state(self, path: tuple[str, ...]) -> bool:
        """Whether a load should read what is at these keys, from the top."""
        if len(path) < 2 or path[0] not in ("state", "group_of"):
            return True
        return path[1] in self._parameters

    def new_state(
        self, path: tuple[str, ...], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor | None:
        """Memory for a tensor of the state that this optimizer does not have yet.

        It is laid out as the parameter, over the same mesh, where the global shape is the
        parameter's; else whole. None for what is no tensor of one of its parameters.
        """
        parameter = self._parameters.get(path[1]) if len(path) > 2 and path[0] == "state" else None
        if parameter is None:
            return None
        if tuple(parameter.shape) == tuple(shape) and path[2] != "step":
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return torch.zeros(shape, dtype=dtype, device=self._device_of_others(path[1]))

    # --- helpers ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Names of the parameters that the optimizer has now.

        Raises:
            ConfigError: one has no name, or two have the same.
        """
        names = self._names()
        self._group_of, self._parameters = {}, {}
        for index, group in enumerate(self.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                name = names.get(id(parameter))
                if name is None:
                    raise ConfigError(
                        field="OptimizerState.modules",
                        why=f"do not name parameter {place} of group {index}, of shape "
                        f"{list(parameter.shape)}",
                        help="Pass every module whose parameters the optimizer steps",
                    )
                if name in self._parameters:
                    raise ConfigError(
                        field="OptimizerState.modules",
                        why=f"give the name {name!r} to two parameters of the optimizer",
                        help="Pass modules by the prefixes that their names lack",
                    )
                self._parameters[name] = parameter
                self._group_of[name] = index

    def _names(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for prefix, module in self._modules:
            for name, parameter in module.named_parameters(prefix):
                found.setdefault(id(parameter), self._aliases.get(name, name))
        return found

    def _check_group(self, live: Mapping[str, Any], saved: object, name: str) -> None:
        if saved is None and not live["params"]:
            return
        if not isinstance(saved, Mapping):
            raise ConfigError(field="optimizer state", why=f"lacks the settings of {name}")
        unknown = sorted({*saved} - {*live} - _OF_SCHEDULERS - _OWN_CHOICES)
        if unknown:
            raise ConfigError(
                field="optimizer state",
                why=f"has settings in {name} that a {type(self.optimizer).__name__} lacks: "
                f"{_list(unknown)}",
                help="Load it into the kind of optimizer that saved it",
            )

    def _at_home(self, name: str, key: str, value: object) -> object:
        """A loaded value where the optimizer expects it; a tensor that is there is not copied."""
        if not isinstance(value, torch.Tensor):
            return value
        if key == "step":
            return value.to(self._device_of_others(name))
        return value.to(self._parameters[name].device)

    def _device_of_others(self, name: str) -> torch.device:
        """Where state that is not shaped like the parameter lives: step counts, for instance."""
        group = self.optimizer.param_groups[self._group_of[name]]
        beside = group.get("capturable") or group.get("fused")
        return self._parameters[name].device if beside else torch.device("cpu")


def _by_prefix(
    modules: torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Module]]:
    if isinstance(modules, Mapping):
        yield from modules.items()
    elif isinstance(modules, torch.nn.Module):
        yield "", modules
    else:
        yield from (("", module) for module in modules)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
