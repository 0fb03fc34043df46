"""The log's entries: frozen values, and their one JSON form (docs/format.md).

A body says what happened and who says so; an Entry gives it a number and a time. On disk the two
are one flat object. A body's constructor raises ConfigError or InvalidNameError for what could
not be read back; reading anything that breaks the format is a ManifestError.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

from ckptcoord.core.digest import Digest
from ckptcoord.core.fields import Fields
from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.core.ranks import MAX_WORLD_SIZE
from ckptcoord.core.refs import BranchName, CheckpointId, TagName, is_checkpoint_folder
from ckptcoord.errors import (
    ConfigError,
    FormatVersionError,
    InvalidNameError,
    ManifestError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT_VERSION = 1
MAX_ENTRY_BYTES = 1 << 20
MAX_SNAPSHOT_BYTES = 256 << 20
MAX_SIZE_BYTES = 1 << 60
MAX_TEXT = 100_000
MAX_SECONDS = 1e9
MAX_QUEUE_DEPTH = 64
SECONDS = (
    "stall_s",
    "waited_s",
    "staged_s",
    "opened_s",
    "encoded_s",
    "written_s",
    "voted_s",
    "committed_s",
)
SLOWEST_RANK, QUEUE_DEPTH = "slowest_rank", "queue_depth"
_COUNTS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {SLOWEST_RANK: (0, MAX_WORLD_SIZE - 1), QUEUE_DEPTH: (1, MAX_QUEUE_DEPTH)}
)
# No binary64 from 0 to MAX_SECONDS is longer in JSON, and no count.
LONGEST_TIMING: Mapping[str, float] = MappingProxyType(
    dict.fromkeys(SECONDS, 2.2250738585072014e-308)
    | {name: most for name, (_, most) in _COUNTS.items()}
)
_NONCE = re.compile(r"[0-9a-f]{32}")
_BESIDE = re.compile(r"\.[0-9a-f]{8}")
_PART = re.compile(r"[A-Za-z0-9._@-]{1,255}")
_TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A writer takes a branch: from here on, earlier claimants may not commit there (INV-2).

    Attributes:
        writer: the appender's nonce, 32 hex digits, in this and every other kind.
        epoch: one more than the branch's last claim; the first is 1.
        host: for people.
    """

    kind: ClassVar[str] = "claim"
    writer: str
    branch: BranchName
    epoch: int
    host: str | None = None
    world_size: int

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)
        _check_count("epoch", self.epoch, 1)
        _check_count("world_size", self.world_size, 1)
        _check_text("host", self.host or "")

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {
            "kind": self.kind,
            "writer": self.writer,
            "branch": str(self.branch),
            "epoch": self.epoch,
            "host": self.host,
            "world_size": self.world_size,
        }

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "claim") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            return cls(
                writer=fields.text("writer"),
                branch=BranchName(fields.text("branch")),
                epoch=fields.integer("epoch"),
                host=fields.optional_text("host"),
                world_size=fields.integer("world_size"),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint exists (INV-1).

    Attributes:
        path: its folder's name in the repository.
        manifest_digest: of its manifest's bytes.
        epoch: that of the writer's claim on the branch.
        attempt: the nonce of the save, 32 hex digits.
        parent: what training went on from.
        size_bytes: of its state before any coding.
        stored_bytes: of its files.
        replaces: the folder of the checkpoint of the same id that this one is committed over.
        needs: the folders of other checkpoints whose files this one's refer to, sorted: the bases
            of its deltas, and all that those need in turn, so that nobody has to follow a chain.
        timing: what rank 0 knew of the save by then: of `SECONDS`, from the call on, the
            `SLOWEST_RANK` to write, and the `QUEUE_DEPTH` at the call, whichever are known.
    """

    kind: ClassVar[str] = "commit"
    writer: str
    checkpoint_id: CheckpointId
    path: str
    manifest_digest: Digest
    epoch: int
    attempt: str
    parent: CheckpointId | None = None
    size_bytes: int
    stored_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    replaces: str | None = None
    needs: tuple[str, ...] = ()
    timing: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)
        _check_nonce("attempt", self.attempt)
        check_folder("path", self.path, self.checkpoint_id)
        if self.replaces is not None:
            check_folder("replaces", self.replaces, self.checkpoint_id)
        _check_needs(self.needs, self.path)
        _check_count("epoch", self.epoch, 1)
        _check_count("size_bytes", self.size_bytes, 0)
        _check_count("stored_bytes", self.stored_bytes, 0)
        _check_text("message", self.message)
        if self.parent == self.checkpoint_id:
            raise ConfigError(field="parent", why=f"{self.parent} is the checkpoint itself")
        for name, metric in self.metrics.items():
            _check_text("metrics", name)
            if not math.isfinite(metric):
                raise ConfigError(field=f"metrics[{name!r}]", why=f"is {metric}, not finite")
        _check_timing(self.timing)

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        document: dict[str, JsonValue] = {
            "kind": self.kind,
            "writer": self.writer,
            "checkpoint_id": str(self.checkpoint_id),
            "path": self.path,
            "manifest_digest": str(self.manifest_digest),
            "epoch": self.epoch,
            "attempt": self.attempt,
            "parent": None if self.parent is None else str(self.parent),
            "size_bytes": self.size_bytes,
            "stored_bytes": self.stored_bytes,
            "metrics": {name: float(metric) for name, metric in self.metrics.items()},
            "message": self.message,
            "replaces": self.replaces,
            "needs": list(self.needs),
        }
        if self.timing:
            document["timing"] = {
                name: int(number) if name in _COUNTS else float(number)
                for name, number in self.timing.items()
            }
        return document

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "commit") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            parent = fields.optional_text("parent")
            return cls(
                writer=fields.text("writer"),
                checkpoint_id=CheckpointId.parse(fields.text("checkpoint_id")),
                path=fields.text("path"),
                manifest_digest=Digest.parse(fields.text("manifest_digest")),
                epoch=fields.integer("epoch"),
                attempt=fields.text("attempt"),
                parent=None if parent is None else CheckpointId.parse(parent),
                size_bytes=fields.integer("size_bytes"),
                stored_bytes=fields.integer("stored_bytes"),
                metrics=fields.floats("metrics"),
                message=fields.text("message"),
                replaces=fields.optional_text("replaces"),
                needs=fields.texts("needs"),
                timing=_timing(fields.optional_object("timing")),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A branch begins at another branch's checkpoint; `source` is `from` on disk."""

    kind: ClassVar[str] = "fork"
    writer: str
    branch: BranchName
    source: CheckpointId

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {
            "kind": self.kind,
            "writer": self.writer,
            "branch": str(self.branch),
            "from": str(self.source),
        }

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "fork") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            return cls(
                writer=fields.text("writer"),
                branch=BranchName(fields.text("branch")),
                source=CheckpointId.parse(fields.text("from")),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A tag is set or moved to a checkpoint; without a target it is deleted."""

    kind: ClassVar[str] = "tag"
    writer: str
    name: TagName
    target: CheckpointId | None

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {
            "kind": self.kind,
            "writer": self.writer,
            "name": str(self.name),
            "target": None if self.target is None else str(self.target),
        }

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "tag") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            target = fields.optional_text("target")
            return cls(
                writer=fields.text("writer"),
                name=TagName(fields.text("name")),
                target=None if target is None else CheckpointId.parse(target),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """Checkpoints are dropped, by retention or by the user; gc may take their files later."""

    kind: ClassVar[str] = "retire"
    writer: str
    checkpoint_ids: tuple[CheckpointId, ...]
    reason: str = ""

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)
        _check_text("reason", self.reason)
        if not self.checkpoint_ids or len(set(self.checkpoint_ids)) < len(self.checkpoint_ids):
            raise ConfigError(field="checkpoint_ids", why="is empty, or names a checkpoint twice")

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {
            "kind": self.kind,
            "writer": self.writer,
            "checkpoint_ids": [str(checkpoint_id) for checkpoint_id in self.checkpoint_ids],
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "retire") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            return cls(
                writer=fields.text("writer"),
                checkpoint_ids=tuple(map(CheckpointId.parse, fields.texts("checkpoint_ids"))),
                reason=fields.text("reason"),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What gc is about to delete (INV-5): paths in the repository, and contents by digest."""

    kind: ClassVar[str] = "sweep"
    writer: str
    paths: tuple[str, ...] = ()
    digests: tuple[Digest, ...] = ()

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)
        for path in self.paths:
            parts = path.split("/")
            if any(_PART.fullmatch(part) is None or part in (".", "..") for part in parts):
                raise ConfigError(field="paths", why=f"{path[:80]!r} is no path in the repository")

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {
            "kind": self.kind,
            "writer": self.writer,
            "paths": list(self.paths),
            "digests": [str(digest) for digest in self.digests],
        }

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "sweep") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            return cls(
                writer=fields.text("writer"),
                paths=fields.texts("paths"),
                digests=tuple(map(Digest.parse, fields.texts("digests"))),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The log's state before this entry, as `plan.commit` writes it."""

    kind: ClassVar[str] = "snapshot"
    writer: str
    state: JsonValue

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {"kind": self.kind, "writer": self.writer, "state": self.state}

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "snapshot") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            return cls(writer=fields.text("writer"), state=fields.value("state"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """A checkpoint is stored otherwise, and is the same: `commit.replaces` is where it was.

    Attributes:
        writer: who does it; no claim is needed, since no head moves.
        commit: that of the new files.
    """

    kind: ClassVar[str] = "rewrite"
    writer: str
    commit: Commit

    def __post_init__(self) -> None:
        _check_nonce("writer", self.writer)

    def to_json(self) -> dict[str, JsonValue]:
        """What `from_json` takes."""
        return {"kind": self.kind, "writer": self.writer, "commit": self.commit.to_json()}

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str = "rewrite") -> Self:
        """Read it back; a breach of the format is a ManifestError that names `path`."""
        with Fields(value, path=path) as fields:
            fields.expect("kind", cls.kind)
            commit = Commit.from_json(fields.value("commit"), path=path)
            return cls(writer=fields.text("writer"), commit=commit)


EntryBody: TypeAlias = Claim | Commit | Rewrite | Fork | Tag | Retire | Sweep | Snapshot
_KINDS: dict[str, type[EntryBody]] = {
    cls.kind: cls for cls in (Claim, Commit, Rewrite, Fork, Tag, Retire, Sweep, Snapshot)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the log.

    Attributes:
        number: its place; the first is 1.
        timestamp: UTC, ISO 8601 with `Z`; for people and retention, it orders nothing.
    """

    number: int
    timestamp: str
    body: EntryBody

    def __post_init__(self) -> None:
        _check_count("number", self.number, 1)
        if _TIMESTAMP.fullmatch(self.timestamp) is None:
            raise ConfigError(field="timestamp", why="is not UTC in ISO 8601 with a 'Z'")

    def to_bytes(self) -> bytes:
        """The file's content: the same bytes for the same entry."""
        head: dict[str, JsonValue] = {
            "format_version": FORMAT_VERSION,
            "number": self.number,
            "timestamp": self.timestamp,
        }
        return dump_json(head | self.body.to_json()) + b"\n"

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """Read an entry, whoever wrote it.

        Raises:
            FormatVersionError: a newer ckptcoord wrote it.
            ManifestError: it breaks the format; says which field and why.
        """
        document = parse_json(data, path=path, max_bytes=MAX_SNAPSHOT_BYTES)
        if not isinstance(document, dict):
            raise ManifestError(path=path, why="is not a JSON object")
        _check_version(document.pop("format_version", None), path)
        number, timestamp = document.pop("number", None), document.pop("timestamp", None)
        kind = document.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ManifestError(path=path, why=f"kind: {str(kind)[:40]!r} is unknown")
        body = _KINDS[kind].from_json(document, path=path)
        with Fields({"number": number, "timestamp": timestamp}, path=path) as fields:
            return cls(
                number=fields.integer("number"), timestamp=fields.text("timestamp"), body=body
            )


def timestamp_of(moment: datetime) -> str:
    """The form of an aware time in an entry: UTC, ISO 8601 with `Z`."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _check_version(version: JsonValue, path: str) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ManifestError(path=path, why="format_version: is not a positive integer")
    if version > FORMAT_VERSION:
        raise FormatVersionError(path=path, found=version, supported=FORMAT_VERSION)


def _check_nonce(name: str, text: str) -> None:
    if _NONCE.fullmatch(text) is None:
        raise InvalidNameError(kind=name, name=text, why="is not 32 hex digits")


def check_folder(field: str, text: str, checkpoint_id: CheckpointId) -> None:
    """Only a checkpoint's own folder can be its: gc deletes what an entry names.

    Raises:
        ConfigError: it is neither the id's nor that with eight digits of an attempt.
    """
    own = str(checkpoint_id)
    if text != own and (text[:-9] != own or _BESIDE.fullmatch(text[-9:]) is None):
        raise ConfigError(field=field, why=f"{text[:80]!r} cannot be the folder of {own}")


def _check_needs(needs: tuple[str, ...], own: str) -> None:
    for folder in needs:
        if not is_checkpoint_folder(folder) or folder == own:
            why = f"{folder[:80]!r} is not the folder of another checkpoint"
            raise ConfigError(field="needs", why=why)
    if list(needs) != sorted(set(needs)):
        raise ConfigError(field="needs", why="is not sorted, or names a folder twice")


def _timing(given: Mapping[str, JsonValue]) -> dict[str, float]:
    """Seconds as floats, counts as integers: what `to_json` makes of them."""
    timing = {
        name: number
        for name, number in given.items()
        if isinstance(number, int if name in _COUNTS else float)
    }
    if len(timing) < len(given):
        raise ConfigError(field="timing", why="is not floats, and integers for rank and queue")
    return timing


def _check_timing(timing: Mapping[str, float]) -> None:
    for name, number in timing.items():
        if name in _COUNTS:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ConfigError(field=f"timing.{name}", why="is not an integer")
            least, most = _COUNTS[name]
            if not least <= number <= most:
                raise ConfigError(field=f"timing.{name}", why=f"is not from {least} to {most}")
        elif name not in SECONDS:
            raise ConfigError(field="timing", why=f"{name[:80]!r} is unknown")
        elif isinstance(number, bool) or not 0 <= number <= MAX_SECONDS:  # nor is a NaN
            why = f"is not seconds from 0 to {MAX_SECONDS:,.0f}"
            raise ConfigError(field=f"timing.{name}", why=why)


def _check_count(name: str, count: int, least: int) -> None:
    if not least <= count <= MAX_SIZE_BYTES:
        raise ConfigError(field=name, why=f"{count} is not from {least} to {MAX_SIZE_BYTES}")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(field=name, why="is no Unicode text") from error
    if len(text) > MAX_TEXT:
        raise ConfigError(field=name, why=f"has over {MAX_TEXT:,} characters")
