"""Checkpoints for a training loop of one's own: attach, commit, resume, fork."""

from ckptcoord.engine.config import EngineConfig
from ckptcoord.engine.engine import CheckpointEngine

__all__ = ["CheckpointEngine", "EngineConfig"]
