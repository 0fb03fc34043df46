"""`ckptcoord bisect`: find the checkpoint where a metric or a command turned bad."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.asking import agreed, require_somebody
from ckptcoord.cli.bisectfile import Session
from ckptcoord.cli.bisecttry import OWN, judge
from ckptcoord.cli.locate import LATEST, find_commit
from ckptcoord.cli.text import Style, counted, metrics_text, printable
from ckptcoord.errors import ConfigError, ManifestError
from ckptcoord.plan.bisection import Bisection, Verdict, line_between, line_to
from ckptcoord.plan.commit import branches
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.cli.bisectfile import SessionFile
    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import BranchName, CheckpointId
    from ckptcoord.plan.commit import LogState
    from ckptcoord.plan.condition import Condition

_UNCLEAR = 3
_STYLES = {Verdict.GOOD: Style.GREEN, Verdict.BAD: Style.RED, Verdict.SKIP: Style.YELLOW}


def start(
    out: Output,
    root: Path,
    file: SessionFile,
    *,
    ends: tuple[str | None, str | None],
    condition: Condition | None,
) -> int:
    """Begin between a good and a bad checkpoint; with a condition, go on to the answer.

    Raises:
        ConfigError: one is under way already, an end is missing, or is not what it is said to be.
        RefNotFoundError: there is no such checkpoint.
    """
    if file.read() is not None:
        raise ConfigError(
            field="bisect",
            why=f"a bisection of {file.repository} has begun already",
            help="See `ckptcoord bisect log`; forget it with `ckptcoord bisect reset`",
        )
    state = open_repository(root).state()
    good, bad = _ends(state, root, ends, condition)
    search = Bisection(line=line_between(state, good, bad))
    session = Session(
        repository=file.repository, search=search, whys={good: "the start", bad: "the start"}
    )
    if condition is not None:
        session = _by_metric(session, state, condition)
    file.write(session)
    return _report(out, root, session)


def mark(out: Output, root: Path, file: SessionFile, ref: str | None, verdict: Verdict) -> int:
    """Judge a checkpoint, by default the one that is next.

    Raises:
        ConfigError: no bisection has begun, nothing is left to judge, or it contradicts.
        RefNotFoundError: there is no such checkpoint.
    """
    session = _of(file)
    state = open_repository(root).state()
    if ref is None:
        one = session.search.next(state.commits)
        if one is None:
            raise ConfigError(field=verdict.value, why="nothing is left to judge; name a REF")
    else:
        one = find_commit(state, root, ref).checkpoint_id
    session = session.mark(one, verdict, "the user")
    file.write(session)
    return _report(out, root, session)


def run(out: Output, root: Path, file: SessionFile, words: Sequence[str]) -> int:
    """Judge by a command until the answer is there. After each answer, it is kept.

    Raises:
        ConfigError: no bisection has begun, or the command cannot be started.
        CkptError: the command ended with 128 or more, or by a signal.
    """
    repository = open_repository(root)
    before = frozenset(branches(repository.state()))
    while True:
        session, state = _of(file), repository.state()  # both may change meanwhile
        one = session.search.next(state.commits)
        if one is None:
            _note_branches(out, before, state)
            return _report(out, root, session)
        left = session.search.steps_left(state.commits)
        out.note(f"{one.ref}: trying, {counted(left, 'step')} left")
        verdict, why = judge(words, root=root, state=state, commit=state.commits[one])
        out.note(f"{one.ref}: {out.paint_note(verdict.value, _STYLES[verdict])} ({why})")
        file.write(_of(file).mark(one, verdict, why))


def log(out: Output, root: Path, file: SessionFile) -> int:
    """What has been judged, in that order, and what is next.

    Raises:
        ConfigError: no bisection has begun.
    """
    session = _of(file)
    if not out.as_json:
        out.lines(_verdict_lines(out, session))
    return _report(out, root, session)


def reset(out: Output, file: SessionFile, *, dry_run: bool, yes: bool) -> int:
    """Forget the bisection.

    Raises:
        ConfigError: there is nobody to ask, and no `-y`.
        ManifestError: the file that was named is none of a bisection here; nothing is deleted.
        StorageError: it cannot be read, or not be deleted.
    """
    try:
        session = file.read()
    except ManifestError as error:
        if file.is_given:
            raise
        # Our own, and damaged: to forget it is the way out.
        out.note(f"note: {printable(error.what)}")
        there, count = True, 0
    else:
        there, count = session is not None, len(session.search.verdicts) if session else 0
    if there:
        require_somebody(out, "bisect reset", dry_run=dry_run, yes=yes)
    done = there and not dry_run and (yes or agreed(f"Forget {counted(count, 'verdict')}?"))
    if done:
        file.delete()
    if out.as_json:
        out.data({"state_file": file.path, "dry_run": dry_run, "deleted": done})
    elif there:
        verb = "forgotten" if done else "would be forgotten" if dry_run else "kept"
        out.note(f"{counted(count, 'verdict')} {verb}")
    else:
        out.note("no bisection has begun")
    return 0


def _note_branches(out: Output, before: frozenset[BranchName], state: LogState) -> None:
    """Say what the command has left in the repository."""
    made = [str(one) for one in branches(state) if one not in before and str(one).startswith(OWN)]
    if made:
        out.note(f"note: the command has begun {', '.join(made)} (`ckptcoord branch -d NAME`)")


def _of(file: SessionFile) -> Session:
    session = file.read()
    if session is None:
        raise ConfigError(
            field="bisect",
            why=f"no bisection of {file.repository} has begun",
            help="Begin with `ckptcoord bisect start --good REF --bad REF`",
        )
    return session


def _ends(
    state: LogState,
    root: Path,
    given: tuple[str | None, str | None],
    condition: Condition | None,
) -> tuple[CheckpointId, CheckpointId]:
    """The good and the bad one; with a condition, held to it, or found by it."""
    good, bad = given
    if condition is None:
        if good is None or bad is None:
            missing = "--good" if good is None else "--bad"
            raise ConfigError(field=missing, why="is missing; only --metric can do without")
        return (
            find_commit(state, root, good).checkpoint_id,
            find_commit(state, root, bad).checkpoint_id,
        )
    last = find_commit(state, root, LATEST if bad is None else bad)
    _hold(last, condition, Verdict.BAD)
    if good is not None:
        first = find_commit(state, root, good)
        _hold(first, condition, Verdict.GOOD)
        return first.checkpoint_id, last.checkpoint_id
    for one in line_to(state, last.checkpoint_id):
        if condition.verdict(state.commits[one].metrics) is Verdict.GOOD:
            return one, last.checkpoint_id
    raise ConfigError(
        field="--good",
        why=f"of what led to {last.checkpoint_id.ref}, none is good by `{condition}`",
        help="Name one that is",
    )


def _hold(commit: Commit, condition: Condition, wanted: Verdict) -> None:
    found = condition.verdict(commit.metrics)
    if found not in (wanted, Verdict.SKIP):
        held = f"{commit.checkpoint_id.ref} is {found} by `{condition}`"
        raise ConfigError(
            field=f"--{wanted}",
            why=f"{held}: {_why(commit, condition)}",
            help="Name another one, or look at the metrics with `ckptcoord log`",
        )


def _by_metric(session: Session, state: LogState, condition: Condition) -> Session:
    while (one := session.search.next(state.commits)) is not None:
        commit = state.commits[one]
        verdict = condition.verdict(commit.metrics)
        session = session.mark(one, verdict, _why(commit, condition))
    return session


def _why(commit: Commit, condition: Condition) -> str:
    value = commit.metrics.get(condition.metric)
    return f"no {condition.metric}" if value is None else f"{condition.metric} {value!r}"


def _verdict_lines(out: Output, session: Session) -> list[str]:
    lines = []
    for one, verdict in session.search.verdicts.items():
        why = printable(session.whys.get(one, ""))
        if out.terminal:
            lines.append(f"{out.paint(f'{verdict:<4}', _STYLES[verdict])}  {one.ref}  {why}")
        else:
            lines.append(f"{verdict}\t{one.ref}\t{why}")
    return lines


def _report(out: Output, root: Path, session: Session) -> int:
    """What to judge next, or the answer, or that it cannot be told."""
    search, state = session.search, open_repository(root).state()
    following = search.next(state.commits)
    gone = [one for one in search.answers[:-1] if one not in state.commits]
    unsure = [one for one in search.answers[:-1] if one in state.commits]
    found = None if following or unsure else search.bad
    if out.as_json:
        out.data(_document(session, state, following, found))
    elif following is not None:
        _say_next(out, root, session, state)
    elif found is not None:
        out.lines([_line(out, "first-bad", root, state, found)])
        out.note(*_story(session, state, found))
    else:
        out.lines([_line(out, "maybe", root, state, one) for one in (*unsure, search.bad)])
        out.note("the first bad checkpoint is one of these: the others were skipped")
    if gone and not out.as_json and following is None:
        refs = ", ".join(one.ref for one in gone)
        out.note(f"note: before it, {refs} cannot be tried any more: retired meanwhile")
    return 0 if following or found else _UNCLEAR


def _say_next(out: Output, root: Path, session: Session, state: LogState) -> None:
    search = session.search
    following = search.next(state.commits)
    assert following is not None
    out.lines([_line(out, "next", root, state, following)])
    steps = counted(search.steps_left(state.commits), "step")
    among = counted(len(search.answers), "checkpoint")
    out.note(f"{among} after {search.good.ref} may be the first bad one: about {steps} left")


def _line(out: Output, verb: str, root: Path, state: LogState, one: CheckpointId) -> str:
    commit = state.commits.get(one)
    path = printable(str(root / commit.path)) if commit else "-"
    if out.terminal:
        return f"{out.paint(verb, Style.BOLD)}  {out.paint(one.ref, Style.YELLOW)}  {path}"
    return f"{verb}\t{one.ref}\t{path}"


def _story(session: Session, state: LogState, found: CheckpointId) -> list[str]:
    """The answer in words."""
    commit = state.commits.get(found)
    metrics = metrics_text(commit.metrics) if commit and commit.metrics else ""
    lines = [f"{found.ref} is the first bad checkpoint; {session.search.good.ref} is good"]
    if metrics:
        lines.append(f"    {metrics}")
    return lines


def _document(
    session: Session, state: LogState, following: CheckpointId | None, found: CheckpointId | None
) -> dict[str, object]:
    search = session.search
    return {
        "repository": session.repository,
        "good": search.good.ref,
        "bad": search.bad.ref,
        "next": following.ref if following else None,
        "path": state.commits[following].path if following else None,
        "first_bad": found.ref if found else None,
        "answers": [one.ref for one in search.answers],
        "steps_left": search.steps_left(state.commits),
        "verdicts": [
            {"ref": one.ref, "verdict": verdict.value, "why": session.whys.get(one, "")}
            for one, verdict in search.verdicts.items()
        ],
    }
