"""What the log says, and what may be said next: a transition table by kind of entry (INV-2).

Pure: the log's reader replays entries into a LogState, its writer asks `refusal` before it appends.
What stands in the log is applied without a question; the table guards the way in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar, assert_never

from ckptcoord.core.entries import (
    Claim,
    Commit,
    Entry,
    Fork,
    Retire,
    Rewrite,
    Snapshot,
    Sweep,
    Tag,
)
from ckptcoord.core.fields import Fields
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.errors import (
    AttemptSweptError,
    BaseGoneError,
    BranchExistsError,
    CheckpointExistsError,
    CheckpointInUseError,
    CkptError,
    ConfigError,
    FencedError,
    ManifestError,
    RefNotFoundError,
)
from ckptcoord.plan.lookup import head, latest, nearest, newest_on, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptcoord.core.entries import EntryBody
    from ckptcoord.core.jsonio import JsonValue

__all__ = [
    "MAX_SWEPT",
    "SNAPSHOT_EVERY",
    "STAGING",
    "LogState",
    "Retired",
    "Stamp",
    "apply",
    "branches",
    "folder_users",
    "head",
    "latest",
    "live_folders",
    "nearest",
    "needed_by",
    "next_epoch",
    "parent_of",
    "refusal",
    "replay",
    "resolve",
    "snapshot_of",
    "state_from_snapshot",
    "taken_folders",
]

SNAPSHOT_EVERY = 128
MAX_SWEPT = 1000
STAGING = ".ckptcoord/staging"
_NONCE = re.compile(r"[0-9a-f]{32}")
_ATTEMPT = re.compile(rf"{re.escape(STAGING)}/([0-9a-f]{{32}})")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Where and when a commit stands in the log."""

    number: int
    timestamp: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A checkpoint that was dropped and not swept yet, with the entry that dropped it."""

    commit: Commit
    stamp: Stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """What all entries up to a number say together (INV-3).

    Attributes:
        number: of the last entry; 0 for an empty log.
        claims: the newest of each branch.
        commits: the checkpoints that exist; their timing stands in the log's entries alone.
        stamps: where each of them stands in the log.
        tags: what each tag names.
        forks: where each forked branch begins.
        retired: by folder, the checkpoints that were dropped or replaced and not swept since. Their
            files are still there, and live checkpoints may need them.
        swept: the newest attempts whose files were swept, oldest first, at most `MAX_SWEPT`.
    """

    number: int = 0
    claims: Mapping[BranchName, Claim] = field(default_factory=dict)
    commits: Mapping[CheckpointId, Commit] = field(default_factory=dict)
    stamps: Mapping[CheckpointId, Stamp] = field(default_factory=dict)
    tags: Mapping[TagName, CheckpointId] = field(default_factory=dict)
    forks: Mapping[BranchName, Fork] = field(default_factory=dict)
    retired: Mapping[str, Retired] = field(default_factory=dict)
    swept: tuple[str, ...] = ()


class _Replay:
    """A LogState in the making: copied once, then changed in place by any number of entries."""

    def __init__(self, state: LogState) -> None:
        self.number = state.number
        self.claims = dict(state.claims)
        self.commits = dict(state.commits)
        self.stamps = dict(state.stamps)
        self.tags = dict(state.tags)
        self.forks = dict(state.forks)
        self.retired = dict(state.retired)
        self.swept = dict.fromkeys(state.swept)

    def add(self, entry: Entry) -> None:  # noqa: C901, PLR0912 (a line for each kind)
        """Take the next entry into account."""
        _check_next(self.number, entry)
        self.number = entry.number
        body = entry.body
        stamp = Stamp(number=entry.number, timestamp=entry.timestamp)
        match body:
            case Claim():
                self.claims[body.branch] = body
            case Commit():
                self._commit(body, stamp)
            case Rewrite():
                self._rewrite(body.commit, stamp)
            case Fork():
                self.forks[body.branch] = body
            case Tag():
                self._tag(body)
            case Retire():
                self._retire(body, stamp)
            case Sweep():
                self._sweep(body)
            case Snapshot():
                pass
            case _:
                assert_never(body)

    def _commit(self, commit: Commit, stamp: Stamp) -> None:
        self._drop(commit.checkpoint_id, stamp)
        self.commits[commit.checkpoint_id] = _lean(commit)
        self.stamps[commit.checkpoint_id] = stamp
        self.retired.pop(commit.path, None)

    def _rewrite(self, commit: Commit, stamp: Stamp) -> None:
        """Other files, the same place in history."""
        old = self.commits.get(commit.checkpoint_id)
        if old is not None:
            self.retired[old.path] = Retired(commit=old, stamp=stamp)
            self.commits[commit.checkpoint_id] = _lean(commit)
            self.retired.pop(commit.path, None)

    def _tag(self, tag: Tag) -> None:
        if tag.target is None:
            self.tags.pop(tag.name, None)
        else:
            self.tags[tag.name] = tag.target

    def _retire(self, retire: Retire, stamp: Stamp) -> None:
        for checkpoint_id in retire.checkpoint_ids:
            self._drop(checkpoint_id, stamp)

    def _drop(self, checkpoint_id: CheckpointId, stamp: Stamp) -> None:
        commit = self.commits.pop(checkpoint_id, None)
        self.stamps.pop(checkpoint_id, None)
        if commit is not None:
            self.retired[commit.path] = Retired(commit=commit, stamp=stamp)

    def _sweep(self, sweep: Sweep) -> None:
        for path in sweep.paths:
            retired = self.retired.pop(path.split("/")[0], None)
            match = _ATTEMPT.fullmatch(path)
            if retired is not None:
                self.swept[retired.commit.attempt] = None
            elif match is not None:
                self.swept[match[1]] = None
        while len(self.swept) > MAX_SWEPT:
            del self.swept[next(iter(self.swept))]

    def state(self) -> LogState:
        return LogState(
            number=self.number,
            claims=self.claims,
            commits=self.commits,
            stamps=self.stamps,
            tags=self.tags,
            forks=self.forks,
            retired=self.retired,
            swept=tuple(self.swept),
        )


def _lean(commit: Commit) -> Commit:
    """Without what only `log --timing` asks for: every process reads all commits as it starts."""
    return replace(commit, timing={}) if commit.timing else commit


def _check_next(number: int, entry: Entry) -> None:
    if entry.number != number + 1:
        raise ManifestError(path=f"log entry {entry.number}", why=f"does not follow entry {number}")


def apply(state: LogState, entry: Entry) -> LogState:
    """The state after one more entry.

    Raises:
        ManifestError: the entry's number is not the next.
    """
    return replay(state, (entry,))


def replay(state: LogState, entries: Iterable[Entry]) -> LogState:
    """The state after several more entries, for one copy of it.

    Raises:
        ManifestError: their numbers are not the next ones.
    """
    building = _Replay(state)
    for entry in entries:
        building.add(entry)
    return building.state()


# --- what may be appended ------------------------------------------------------------------------


def refusal(state: LogState, entry: Entry) -> CkptError | None:
    """Why this entry may not be appended next; None when it may."""
    if entry.number != state.number + 1:
        return ManifestError(
            path=f"log entry {entry.number}", why=f"does not follow entry {state.number}"
        )
    body = entry.body
    if (entry.number % SNAPSHOT_EVERY == 0) != isinstance(body, Snapshot):
        return ConfigError(
            field="number", why=f"a {body.kind} cannot be entry {entry.number} of the log"
        )
    return _refuse_body(state, body)


def _refuse_body(  # noqa: C901, PLR0912 (a line for each kind)
    state: LogState, body: EntryBody
) -> CkptError | None:
    """The table: which rule guards which kind."""
    match body:
        case Claim():
            refused = _refuse_claim(state, body)
        case Commit():
            refused = _refuse_commit(state, body)
        case Rewrite():
            refused = _refuse_rewrite(state, body.commit)
        case Fork():
            refused = _refuse_fork(state, body)
        case Tag():
            refused = _refuse_tag(state, body)
        case Retire():
            refused = _refuse_retire(state, body)
        case Sweep():
            refused = _refuse_sweep(state, body)
        case Snapshot():
            refused = _refuse_snapshot(state, body)
        case _:
            assert_never(body)
    return refused


def _refuse_claim(state: LogState, claim: Claim) -> CkptError | None:
    following = next_epoch(state, claim.branch)
    if claim.epoch == following:
        return None
    if claim.epoch < following:
        return _fenced(state, claim.branch, claim.writer)
    return ConfigError(field="epoch", why=f"{claim.epoch} skips epoch {following}")


def _refuse_commit(state: LogState, commit: Commit) -> CkptError | None:
    branch = commit.checkpoint_id.branch
    claim = state.claims.get(branch)
    # INV-2 (docs/protocol.md): only the newest claimant of a branch commits there.
    if claim is None or (claim.writer, claim.epoch) != (commit.writer, commit.epoch):
        return _fenced(state, branch, commit.writer)
    standing = state.commits.get(commit.checkpoint_id)
    if standing is not None and commit.replaces != standing.path:
        return CheckpointExistsError(checkpoint_id=str(commit.checkpoint_id))
    return _refuse_files(state, commit)


def _refuse_rewrite(state: LogState, commit: Commit) -> CkptError | None:
    """It takes the place of what stands there, and says the same of it."""
    unknown = _refuse_unknown(state, commit.checkpoint_id)
    if unknown is not None:
        return unknown
    old = state.commits[commit.checkpoint_id]
    if commit.replaces != old.path:
        return CheckpointInUseError(
            checkpoint_id=str(commit.checkpoint_id), used_by="another save of it, made meanwhile"
        )
    for name in ("parent", "epoch", "size_bytes", "metrics", "message"):
        if getattr(commit, name) != getattr(old, name):
            return ConfigError(field=name, why="differs from the checkpoint that is rewritten")
    return _refuse_files(state, commit)


def _refuse_files(state: LogState, commit: Commit) -> CkptError | None:
    """INV-4, INV-5: its folder is nobody else's, and what it needs is still there."""
    checkpoint_id = str(commit.checkpoint_id)
    if commit.attempt in state.swept:
        return AttemptSweptError(checkpoint_id=checkpoint_id, attempt=commit.attempt)
    taken = taken_folders(state)
    if commit.path in taken:  # not even one's own
        return CheckpointInUseError(
            checkpoint_id=f"the folder {commit.path}", used_by=_user_of(state, commit.path)
        )
    gone = next((folder for folder in commit.needs if folder not in taken), None)
    if gone is not None:
        return BaseGoneError(checkpoint_id=checkpoint_id, folder=gone)
    return None


def _refuse_fork(state: LogState, fork: Fork) -> CkptError | None:
    if fork.branch in branches(state):
        return BranchExistsError(branch=str(fork.branch))
    return _refuse_unknown(state, fork.source)


def _refuse_tag(state: LogState, tag: Tag) -> CkptError | None:
    if tag.target is not None:
        return _refuse_unknown(state, tag.target)
    if tag.name not in state.tags:
        return RefNotFoundError(ref=str(tag.name), nearest=nearest(state, str(tag.name)))
    return None


def _refuse_retire(state: LogState, retire: Retire) -> CkptError | None:
    used = {target: f"the tag {str(name)!r}" for name, target in sorted(state.tags.items())}
    for branch, fork in sorted(state.forks.items(), key=lambda item: item[0]):
        if newest_on(state, branch) is None:
            used.setdefault(fork.source, f"the branch {str(branch)!r}, which has only that yet")
    for checkpoint_id in retire.checkpoint_ids:
        unknown = _refuse_unknown(state, checkpoint_id)
        if unknown is not None:
            return unknown
        if checkpoint_id in used:
            return CheckpointInUseError(
                checkpoint_id=str(checkpoint_id), used_by=used[checkpoint_id]
            )
    return None


def _refuse_sweep(state: LogState, sweep: Sweep) -> CkptError | None:
    """INV-5: no folder that a live checkpoint is or needs, nothing in it and nothing around it."""
    live, attempts = live_folders(state), {c.attempt: c for c in state.commits.values()}
    for path in sweep.paths:
        folder, match = path.split("/")[0], _ATTEMPT.fullmatch(path)
        if folder in live:
            return CheckpointInUseError(checkpoint_id=path, used_by=_user_of(state, folder))
        if match is not None and match[1] in attempts:
            owner = attempts[match[1]].checkpoint_id
            return CheckpointInUseError(checkpoint_id=path, used_by=f"the commit of {owner}")
    return None


def _refuse_snapshot(state: LogState, snapshot: Snapshot) -> CkptError | None:
    if snapshot.state != snapshot_of(state):
        return ManifestError(
            path=f"log entry {state.number + 1}", why="is no snapshot of the entries before it"
        )
    return None


def _refuse_unknown(state: LogState, checkpoint_id: CheckpointId) -> CkptError | None:
    if checkpoint_id in state.commits:
        return None
    return RefNotFoundError(ref=checkpoint_id.ref, nearest=nearest(state, checkpoint_id))


def _fenced(state: LogState, branch: BranchName, writer: str) -> FencedError:
    claim = state.claims.get(branch)
    return FencedError(
        branch=str(branch),
        writer=writer,
        holder=claim.writer if claim else "nobody",
        epoch=claim.epoch if claim else 0,
        host=claim.host if claim else None,
    )


def _user_of(state: LogState, folder: str) -> str:
    """Who is or needs a taken folder, in words."""
    for commit in state.commits.values():
        if commit.path == folder:
            return f"the commit of {commit.checkpoint_id}"
    needing = needed_by(state, folder)
    if needing:
        return f"{needing[0].ref}, whose deltas need it"
    return f"the retired {state.retired[folder].commit.checkpoint_id}, which was not swept yet"


# --- what a writer needs to know -----------------------------------------------------------------


def branches(state: LogState) -> tuple[BranchName, ...]:
    """Every branch that was claimed, forked or committed to, sorted."""
    committed = {checkpoint_id.branch for checkpoint_id in state.commits}
    return tuple(sorted(committed | state.forks.keys() | state.claims.keys()))


def live_folders(state: LogState) -> frozenset[str]:
    """The folders that live checkpoints are or need; they are never swept (INV-5)."""
    commits = state.commits.values()
    return frozenset(c.path for c in commits).union(*(c.needs for c in commits))


def taken_folders(state: LogState) -> frozenset[str]:
    """The folders that no save may put its files at.

    Until it is swept, a retired checkpoint may be the base of a save that is under way.
    """
    return live_folders(state) | state.retired.keys()


def needed_by(state: LogState, folder: str) -> tuple[CheckpointId, ...]:
    """The live checkpoints that need a folder which is not their own, sorted."""
    return tuple(sorted(i for i, commit in state.commits.items() if folder in commit.needs))


def folder_users(state: LogState) -> dict[str, tuple[CheckpointId, ...]]:
    """`needed_by` of every folder that any live checkpoint needs, at once."""
    found: dict[str, list[CheckpointId]] = {}
    for checkpoint_id, commit in sorted(state.commits.items()):
        for folder in commit.needs:
            found.setdefault(folder, []).append(checkpoint_id)
    return {folder: tuple(users) for folder, users in found.items()}


def next_epoch(state: LogState, branch: BranchName) -> int:
    """The epoch of the next claim on a branch."""
    claim = state.claims.get(branch)
    return claim.epoch + 1 if claim else 1


def parent_of(state: LogState, checkpoint_id: CheckpointId) -> CheckpointId | None:
    """The parent of a commit of this id: its branch's head, or where that was forked.

    A commit over a standing one keeps the parent of that.
    """
    standing = state.commits.get(checkpoint_id)
    if standing is not None:
        return standing.parent
    before = head(state, checkpoint_id.branch)
    return before.checkpoint_id if before else None


# --- snapshots -----------------------------------------------------------------------------------


def snapshot_of(state: LogState) -> JsonValue:
    """The state as a JSON value; equal states give equal values."""
    placed = sorted(state.stamps.items(), key=lambda item: item[1].number)
    commits: list[JsonValue] = [
        _placed_json(stamp, state.commits[checkpoint_id]) for checkpoint_id, stamp in placed
    ]
    return {
        "number": state.number,
        "claims": [claim.to_json() for _, claim in _by_branch(state.claims)],
        "commits": commits,
        "tags": {str(name): str(target) for name, target in sorted(state.tags.items())},
        "forks": [fork.to_json() for _, fork in _by_branch(state.forks)],
        "retired": [
            _placed_json(one.stamp, one.commit)
            for one in sorted(
                state.retired.values(), key=lambda one: (one.stamp.number, one.commit.path)
            )
        ],
        "swept": list(state.swept),
    }


def state_from_snapshot(value: JsonValue, *, path: str) -> LogState:
    """The state that `snapshot_of` was given.

    Raises:
        ManifestError: the value breaks the format; names `path`.
    """
    with Fields(value, path=path) as fields:
        number = fields.integer("number")
        claims = [Claim.from_json(item, path=path) for item in fields.items("claims")]
        forks = [Fork.from_json(item, path=path) for item in fields.items("forks")]
        placed = [_Placed.from_json(item, path=path) for item in fields.items("commits")]
        return LogState(
            number=number,
            claims={claim.branch: claim for claim in claims},
            commits={item.commit.checkpoint_id: item.commit for item in placed},
            stamps={item.commit.checkpoint_id: item.stamp for item in placed},
            tags={
                TagName(name): CheckpointId.parse(target)
                for name, target in fields.text_items("tags")
            },
            forks={fork.branch: fork for fork in forks},
            retired={
                item.commit.path: Retired(commit=item.commit, stamp=item.stamp)
                for item in (_Placed.from_json(item, path=path) for item in fields.items("retired"))
            },
            swept=_swept(fields.texts("swept")),
        )


def _swept(attempts: tuple[str, ...]) -> tuple[str, ...]:
    if len(attempts) > MAX_SWEPT or not all(map(_NONCE.fullmatch, attempts)):
        raise ConfigError(field="swept", why="is not a list of attempts")
    return attempts


def _placed_json(stamp: Stamp, commit: Commit) -> JsonValue:
    return {"number": stamp.number, "timestamp": stamp.timestamp, "commit": commit.to_json()}


def _by_branch(values: Mapping[BranchName, _T]) -> list[tuple[BranchName, _T]]:
    return sorted(values.items(), key=lambda item: item[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    stamp: Stamp
    commit: Commit

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str) -> Self:
        with Fields(value, path=path) as fields:
            stamp = Stamp(number=fields.integer("number"), timestamp=fields.text("timestamp"))
            commit = Commit.from_json(fields.value("commit"), path=path)
            if commit.timing:
                raise ConfigError(field="timing", why="does not belong in a snapshot")
            return cls(stamp=stamp, commit=commit)
