"""Dropping checkpoints from the log, and deleting what no checkpoint needs (INV-5).

Nothing is deleted before a `sweep` entry has named it. The log refuses a sweep of what a live
checkpoint is or needs, and after a sweep it refuses a commit of the swept attempt and one that
needs a swept folder. So whatever runs beside gc, the order of the log decides, and the ages here
only spare saves and loads that are still at work.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.entries import Retire, Sweep
from ckptcoord.core.jsonio import parse_json
from ckptcoord.core.manifest_fields import MANIFEST_NAME, MAX_MANIFEST_BYTES
from ckptcoord.core.refs import is_checkpoint_folder
from ckptcoord.errors import CkptError, MissingFileError, StorageError
from ckptcoord.plan.commit import STAGING
from ckptcoord.plan.retention import surplus
from ckptcoord.plan.sweeping import ASIDE, Doomed, Folder, GcPlan, Listing, Why, is_staged, plan_gc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

    from ckptcoord.core.refs import BranchName
    from ckptcoord.plan.commit import LogState
    from ckptcoord.plan.retention import Retention
    from ckptcoord.repo.repository import Repository
    from ckptcoord.store.base import Store

DEFAULT_GRACE_S = 3600.0
_BATCH = 200
_MAX_RETIRED_AT_ONCE = 1000
_NONCE = re.compile(r"[0-9a-f]{32}")
# A save's, or what a killed `create_store` has left of its probe.
_STAGED = re.compile(r"([0-9a-f]{32})(-debris|-swept)?|\.writable-[0-9a-f]{16}")

Changed: TypeAlias = "Callable[[str], float | None]"
"""When a folder of the repository last changed, in seconds since 1970; None: nobody can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GcResult:
    """What became of a plan.

    Attributes:
        spared: what came to belong to somebody since the plan was made.
        failed: what the storage would not delete or move; the next gc tries again.
    """

    plan: GcPlan
    deleted: tuple[Doomed, ...] = ()
    spared: tuple[Doomed, ...] = ()
    failed: tuple[tuple[str, CkptError], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gc:
    """A plan with all that it was made from."""

    listing: Listing
    now: datetime
    grace_s: float
    plan: GcPlan


# --- looking -------------------------------------------------------------------------------------


def local_times(repository: Repository) -> Changed:
    """When folders of a local repository changed; of any other, nobody can tell."""
    root = Path(repository.url)

    def changed(path: str) -> float | None:
        try:
            return (root / path).lstat().st_mtime
        except OSError:
            return None

    return changed


def survey(
    repository: Repository, changed: Changed, state: LogState, *, staging_only: bool = False
) -> Listing:
    """Look at every folder that no live checkpoint of this state is.

    Raises:
        StorageError: a folder cannot be listed.
    """
    store = repository.store
    paths = [
        f"{STAGING}/{entry.name}"
        for entry in store.list(STAGING)
        if entry.is_dir and _STAGED.fullmatch(entry.name)
    ]
    if staging_only:
        return Listing(names=None, folders=tuple(_look(store, path, changed) for path in paths))
    entries = store.list("")
    live = {commit.path for commit in state.commits.values()}
    paths += [
        entry.name
        for entry in entries
        if entry.is_dir and is_checkpoint_folder(entry.name) and entry.name not in live
    ]
    return Listing(
        names=frozenset(entry.name for entry in entries),
        folders=tuple(_look(store, path, changed) for path in paths),
    )


def _look(store: Store, path: str, changed: Changed) -> Folder:
    unreadable, attempt, size_bytes = "", None, 0
    try:
        size_bytes = folder_bytes(store, path)
        attempt = _attempt_in(store, path)
    except CkptError as error:
        unreadable = error.what
    own = _STAGED.fullmatch(path.removeprefix(f"{STAGING}/"))
    if own is not None and own[2] is None:
        attempt = own[1]
    return Folder(
        path=path,
        attempt=attempt,
        unreadable=unreadable,
        changed_s=changed(path),
        size_bytes=size_bytes,
    )


def folder_bytes(store: Store, path: str) -> int:
    """The bytes of all files in a folder and below.

    Raises:
        StorageError: it cannot be listed.
    """
    size_bytes, left = 0, [path]
    while left:
        folder = left.pop()
        for entry in store.list(folder):
            size_bytes += entry.size_bytes
            if entry.is_dir:
                left.append(f"{folder}/{entry.name}")
    return size_bytes


def _attempt_in(store: Store, folder: str) -> str | None:
    """Whose files a folder holds, by its manifest; None where it has none.

    Raises:
        CkptError: there is one, and it cannot be read.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        data = store.read(path, limit_bytes=MAX_MANIFEST_BYTES)
    except MissingFileError:
        return None
    document = parse_json(data, path=path, max_bytes=MAX_MANIFEST_BYTES)
    attempt = document.get("attempt") if isinstance(document, dict) else None
    if not isinstance(attempt, str) or _NONCE.fullmatch(attempt) is None:
        raise CkptError(what=f"{path}: names no attempt")
    return attempt


# --- doing ---------------------------------------------------------------------------------------


def prepare_gc(
    repository: Repository,
    *,
    now: datetime,
    changed: Changed,
    grace_s: float = DEFAULT_GRACE_S,
    staging_only: bool = False,
    state: LogState | None = None,
) -> Gc:
    """Find out what a gc would do.

    Args:
        repository: where.
        now: what ages are counted from.
        changed: when folders changed, see `local_times`.
        grace_s: what was retired or touched less than so many seconds ago stays.
        staging_only: leave everything but unfinished saves alone.
        state: take this for what the log says.

    Raises:
        CkptError: the log or the repository's folder cannot be read.
    """
    before = repository.state() if state is None else state
    listing = survey(repository, changed, before, staging_only=staging_only)
    plan = plan_gc(
        repository.state() if state is None else state, listing, now=now, grace_s=grace_s
    )
    return Gc(listing=listing, now=now, grace_s=grace_s, plan=plan)


def run_gc(repository: Repository, gc: Gc, *, writer: str) -> GcResult:
    """Do what `gc.plan` says, as far as the log still allows it.

    Raises:
        CkptError: the log cannot be read or appended to.
    """
    deleted: list[Doomed] = []
    failed: list[tuple[str, CkptError]] = []
    for restored in gc.plan.restored:
        with _noting(failed, restored.path):
            if not repository.store.exists(restored.target):
                repository.store.move_dir(restored.path, restored.target)
    for batch in _batches(gc.plan.doomed):
        for doomed in _announce(repository, gc, batch, writer):
            with _noting(failed, doomed.path):
                if _delete(repository.store, doomed):
                    deleted.append(doomed)
    broken = {path for path, _ in failed}
    spared = (one for one in gc.plan.doomed if one not in deleted and one.path not in broken)
    return GcResult(
        plan=gc.plan, deleted=tuple(deleted), spared=tuple(spared), failed=tuple(failed)
    )


def retain(
    repository: Repository,
    branch: BranchName,
    rules: Retention,
    *,
    writer: str,
    now: datetime,
    changed: Changed,
) -> GcResult:
    """What a save leaves behind it: the rules applied to its branch, and dead saves swept.

    What is retired now is deleted by the next call, so that a load that has begun has a save's
    time to end (INV-5). Without rules, only unfinished saves are looked at.

    Raises:
        CkptError: the log or the storage refused; what is not deleted is tried again by the next
            call.
    """
    gc = prepare_gc(
        repository, now=now, changed=changed, grace_s=0, staging_only=not rules.has_rules
    )
    result = run_gc(repository, gc, writer=writer)
    for _, error in result.failed:
        raise error
    _retire(repository, branch, rules, writer=writer, now=now)
    return result


def _retire(
    repository: Repository, branch: BranchName, rules: Retention, *, writer: str, now: datetime
) -> None:
    def make(state: LogState) -> Retire:
        doomed = surplus(state, branch, rules, now)[:_MAX_RETIRED_AT_ONCE]
        if not doomed:
            raise _NothingError
        return Retire(writer=writer, checkpoint_ids=doomed, reason=str(rules))

    with suppress(_NothingError):
        repository.log.append(make)


class _NothingError(Exception):
    """There is nothing to append."""


@contextmanager
def _noting(failed: list[tuple[str, CkptError]], path: str) -> Iterator[None]:
    """Note the error of one folder; the others have nothing to do with it."""
    try:
        yield
    except CkptError as error:
        failed.append((path, error))


def _batches(doomed: tuple[Doomed, ...]) -> Iterator[tuple[Doomed, ...]]:
    """So few at a time that an entry stays small, and all of them are remembered as swept."""
    rest = iter(doomed)
    while batch := tuple(islice(rest, _BATCH)):
        yield batch


def _announce(repository: Repository, gc: Gc, batch: Iterable[Doomed], writer: str) -> list[Doomed]:
    """Append what goes, if it still may; returns that. From here on nobody commits it (INV-5)."""
    agreed: list[Doomed] = []

    def make(state: LogState) -> Sweep:
        plan = plan_gc(state, gc.listing, now=gc.now, grace_s=gc.grace_s)
        agreed[:] = [one for one in plan.doomed if one.path in wanted]
        paths = sorted({path for one in agreed for path in _swept_paths(one)})
        if not paths:
            raise _NothingError
        return Sweep(writer=writer, paths=tuple(paths))

    wanted = {one.path for one in batch}
    with suppress(_NothingError):
        repository.log.append(make)
    return agreed


def _swept_paths(doomed: Doomed) -> tuple[str, ...]:
    """What a sweep names: the folder, and the attempt that must not commit any more."""
    if doomed.why is Why.SWEPT:  # it has been named
        return ()
    if doomed.why is Why.RETIRED or doomed.attempt is None:
        return (doomed.path,)
    return (doomed.path, f"{STAGING}/{doomed.attempt}")


def _delete(store: Store, doomed: Doomed) -> bool:
    """Delete a folder, unless other files have come to stand under its name.

    It is moved out of the way first: a save could take the name, or a save that was not dead move
    the folder, while it is being emptied.
    """
    if doomed.path.endswith(ASIDE):
        store.remove_tree(doomed.path)
        return True
    if not store.exists(doomed.path):
        return True
    staged = is_staged(doomed.path)
    if not staged and _attempt_in(store, doomed.path) != doomed.attempt:
        return False
    aside = f"{STAGING}/{os.urandom(16).hex()}-swept"
    try:
        store.move_dir(doomed.path, aside)
    except StorageError:
        if store.exists(doomed.path):
            raise
        return False  # another gc was faster
    found = doomed.attempt if staged else _attempt_in(store, aside)
    if found not in (doomed.attempt, None):  # None: another gc is emptying it already
        store.move_dir(aside, doomed.path)
        return False
    store.remove_tree(aside)
    return True
