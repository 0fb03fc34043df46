"""What an engine saves, and how the ranks share it: read off the live objects."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as c10d
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ckptcoord.core.sharing import OnWorldSizeChange, SharingPattern, StateComponent, Stateful
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.dist.parallel import has_sparse_gradients, settle_buckets, share_buffers
from ckptcoord.dist.rng import RNGState
from ckptcoord.dist.sharded import is_dtensor
from ckptcoord.engine.beginning import Beginning
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ckptcoord.core.context import Anew

Getter: TypeAlias = Callable[[], Any]
Setter: TypeAlias = Callable[[Any], None]
# All ranks as one group: of the parts of a tensor, each is written by one of those that hold it.
_JOB = "job"


class Parts:
    """The live objects of a run, and each of them as a component.

    Args:
        model: maybe wrapped by DDP, DataParallel or torch.compile; its checkpoints are those of the
            module inside.
        optimizer: of its parameters.
        scheduler: with `state_dict` and `load_state_dict`; None: there is none.

    Attributes:
        module: the plain one.
        beginning: what forks may go back to.

    Raises:
        ConfigError: one of them is of no kind that can be saved by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None = None,
    ) -> None:
        _check(model, optimizer, scheduler)
        *around, self.module = _layers(model)
        self.beginning = Beginning(optimizer, scheduler)
        self._scheduler = scheduler
        self._ddp = next((one for one in around if isinstance(one, DistributedDataParallel)), None)
        self._optimizer = OptimizerState(optimizer, self.module)
        self._own: dict[str, StateComponent] = {}
        if self._ddp is not None:
            _settle(self._ddp)

    def add(self, component: StateComponent) -> None:
        """One more, which the user holds."""
        self._own[component.key] = component

    def components(self) -> list[StateComponent]:
        """All of them; the generators are each rank's own."""
        replicated = SharingPattern.REPLICATED
        shared: dict[str, Any] = {"sharing_pattern": replicated}
        if self._is_sharded():
            shared = {
                "sharing_pattern": SharingPattern.PER_GROUP,
                "process_group_name": _JOB,
                "validate_replication": True,
            }
        whole = {**shared, "validate_replication": True}
        standard = [
            StateComponent("model", self.module, **whole),
            StateComponent("optimizer", self._optimizer, **shared),
        ]
        if self._scheduler is not None:
            standard.append(StateComponent("scheduler", self._scheduler, replicated))
        own, kept = SharingPattern.PER_RANK, OnWorldSizeChange.OWN
        rng = StateComponent("rng", RNGState(), own, on_world_size_change=kept)
        return [*standard, *self._own.values(), rng]

    def taken_over(self, anew: Anew) -> list[StateComponent]:
        """Those that are loaded where the others begin anew."""
        return [one for one in self.components() if self.beginning.takes_over(one.key, anew)]

    def groups(self, world_size: int) -> Mapping[str, object]:
        """The process groups that the components name."""
        return {_JOB: range(world_size)} if self._is_sharded() else {}

    def settle_buffers(self) -> None:
        """Have all ranks hold the first one's buffers. Collective, under DDP and FSDP.

        DDP will do so before the next forward anyway, if not as early. Under FSDP nobody does, and
        a checkpoint has room for one.
        """
        if self._ddp is not None and self._ddp.broadcast_buffers:
            group = self._ddp.process_group
            share_buffers(self.module, group, c10d.get_global_rank(group, 0))
        elif any(map(_is_fsdp, self.module.modules())):
            share_buffers(self.module, None, 0)

    def _is_sharded(self) -> bool:
        return any(map(is_dtensor, self.module.parameters()))


def user_state(name: str, getter: Getter, setter: Setter, **declared: Any) -> StateComponent:  # noqa: ANN401 (fields)
    """Some state of the user's as a component; `declared` are fields of it.

    Raises:
        ConfigError: these are no functions.
        InvalidNameError: the name cannot be a file's.
    """
    given: tuple[tuple[str, object], ...] = (("getter", getter), ("setter", setter))
    for what, function in given:
        if not callable(function):
            why = f"is a {type(function).__name__}, no function"
            raise ConfigError(field=f"register_state({name!r:.80}).{what}", why=why)
    return StateComponent(name, None, get_state=getter, set_state=setter, **declared)


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What DDP, DataParallel and torch.compile have put around a module, and last the module."""
    inner: object = model
    while isinstance(inner, torch.nn.Module):
        yield inner
        wrapper = isinstance(inner, DistributedDataParallel | DataParallel)
        inner = inner.module if wrapper else getattr(inner, "_orig_mod", None)  # torch.compile's


def _check(model: object, optimizer: object, scheduler: object) -> None:
    if not isinstance(model, torch.nn.Module):
        why = f"is a {type(model).__name__}, not a torch.nn.Module"
        raise ConfigError(field="model", why=why, help="Register other state with register_state")
    if type(model).__name__ == "FullyShardedDataParallel":
        raise ConfigError(
            field="model",
            why="is FSDP's first version, whose parameters are flattened and have no names",
            help="Shard it with torch.distributed.fsdp.fully_shard",
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        why = f"is a {type(optimizer).__name__}, not a torch.optim.Optimizer"
        raise ConfigError(field="optimizer", why=why)
    if scheduler is not None and not isinstance(scheduler, Stateful):
        why = f"is a {type(scheduler).__name__} without state_dict and load_state_dict"
        raise ConfigError(field="scheduler", why=why)


def _settle(ddp: DistributedDataParallel) -> None:
    """Have DDP lay out its buckets as it will in any process that resumes; see DDPTrainer.

    Not where it has begun to train, or where gradients of zeros would leave a trace.
    """
    if c10d.get_world_size(ddp.process_group) < 3:
        return  # two terms have the same sum in either order
    parameters = [p for p in ddp.module.parameters() if p.requires_grad]
    seen = (
        ddp.static_graph
        or ddp.mixed_precision is not None
        or bool(getattr(ddp, "_comm_hooks", ()))
        or has_sparse_gradients(ddp.module)
        or len({p.device for p in parameters}) != 1
        or any(p.grad is not None for p in parameters)
        or _has_rebuilt(ddp)
    )
    if not seen:
        settle_buckets(ddp)


def _is_fsdp(part: torch.nn.Module) -> bool:
    """Whether `fully_shard` was applied to it; torch's module for that is slow to import."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(part, module.FSDPModule)


def _has_rebuilt(ddp: DistributedDataParallel) -> bool:
    look: Any = ddp._get_ddp_logging_data  # noqa: SLF001 (there is no public way)
    return bool(look().get("has_rebuilt_buckets"))
