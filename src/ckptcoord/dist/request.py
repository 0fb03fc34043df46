"""What the caller of a save asks for, checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptcoord.core.digest import DIGEST_BYTES, Digest
from ckptcoord.core.entries import (
    LONGEST_TIMING,
    MAX_ENTRY_BYTES,
    MAX_SIZE_BYTES,
    Commit,
    Entry,
)
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.core.refs import CheckpointId

_LONGEST_PARENT_BYTES = 256
_NO_NONCE = "0" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What the caller asked for; the same on every rank.

    Args:
        checkpoint_id: what it will be.
        message: for people, at most 100,000 characters.
        metrics: finite ones; all in all, a commit entry must hold them.
        epoch: position in the data, from 0.
        overwrite: commit over a checkpoint of the same id.

    Raises:
        ConfigError: no manifest or commit entry could say this.
    """

    checkpoint_id: CheckpointId
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    epoch: float | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.message, str):
            raise ConfigError(field="message", why=f"is a {type(self.message).__name__}, not text")
        if self.epoch is not None and not _is_position(self.epoch):
            raise ConfigError(
                field="epoch", why=f"is {_shown(self.epoch)}, not a finite number from 0"
            )
        self._check_entry()

    def _check_entry(self) -> None:
        """The largest entry that this could make must fit: found out now, not at the commit."""
        if not (self.message or self.metrics):
            return  # all else in an entry is bounded, far below
        folder = f"{self.checkpoint_id}.00000000"
        body = Commit(
            writer=_NO_NONCE,
            checkpoint_id=self.checkpoint_id,
            path=folder,
            manifest_digest=Digest(bytes(DIGEST_BYTES)),
            epoch=MAX_SIZE_BYTES,
            attempt=_NO_NONCE,
            size_bytes=MAX_SIZE_BYTES,
            stored_bytes=MAX_SIZE_BYTES,
            metrics=self.metrics,
            message=self.message,
            replaces=folder,
            timing=LONGEST_TIMING,
        )
        entry = Entry(number=MAX_SIZE_BYTES, timestamp="2000-01-01T00:00:00.000000Z", body=body)
        length_bytes = len(entry.to_bytes()) + _LONGEST_PARENT_BYTES
        if length_bytes > MAX_ENTRY_BYTES:
            raise ConfigError(
                field="message" if len(self.message) > MAX_ENTRY_BYTES // 24 else "metrics",
                why=f"makes {length_bytes:,} bytes of log entry, {MAX_ENTRY_BYTES:,} at most",
            )


def finite_metrics(metrics: object) -> dict[str, float]:
    """The metrics that a manifest can hold; NaN and infinities are left out.

    Raises:
        ConfigError: no mapping of names to numbers.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(field="metrics", why=f"is a {type(metrics).__name__}, not a mapping")
    numbers = {name: _number(name, value) for name, value in metrics.items()}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _number(name: object, value: Any) -> float:  # noqa: ANN401 (anything with __float__)
    if not isinstance(name, str):
        raise ConfigError(field="metrics", why=f"has the name {_shown(name)}, which is no text")
    try:
        if not isinstance(value, str | bytes | bytearray):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        why = f"is {_shown(value)}, which no float holds"
        raise ConfigError(field=f"metrics[{_shown(name)}]", why=why) from error
    raise ConfigError(field=f"metrics[{_shown(name)}]", why="is text, not a number")


def _is_position(epoch: object) -> bool:
    number = isinstance(epoch, int | float) and not isinstance(epoch, bool)
    return number and math.isfinite(epoch) and epoch >= 0  # type: ignore[arg-type, operator]


def _shown(value: object) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, str | float) else ascii(value)[:80]
