"""ckptcoord: a distributed, trainer-integrated checkpoint coordinator for PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ckptcoord.version import VERSION

if TYPE_CHECKING:
    from ckptcoord.core.lossy import Lossy
    from ckptcoord.core.manifest import CheckpointManifest, ComponentManifest
    from ckptcoord.core.sharing import SharingPattern, StateComponent, ValidationLevel
    from ckptcoord.dist.config import CoordinatorConfig
    from ckptcoord.dist.coordinator import CheckpointCoordinator
    from ckptcoord.dist.export import export_model
    from ckptcoord.dist.loading import LoadReport
    from ckptcoord.dist.objects import load, save
    from ckptcoord.dist.optimizer import OptimizerState
    from ckptcoord.dist.report import SaveReport
    from ckptcoord.dist.rng import RNGState
    from ckptcoord.dist.savequeue import PendingSave
    from ckptcoord.dist.sharded import Sharded
    from ckptcoord.dist.shutdown import shutdown
    from ckptcoord.dist.view import Branch, Checkpoint, RepositoryView, open_repository
    from ckptcoord.engine import CheckpointEngine, EngineConfig
    from ckptcoord.errors import CkptError
    from ckptcoord.plan.lineage import Compression
    from ckptcoord.plan.retention import Retention
    from ckptcoord.repo.changes import CheckpointDiff
    from ckptcoord.repo.context import RunContext, resolve_context
    from ckptcoord.repo.repository import Repository
    from ckptcoord.repo.settings import RepoConfig, WorkspaceConfig
    from ckptcoord.repo.workspace import find_repo, find_workspace, init_repo, init_workspace
    from ckptcoord.trainers.accelerate import AccelTrainer
    from ckptcoord.trainers.arguments import TrainingArguments
    from ckptcoord.trainers.base import BaseTrainer
    from ckptcoord.trainers.callbacks import TrainerCallback
    from ckptcoord.trainers.ddp import DDPTrainer
    from ckptcoord.trainers.fsdp import FSDPTrainer
    from ckptcoord.trainers.hybrid import HybridTrainer
    from ckptcoord.trainers.pipeline import PipelineTrainer
    from ckptcoord.trainers.single import Trainer

__version__ = VERSION

# Where each public name lives; imported on first use, so that the CLI never waits for torch.
_HOMES = {
    "AccelTrainer": "trainers.accelerate",
    "BaseTrainer": "trainers.base",
    "Branch": "dist.view",
    "Checkpoint": "dist.view",
    "CheckpointCoordinator": "dist.coordinator",
    "CheckpointEngine": "engine",
    "CheckpointDiff": "repo.changes",
    "CheckpointManifest": "core.manifest",
    "CkptError": "errors",
    "Compression": "plan.lineage",
    "ComponentManifest": "core.manifest",
    "CoordinatorConfig": "dist.config",
    "DDPTrainer": "trainers.ddp",
    "EngineConfig": "engine",
    "FSDPTrainer": "trainers.fsdp",
    "HybridTrainer": "trainers.hybrid",
    "LoadReport": "dist.loading",
    "Lossy": "core.lossy",
    "OptimizerState": "dist.optimizer",
    "PendingSave": "dist.savequeue",
    "PipelineTrainer": "trainers.pipeline",
    "RNGState": "dist.rng",
    "RepoConfig": "repo.settings",
    "Repository": "repo.repository",
    "RepositoryView": "dist.view",
    "Retention": "plan.retention",
    "RunContext": "repo.context",
    "SaveReport": "dist.report",
    "Sharded": "dist.sharded",
    "SharingPattern": "core.sharing",
    "StateComponent": "core.sharing",
    "Trainer": "trainers.single",
    "TrainerCallback": "trainers.callbacks",
    "TrainingArguments": "trainers.arguments",
    "ValidationLevel": "core.sharing",
    "WorkspaceConfig": "repo.settings",
    "export_model": "dist.export",
    "find_repo": "repo.workspace",
    "find_workspace": "repo.workspace",
    "init_repo": "repo.workspace",
    "init_workspace": "repo.workspace",
    "load": "dist.objects",
    "open_repository": "dist.view",
    "resolve_context": "repo.context",
    "save": "dist.objects",
    "shutdown": "dist.shutdown",
}

__all__ = [
    "AccelTrainer",
    "BaseTrainer",
    "Branch",
    "Checkpoint",
    "CheckpointCoordinator",
    "CheckpointDiff",
    "CheckpointEngine",
    "CheckpointManifest",
    "CkptError",
    "ComponentManifest",
    "Compression",
    "CoordinatorConfig",
    "DDPTrainer",
    "EngineConfig",
    "FSDPTrainer",
    "HybridTrainer",
    "LoadReport",
    "Lossy",
    "OptimizerState",
    "PendingSave",
    "PipelineTrainer",
    "RNGState",
    "RepoConfig",
    "Repository",
    "RepositoryView",
    "Retention",
    "RunContext",
    "SaveReport",
    "Sharded",
    "SharingPattern",
    "StateComponent",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "ValidationLevel",
    "WorkspaceConfig",
    "export_model",
    "find_repo",
    "find_workspace",
    "init_repo",
    "init_workspace",
    "load",
    "open_repository",
    "resolve_context",
    "save",
    "shutdown",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckptcoord' has no attribute {name!r}")
    value = getattr(import_module(f"ckptcoord.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
