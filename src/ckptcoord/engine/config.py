"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptcoord.core.refs import checked_name
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    import os

    from ckptcoord.core.lossy import CompressionLevel
    from ckptcoord.plan.lineage import Compression


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a CheckpointEngine works. What is None is as the environment, repo.yaml or a default say.

    Args:
        workspace_path: the workspace, as `attach(workspace=)`, which goes before it.
        repo_name: the repository, as `attach(repo=)`, which goes before it.
        branch: the branch that it commits to. One that is named here is never left for another but
            by `fork`.
        reanchor_interval: every so many commits one that stands alone; None: when it is cheaper.
        compression: `off`: every checkpoint stands alone; `auto`, `aggressive`: lossless deltas
            where they pay. None: as `coordinator` says.
        coordinator: everything else, such as deadlines and the queue of saves.

    Raises:
        ConfigError: a value makes no sense.
        InvalidNameError: the branch is not well formed.
    """

    workspace_path: str | os.PathLike[str] | None = None
    repo_name: str | None = None
    branch: str | None = None
    reanchor_interval: int | None = None
    compression: CompressionLevel | str | None = None
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)

    def __post_init__(self) -> None:
        if self.branch is not None:
            checked_name("branch", self.branch)
        given: object = self.coordinator
        if not isinstance(given, CoordinatorConfig):
            why = f"is a {type(given).__name__}, not a CoordinatorConfig"
            raise ConfigError(field="EngineConfig.coordinator", why=why)
        self._rule()

    def on_branch(self, branch: str) -> CoordinatorConfig:
        """The coordinator's settings for a branch."""
        return replace(self.coordinator, branch=branch, compression=self._rule())

    def _rule(self) -> Compression:
        """What is given here over the coordinator's own.

        Raises:
            ConfigError: a value makes no sense.
        """
        given = {"level": self.compression, "reanchor_interval": self.reanchor_interval}
        changes: dict[str, Any] = {
            name: value for name, value in given.items() if value is not None
        }
        return replace(self.coordinator.rule, **changes)
