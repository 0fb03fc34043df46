"""The coordinator's settings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ckptcoord.core.refs import MAIN, BranchName
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SHARD_BYTES = 5 * 2**30


def utc_now() -> datetime:
    """The wall clock; it stamps entries and decides nothing."""
    return datetime.now(UTC)


def _ignore(step: str) -> None:
    """The default probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """How a CheckpointCoordinator works.

    Args:
        branch: the branch it saves to and resolves bare steps on.
        max_shard_size: bytes of tensors a file; a larger tensor gets a file of its own.
        timeout_s: the deadline of every wait for other ranks.
        io_threads: threads a rank that read, write and hash.
        keep_last: after a commit, retire all but the newest so many of the branch; None keeps all.
        training_args_hash: kept in the manifest.
        probe: called with the name of each step of the protocol as this rank reaches it
            (docs/protocol.md lists them); for tests, tracing and progress.
        clock: stamps manifests and log entries.

    Raises:
        ConfigError: a number out of range.
        InvalidNameError: the branch is not well formed.
    """

    branch: str = MAIN
    max_shard_size: int = MAX_SHARD_BYTES
    timeout_s: float = 600.0
    io_threads: int = 2
    keep_last: int | None = None
    training_args_hash: str | None = None
    probe: Callable[[str], None] = _ignore
    clock: Callable[[], datetime] = utc_now

    def __post_init__(self) -> None:
        BranchName(self.branch)
        for name, least in (("max_shard_size", 1), ("timeout_s", 0.001), ("io_threads", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    field=f"CoordinatorConfig.{name}",
                    why=f"is {getattr(self, name)}, less than {least}",
                )
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigError(
                field="CoordinatorConfig.keep_last",
                why=f"is {self.keep_last}; at least one checkpoint must be kept",
                help="Give 1 or more, or None to keep all",
            )
