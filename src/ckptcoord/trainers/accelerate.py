"""AccelTrainer: the model, the optimizer and the ranks are Hugging Face Accelerate's."""

from __future__ import annotations

import os
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as c10d
from torch.nn.parallel import DistributedDataParallel

from ckptcoord.core.sharing import SharingPattern, StateComponent
from ckptcoord.dist.optimizer import OptimizerState
from ckptcoord.dist.parallel import has_sparse_gradients, settle_buckets, share_buffers
from ckptcoord.errors import ConfigError
from ckptcoord.trainers.batch import to_device
from ckptcoord.trainers.ddp import DDPTrainer
from ckptcoord.trainers.ranks import OneRank, Ranks, TorchRanks
from ckptcoord.trainers.sharded import redeclared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptcoord.trainers.arguments import TrainingArguments

# In the others a rank holds parts of model or optimizer, or steps in an engine of their own.
_REPLICATING = frozenset({"NO", "MULTI_CPU", "MULTI_GPU"})


class AccelTrainer(DDPTrainer):
    """Trains with an `Accelerator`: its mixed precision, its DDP, its optimizer wrapper.

    It gives the losses of DDPTrainer, bit for bit, where the accelerator's precision is fp32. As
    there, a learning rate goes by optimizer steps (of itself, Accelerate steps a schedule once for
    each process), and accumulation by TrainingArguments.

    **What differs by rank.** An `AcceleratedOptimizer` holds the process's index and its device,
    shares one `GradientState` with the loader and the scheduler, and knows whether its last step
    was skipped. None of it is state: all of it is made anew by `Accelerator()`, or is over when
    the step is. So the optimizer component is the torch optimizer inside of it, which is the same
    on every rank, and the replicas are validated. A gradient scaler (fp16) is state, the same
    on every rank too, since it looks at gradients that have been averaged: the component `scaler`.

    Args:
        model: as in BaseTrainer, as are all others.
        args: likewise.
        accelerator: one of the user's own, with `gradient_accumulation_steps` 1; by default
            `create_accelerator()` makes it.

    Attributes:
        accelerator: in use.
        optimizer: an `AcceleratedOptimizer`.

    Raises:
        ConfigError: accelerate is not installed, or the accelerator shards.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *positional: Any,  # noqa: ANN401 (BaseTrainer's own)
        accelerator: Any = None,  # noqa: ANN401 (an Accelerator)
        **keywords: Any,  # noqa: ANN401 (BaseTrainer's own)
    ) -> None:
        self.args = args
        self.accelerator = accelerator or self.create_accelerator(model)
        _check(self.accelerator)
        super().__init__(model, args, *positional, **keywords)
        self._torch_optimizer, self._torch_scheduler = self.optimizer, self.lr_scheduler
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self.lr_scheduler = _accelerate("scheduler").AcceleratedScheduler(
            self.lr_scheduler, self.optimizer, split_batches=True
        )

    def create_accelerator(self, model: torch.nn.Module) -> Any:  # noqa: ANN401 (an Accelerator)
        """Called first; `args` is there."""
        accelerate = _accelerate()
        unused = has_sparse_gradients(model)
        handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=unused)
        # Without `cpu`, it would train on each rank alone where there is no GPU.
        cpu = self.args.use_cpu or not torch.accelerator.is_available()
        return accelerate.Accelerator(cpu=cpu, kwargs_handlers=[handler])

    def join_ranks(self) -> Ranks:
        """Those of the process group that the accelerator has started."""
        ready = c10d.is_available() and c10d.is_initialized()
        return TorchRanks() if ready else OneRank()

    def pick_device(self) -> torch.device:
        """The accelerator's."""
        return torch.device(self.accelerator.device)

    def wrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """As the accelerator prepares it; DDP with settled buckets (DDPTrainer)."""
        prepared: torch.nn.Module = self.accelerator.prepare_model(model)
        if isinstance(prepared, DistributedDataParallel):
            settle_buckets(prepared)
        return prepared

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Only the last batch of an optimizer step reduces gradients, and only then it steps."""
        self.accelerator.sync_gradients = last
        if last:
            yield
            return
        with self.accelerator.no_sync(self.model_wrapped):
            yield

    def training_step(self, batches: Sequence[Any]) -> torch.Tensor:
        """As DDPTrainer's, with the accelerator's backward, which scales."""
        losses = []
        for place, raw in enumerate(batches, start=1):
            last = place == len(batches)
            batch = to_device(raw, self.device)
            with self.accumulating(last=last):
                loss = self.compute_loss(self.model_wrapped, batch) / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
            if not last:
                self.announce("on_substep_end")
        if self.shares_buffers:
            share_buffers(self.model, group=None, first=0)
        return sum(losses[1:], losses[0])

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """By the accelerator, which unscales them first."""
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm

    def named_optimizer(self) -> OptimizerState:
        """Of the torch optimizer inside of the wrapper."""
        return OptimizerState(self._torch_optimizer, self.model)

    def get_state_components(self) -> list[StateComponent]:
        """As DDPTrainer's, of what is inside of the wrappers; the optimizer validated, too."""
        validated = {"validate_replication": True}
        scheduler = {"stateful": self._torch_scheduler, **validated}
        components = redeclared(
            super().get_state_components(), {"optimizer": validated, "scheduler": scheduler}
        )
        scaler = self.accelerator.scaler
        if scaler is not None:
            replicated = SharingPattern.REPLICATED
            components.append(
                StateComponent("scaler", scaler, replicated, validate_replication=True)
            )
        return components


def _check(accelerator: Any) -> None:  # noqa: ANN401 (an Accelerator)
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind not in _REPLICATING:
        raise ConfigError(
            field="accelerator",
            why=f"is of the kind {kind}, in which a rank does not hold all of the model and "
            "optimizer",
            help="Use FSDPTrainer or HybridTrainer, which need no accelerate",
        )
    started = os.environ.get("WORLD_SIZE", "1")  # noqa: TID251 (torchrun tells through it)
    if str(accelerator.num_processes) != started:
        raise ConfigError(
            field="accelerator",
            why=f"knows {accelerator.num_processes} of {started} processes, "
            "as Accelerator() does where there is no GPU",
            help="Make it with cpu=True",
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            field="accelerator.gradient_accumulation_steps",
            why=f"is {accelerator.gradient_accumulation_steps}: losses would be divided twice",
            help="Leave it at 1, and set gradient_accumulation_steps in TrainingArguments",
        )


def _accelerate(module: str = "") -> Any:  # noqa: ANN401 (accelerate has no types)
    try:
        return import_module(f"accelerate.{module}" if module else "accelerate")
    except ModuleNotFoundError as error:
        raise ConfigError(
            field="AccelTrainer",
            why=f"needs the package {error.name}",
            help="Install ckptcoord[accelerate]",
        ) from error
