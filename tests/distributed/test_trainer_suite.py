"""Every trainer against the suite that users run against theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from tests.distributed.launch import warm_python
from tests.distributed.pipelines import Tiny, Tokens
from tests.unit.trainers.job import Wide
from tests.unit.trainers.tiny import Noisy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ckptcoord import (
    AccelTrainer,
    DDPTrainer,
    FSDPTrainer,
    HybridTrainer,
    PipelineTrainer,
    Trainer,
)
from ckptcoord.testing.trainers import TrainerSuite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from ckptcoord import BaseTrainer, TrainingArguments

pytestmark = pytest.mark.dist
HERE = "tests.distributed.test_trainer_suite"
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 0.003,
    "warmup_steps": 2,
    "use_cpu": "true",
}


def single(args: TrainingArguments) -> BaseTrainer:
    torch.manual_seed(5)
    return Trainer(Wide(), args, Noisy(20))


def ddp(args: TrainingArguments) -> BaseTrainer:
    torch.manual_seed(5)
    return DDPTrainer(Wide(), args, Noisy(40))


def pipeline(args: TrainingArguments) -> BaseTrainer:
    torch.manual_seed(5)
    return PipelineTrainer(Tiny(dropout=0.1, tied=True), args, Tokens(40))


def accel(args: TrainingArguments) -> BaseTrainer:
    torch.manual_seed(5)
    return AccelTrainer(Wide(), args, Noisy(40))


def fsdp(args: TrainingArguments) -> BaseTrainer:
    torch.manual_seed(5)
    return FSDPTrainer(Wide(), args, Noisy(40))


class Halved(HybridTrainer):
    """Two layers are in halves on the ranks of tp, what is between them, too."""

    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        halves = {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}
        parallelize_module(model, mesh, halves)


def hybrid(args: TrainingArguments) -> BaseTrainer:
    torch.manual_seed(5)
    return Halved(Wide(), args, Noisy(20), mesh_shape={"dp": 1, "tp": 2})


class Warm(TrainerSuite):
    """Its jobs' processes are forks of a warm one."""

    @classmethod
    def command(cls, options: Sequence[str]) -> list[str]:
        _, *words = super().command(options)
        return ["env", f"PYTHON_EXEC={warm_python()}", warm_python(), *words]


class TestTrainer(Warm):
    factory = f"{HERE}:single"
    options: ClassVar[Mapping[str, object]] = SMALL


class TestDDPTrainer(Warm):
    factory = f"{HERE}:ddp"
    nproc = 2
    options: ClassVar[Mapping[str, object]] = {**SMALL, "compression": "auto"}


@pytest.mark.slow
class TestPipelineTrainer(Warm):
    factory = f"{HERE}:pipeline"
    nproc = 2
    options: ClassVar[Mapping[str, object]] = {
        **SMALL,
        "per_device_train_batch_size": 4,
        "pipeline_schedule": "gpipe",
        "gradient_accumulation_steps": 2,
    }


@pytest.mark.slow
class TestPipelineOfFour(Warm):
    factory = f"{HERE}:pipeline"
    nproc = 4
    options: ClassVar[Mapping[str, object]] = {**SMALL, "per_device_train_batch_size": 4}


@pytest.mark.slow
class TestHybridTrainer(Warm):
    factory = f"{HERE}:hybrid"
    nproc = 2
    options: ClassVar[Mapping[str, object]] = SMALL


@pytest.mark.slow
class TestFSDPTrainer(Warm):
    factory = f"{HERE}:fsdp"
    nproc = 2
    options: ClassVar[Mapping[str, object]] = SMALL


@pytest.mark.slow
class TestAccelTrainer(Warm):
    factory = f"{HERE}:accel"
    options: ClassVar[Mapping[str, object]] = SMALL


@pytest.mark.slow
class TestScript(TrainerSuite):
    """The example, as it is."""

    script = str(Path(__file__).parents[2] / "examples/ddp/train.py")
    nproc = 2
    options: ClassVar[Mapping[str, object]] = {
        "layers": 1,
        "width": 32,
        "context": 32,
        "text_bytes": 3000,
        "use_cpu": "true",
    }
