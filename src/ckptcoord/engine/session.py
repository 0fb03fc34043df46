"""What the calls of one engine share: the ranks, the repository, and a coordinator at a time."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.core.context import Origin, Reset
from ckptcoord.dist.coordinator import CheckpointCoordinator
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.messages import as_dict, as_int, as_list, same_on_all
from ckptcoord.errors import CkptError, ClosedError, SetupAbortedError
from ckptcoord.repo.context import RunContext, resolve_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.world import World
    from ckptcoord.engine.config import EngineConfig
    from ckptcoord.engine.parts import Parts
    from ckptcoord.errors import CollectiveError
    from ckptcoord.repo.repository import Repository

_PLAIN = ("repo_name", "branch", "resume_ref", "resume_since", "autocommit", "seed")


class EngineSession:
    """One engine on one rank.

    Args:
        parts: what is saved.
        context: where, and how the run goes on.
        config: settings.
        world: the ranks; closed with the session.

    Attributes:
        writer: who forks and drops.
        branch: that is committed to.
    """

    def __init__(
        self, parts: Parts, context: RunContext, config: EngineConfig, world: World
    ) -> None:
        self.parts, self.context, self._config, self.world = parts, context, config, world
        self.writer = secrets.token_hex(16)
        self.branch = context.branch
        self._process = os.getpid()
        self._closed = False
        self._coordinator: CheckpointCoordinator | None = None

    @property
    def is_named(self) -> bool:
        """Whether somebody chose the branch, in code or in the environment."""
        return self.context.origins["branch"] in (Origin.ARGUMENT, Origin.ENVIRONMENT)

    def ready(self) -> CheckpointCoordinator:
        """The coordinator for the branch and the parts as they are now. Collective where it is new.

        Raises:
            ClosedError: the engine is closed.
            CkptError: the repository cannot be opened.
        """
        if self._closed:
            raise ClosedError(thing="engine")
        if self._coordinator is None:
            self._coordinator = self.coordinator_of(self.parts.components())
        return self._coordinator

    def coordinator_of(self, components: list[StateComponent]) -> CheckpointCoordinator:
        """One for these components, on the branch. Collective."""
        return CheckpointCoordinator(
            components,
            self.parts.groups(self.world.size),
            output_dir=self.context.repo_path,
            config=self._config.on_branch(self.branch),
        )

    def renew(self) -> None:
        """Finish what the coordinator has under way; the next one is made when it is needed.

        Raises:
            CkptError: a commit failed.
        """
        coordinator, self._coordinator = self._coordinator, None
        if coordinator is not None:
            coordinator.close()

    def agree(
        self,
        operation: type[CollectiveError],
        say: JsonValue | CkptError,
        decide: Callable[[Repository], JsonValue],
    ) -> JsonValue:
        """What rank 0 reads in the repository, for all. Collective.

        Args:
            operation: raised as that where a rank falls silent.
            say: the same on every rank, or why this one cannot go on.
            decide: runs on rank 0.

        Raises:
            CkptError: what a rank said, or rank 0 found.
        """
        coordinator = self.ready()
        self.world.begin(operation, "engine")

        def lead(said: list[JsonValue]) -> JsonValue:
            same_on_all("what the ranks ask for", said)
            return decide(coordinator.repository)

        deadline = Deadline.after(self._config.coordinator.timeout_s)
        return self.world.agree("engine", say, lead, deadline=deadline)

    def close(self) -> None:
        """Finish the commits under way. Safe to call twice.

        Raises:
            CkptError: one of them failed.
        """
        if self._closed or os.getpid() != self._process:
            return  # a forked child's: its commits are the parent's
        self._closed = True
        try:
            self.renew()
        finally:
            self.world.close()


def agree_on_context(
    world: World,
    parts: Parts | CkptError,
    workspace: str | os.PathLike[str] | None,
    repo: str | os.PathLike[str] | None,
    config: EngineConfig,
) -> RunContext:
    """Where the run's checkpoints are: rank 0 looks, and makes what is absent. Collective.

    Raises:
        RepositoryNotFoundError: nobody names a repository, and there is none around.
        CkptError: the parts are none on some rank; a setting makes no sense.
    """
    place = config.workspace_path if workspace is None else workspace
    name = config.repo_name if repo is None else repo
    world.begin(SetupAbortedError, "engine")
    asked = [str(one) for one in (place, name, config.branch)]

    def lead(said: list[JsonValue]) -> JsonValue:
        same_on_all("workspace, repo, branch", said)
        return _to_json(resolve_context(place, name, branch=config.branch))

    deadline = Deadline.after(config.coordinator.timeout_s)
    say: JsonValue | CkptError = parts if isinstance(parts, CkptError) else [*asked]
    return _from_json(world.agree("context", say, lead, deadline=deadline))


def _to_json(context: RunContext) -> JsonValue:
    """For the other ranks."""
    workspace = context.workspace_path
    said: dict[str, JsonValue] = {name: getattr(context, name) for name in _PLAIN}
    return {
        **said,
        "workspace_path": None if workspace is None else str(workspace),
        "repo_path": str(context.repo_path),
        "resets": [*map(str, context.resets)],
        "origins": {name: str(origin) for name, origin in context.origins.items()},
    }


def _from_json(value: JsonValue) -> RunContext:
    """What rank 0 said."""
    said = as_dict(value)
    workspace, ref = said["workspace_path"], said["resume_ref"]
    return RunContext(
        workspace_path=None if workspace is None else Path(str(workspace)),
        repo_name=str(said["repo_name"]),
        repo_path=Path(str(said["repo_path"])),
        branch=str(said["branch"]),
        resume_ref=None if ref is None else str(ref),
        resume_since=_number(said["resume_since"]),
        autocommit=as_int(said["autocommit"]),
        resets=tuple(Reset(str(one)) for one in as_list(said["resets"])),
        seed=_number(said["seed"]),
        origins={name: Origin(str(one)) for name, one in as_dict(said["origins"]).items()},
    )


def _number(value: JsonValue) -> int | None:
    return None if value is None else as_int(value)
