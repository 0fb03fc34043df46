"""A source and its checkpoints, in our terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """What one checkpoint of a source holds.

    Attributes:
        components: state by component key; tensors are read from the source as they are used.
        config: the config.json of a Hugging Face model; empty where there is none.
        step: what the state itself says; None: nothing.
        epoch: likewise.
        left_out: what is there and is not imported, each with the reason.
        notes: what whoever resumes should know.
    """

    components: Mapping[str, Any]
    config: bytes = b""
    step: int | None = None
    epoch: float | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """One checkpoint of a source, not read yet.

    Attributes:
        path: in the source, for people.
        read: reads it.
        step: None: the state may say.
        branch: empty: the source has no branches.
        fork: branch and step of the checkpoint that its branch begins at; None: nowhere.
        message: the source's.
        metrics: finite ones.
        epoch: position in the training data; None: the state may say.
    """

    path: str
    read: Callable[[], SourceState]
    step: int | None = None
    branch: str = ""
    fork: tuple[str, int] | None = None
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    epoch: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What was found at a path.

    Attributes:
        format: for people.
        path: where.
        checkpoints: in the order in which they are to be committed.
        left_out: what is there and is no checkpoint that can be read, each with the reason.
    """

    format: str
    path: str
    checkpoints: tuple[SourceCheckpoint, ...]
    left_out: tuple[str, ...] = ()
