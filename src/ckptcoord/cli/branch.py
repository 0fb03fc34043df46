"""`ckptcoord branch`: where the branches stand; begin one, or retire what was made on one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.cli.asking import name_and_ref, nonce, only_name
from ckptcoord.cli.dropping import Consent, Drop, carry_out
from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.text import Style, ago, aligned, counted, printable
from ckptcoord.core.refs import BranchName, TagName, checked_name
from ckptcoord.errors import BranchExistsError, ConfigError, RefNotFoundError
from ckptcoord.plan.commit import branches
from ckptcoord.plan.dropping import HeldBy, counts, holds, own_of
from ckptcoord.plan.lookup import head, latest, nearest
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """Where a branch stands.

    Attributes:
        at: its newest checkpoint, or where it begins; None where that was dropped.
        ahead: how many checkpoints were made on it.
        source: where it was forked; None for one that was not.
        is_latest: the newest checkpoint of all is on it.
    """

    name: str
    at: CheckpointId | None
    ahead: int
    source: CheckpointId | None
    is_latest: bool


def run(out: Output, root: Path, words: Sequence[str]) -> int:
    """List the branches, or begin one: `NAME [REF]`.

    Raises:
        InvalidNameError: the name can be none.
        BranchExistsError: there is such a branch.
        ConfigError: it is a tag's name, or there are too many words.
        RefNotFoundError: there is no such checkpoint.
        CkptError: the repository cannot be read, or its log not appended to.
    """
    asked = name_and_ref("branch", words)
    repository = open_repository(root)
    state = repository.state()
    if asked is None:
        found = _branches(state)
        if out.as_json:
            out.data({"repository": repository.url, "branches": _documents(state, found)})
        else:
            out.lines(_lines(out, state, found))
        return 0
    name = new_branch(state, asked[0])
    source = find_commit(state, root, asked[1]).checkpoint_id
    repository.fork(name, source, writer=nonce())
    if out.as_json:
        out.data({"repository": repository.url, "branch": str(name), "from": source.ref})
    else:
        out.note(f"{name} begins at {source.ref}")
    return 0


def new_branch(state: LogState, text: str) -> BranchName:
    """The name of a branch that is to be begun.

    Raises:
        InvalidNameError: it can be none.
        BranchExistsError: there is such a branch.
        ConfigError: it is a tag's name.
    """
    name = BranchName(checked_name("branch", text))
    if name in branches(state):
        raise BranchExistsError(branch=text)
    if TagName(text) in state.tags:
        why = f"{text!r} is a tag, which would hide the branch"
        raise ConfigError(field="branch", why=why, help="Choose another name")
    return name


def retire_branch(out: Output, root: Path, words: Sequence[str], consent: Consent) -> int:
    """Retire what was made on a branch, but for what a tag names or another branch begins at.

    Raises:
        ConfigError: there is not one name, or there is nobody to ask and no `-y`.
        RefNotFoundError: there is no such branch.
        CkptError: the repository cannot be read, or its log not appended to.
    """
    text = only_name("branch", words)
    consent.require(out)
    repository = open_repository(root)
    state = repository.state()
    name = BranchName(text)
    if name not in branches(state):
        raise RefNotFoundError(ref=text, nearest=nearest(state, text))
    own = own_of(state, name)
    kept = {one.checkpoint_id: str(one) for one in holds(state, own) if one.by is not HeldBy.HEAD}
    ids = tuple(one for one in own if one not in kept)
    drop = Drop(ids=ids, kept=tuple(kept.items()), reason=f"branch -d {name}")
    done = carry_out(out, repository, state, drop, consent)
    if not out.as_json and (done or not own):
        out.note(f"the name {name} stays taken")
    return 0


def _branches(state: LogState) -> list[_Branch]:
    own, newest = counts(state), latest(state)
    return [
        _Branch(
            name=str(name),
            at=at.checkpoint_id if (at := head(state, name)) else None,
            ahead=own[name],
            source=state.forks[name].source if name in state.forks else None,
            is_latest=newest is not None and newest.checkpoint_id.branch == name,
        )
        for name in branches(state)
    ]


def _lines(out: Output, state: LogState, found: list[_Branch]) -> list[str]:
    """Marked as in git where `latest` is; into a pipe name, head, step, time, ahead, source."""
    if not out.terminal:
        return ["\t".join(_cells(state, one)) for one in found]
    rows: list[tuple[str, ...]] = [
        (
            f"{'*' if one.is_latest else ' '} {one.name}",
            one.at.ref if one.at else "-",
            ago(state.stamps[one.at].timestamp, out.now) if one.at else "",
            counted(one.ahead, "checkpoint") + (" ahead of" if one.source else ""),
            one.source.ref if one.source else "",
        )
        for one in found
    ]
    paint = out.paint
    return [
        "  ".join((paint(name, Style.GREEN), paint(at, Style.YELLOW), *rest)).rstrip()
        for name, at, *rest in aligned(rows)
    ]


def _cells(state: LogState, one: _Branch) -> tuple[str, ...]:
    at, source = one.at, one.source
    where = (at.ref, str(at.step), printable(state.stamps[at].timestamp)) if at else ("", "", "")
    return one.name, *where, str(one.ahead), source.ref if source else ""


def _documents(state: LogState, found: list[_Branch]) -> list[dict[str, object]]:
    return [
        {
            "branch": one.name,
            "head": None if one.at is None else one.at.ref,
            "step": None if one.at is None else one.at.step,
            "timestamp": None if one.at is None else state.stamps[one.at].timestamp,
            "ahead": one.ahead,
            "from": None if one.source is None else one.source.ref,
            "latest": one.is_latest,
        }
        for one in found
    ]
