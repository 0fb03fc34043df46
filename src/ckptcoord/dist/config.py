"""The coordinator's settings."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, TypeAlias

from ckptcoord.core.entries import MAX_QUEUE_DEPTH
from ckptcoord.core.refs import MAIN, checked_name
from ckptcoord.errors import ConfigError
from ckptcoord.plan.lineage import NO_COMPRESSION, Compression
from ckptcoord.plan.retention import KEEP_ALL, MAX_COUNT, Retention

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.dist.report import SaveReport

Deferred: TypeAlias = bool | Literal["auto"]

MAX_SHARD_BYTES = 5 * 2**30
MAX_TIMEOUT_S = 1e7
MAX_NICE = 19
_MAX_HASH_CHARS = 200


class OnFailure(StrEnum):
    """What becomes of a background save that failed."""

    RAISE = "raise"
    WARN = "warn"
    RETRY = "retry"


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
        timeout_s: the deadline of every wait for other ranks, at most 10,000,000.
        io_threads: threads a rank that read, write and hash; and copy, where a save is staged.
        compression: whether saves are deltas against what is stored already, and how; `auto` is
            `Compression(level="auto")`. Off, every checkpoint is an anchor, which any tool reads
            that reads safetensors.
        keep_last: short for `retention=Retention(keep_last=...)`.
        retention: after a commit, retire what these rules do not keep. What is not given here is as
            the repository's `repo.yaml` says; without any rule, all checkpoints stay.
        training_args_hash: kept in the manifest.
        queue_depth: background saves that may be unfinished on a rank before a call waits.
        deferred: whether a background save copies what optimizers own while the next forward and
            backward run, rather than at the call; `auto` does so with tensors that a first save has
            seen keep still until the optimizer's step.
        staging_bytes: the most that a rank holds copies of; a save for which there is no room
            waits. None: whatever the queue needs.
        on_failure: of a background save: `raise` at a later call, the same on every rank; `warn` in
            the log; `retry` twice, then raise. What `deferred="auto"` had to learn is warned of.
        io_budget: the most bytes a second that a background save takes from memory to storage on
            a rank; None: as fast as it goes.
        background_nice: added to the niceness of the threads of background saves, 0 to 19, where
            threads have one (Linux); of the one that copies, half of it.
        on_saved: called with the report of every save on this rank (of every try, with `retry`), in
            the thread that ran it. It must not call the coordinator.
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
    compression: Compression | str = NO_COMPRESSION
    keep_last: int | None = None
    retention: Retention = KEEP_ALL
    training_args_hash: str | None = None
    queue_depth: int = 2
    deferred: Deferred = "auto"
    staging_bytes: int | None = None
    on_failure: OnFailure | str = OnFailure.RAISE
    io_budget: float | None = None
    background_nice: int = 10
    on_saved: Callable[[SaveReport], None] | None = None
    probe: Callable[[str], None] = _ignore
    clock: Callable[[], datetime] = utc_now

    def __post_init__(self) -> None:
        checked_name("branch", self.branch)
        object.__setattr__(self, "compression", Compression.of(self.compression))
        for name in ("max_shard_size", "io_threads"):
            _check_number(name, getattr(self, name), Integral, 1, 2**60)
        # A NaN or an infinity would be no deadline (INV-7).
        _check_number("timeout_s", self.timeout_s, Real, 0.001, MAX_TIMEOUT_S)
        self._check_background()
        if self.keep_last is not None:
            _check_number("keep_last", self.keep_last, Integral, 1, MAX_COUNT)
            object.__setattr__(self, "retention", _with_last(self.retention, int(self.keep_last)))
        text = self.training_args_hash
        if text is not None and not _is_short_text(text):
            raise ConfigError(
                field="CoordinatorConfig.training_args_hash",
                why=f"is not 1 to {_MAX_HASH_CHARS} characters of text",
            )

    def _check_background(self) -> None:
        _check_number("queue_depth", self.queue_depth, Integral, 1, MAX_QUEUE_DEPTH)
        _check_number("background_nice", self.background_nice, Integral, 0, MAX_NICE)
        if self.staging_bytes is not None:
            _check_number("staging_bytes", self.staging_bytes, Integral, 0, 2**60)
        if self.io_budget is not None:
            _check_number("io_budget", self.io_budget, Real, 1.0, 2.0**60)
        check_deferred(self.deferred)
        _check_among("on_failure", self.on_failure, tuple(OnFailure))
        object.__setattr__(self, "on_failure", OnFailure(self.on_failure))

    @property
    def rule(self) -> Compression:
        """`compression`, whichever way it was given."""
        return Compression.of(self.compression)


def _with_last(retention: Retention, keep_last: int) -> Retention:
    if retention.keep_last not in (None, keep_last):
        raise ConfigError(
            field="CoordinatorConfig.keep_last",
            why=f"is {keep_last}, and that of retention {retention.keep_last}",
        )
    return Retention(keep_last=keep_last).over(retention)


def _check_number(name: str, value: object, kind: type, least: float, most: float) -> None:
    known = isinstance(value, kind) and not isinstance(value, bool)
    if not known or not least <= value <= most:  # type: ignore[operator]
        word = "a whole number" if kind is Integral else "a number"
        raise ConfigError(
            field=f"CoordinatorConfig.{name}",
            why=f"is {ascii(value)[:40]}, not {word} from {least} to {most}",
        )


def check_deferred(value: object) -> None:
    """Whether copies are deferred; None: as the settings say.

    Raises:
        ConfigError: neither yes nor no nor "auto".
    """
    if value is not None:
        _check_among("deferred", value, (True, False, "auto"))


def _check_among(name: str, value: object, known: tuple[object, ...]) -> None:
    # 1 == True, and is no answer to yes or no.
    if isinstance(value, bool | str) and value in known:
        return
    raise ConfigError(
        field=f"CoordinatorConfig.{name}",
        why=f"is {ascii(value)[:40]}, none of {', '.join(map(str, known))}",
    )


def _is_short_text(text: object) -> bool:
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_HASH_CHARS:
        return False
    return text == text.encode("utf-8", "replace").decode("utf-8")  # half a pair is not
