"""`ckptcoord resume` and `ckptcoord fork`: a command that goes on from a checkpoint."""

from __future__ import annotations

import os
import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.cli.asking import agreed, nonce, require_somebody
from ckptcoord.cli.branch import new_branch
from ckptcoord.cli.child import find_command, run_child, stdout_is_stderr
from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.text import Style, bytes_text, counted, printable
from ckptcoord.core.context import MAX_SEED, Anew, HandOff, Variable, parse_seed
from ckptcoord.errors import CheckpointInUseError, ConfigError
from ckptcoord.plan.dropping import HeldBy, freed_bytes, holds
from ckptcoord.plan.resuming import ResumePoint, resume_point
from ckptcoord.repo.repository import Repository, open_repository
from ckptcoord.repo.rewinding import rewind
from ckptcoord.repo.settings import WORKSPACE_PATH, has_marker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ckptcoord.cli.output import Output
    from ckptcoord.plan.commit import LogState


def seed_of(text: str | None) -> int | None:
    """The seed that an option gives.

    Raises:
        ConfigError: it is no seed.
    """
    try:
        return None if text is None else parse_seed(text)
    except ValueError as error:
        why = f"{ascii(text)[:80]} is not a whole number from 0 to {MAX_SEED}"
        raise ConfigError(field="--seed", why=why) from error


def resume(  # noqa: PLR0913 (each is an option)
    out: Output,
    root: Path,
    ref: str,
    words: Sequence[str],
    *,
    rewinding: bool,
    dry_run: bool,
    yes: bool,
) -> int:
    """Run a command that goes on from a checkpoint; its exit code.

    Raises:
        NotNewestError: its branch has newer ones, and `rewinding` is not set.
        CommandError: the command cannot be started; nothing was changed.
        CkptError: there is no such checkpoint, or it cannot be read.
    """
    if not words:
        raise ConfigError(
            field="resume",
            why="is given no command",
            help=f"Put it behind --, as in `ckptcoord resume {printable(ref)} -- python train.py`",
        )
    repository = open_repository(root)
    state = repository.state()
    point = _point(repository, state, root, ref, rewinding=rewinding)
    child = _Child.of(repository, state, point, words)
    if point.newer:
        require_somebody(out, "resume --rewind", dry_run=dry_run, yes=yes)
    if dry_run:
        _show(out, repository, state, point, child)
        return 0
    if point.newer and not (yes or _agreed(out, point)):
        out.note("nothing was changed")
        return 0

    def prepare() -> None:
        if point.newer:
            rewind(repository, point, writer=nonce())
            out.note(_retired_note(state, point))

    code = child.run(out, prepare)
    if out.as_json:
        out.data(_document(repository, state, point, child, code))
    return code


def fork(out: Output, root: Path, ref: str, name: str, words: Sequence[str], *, anew: Anew) -> int:
    """Begin a branch at a checkpoint, and run a command on it; its exit code, or 0 without one.

    Raises:
        BranchExistsError: the branch is there; nothing was changed.
        CommandError: the command cannot be started; likewise.
        CkptError: there is no such checkpoint, or it cannot be read.
    """
    if not words and anew:
        raise ConfigError(
            field="fork",
            why="is told what to begin anew, and given no command to tell it",
            help="Put the command behind --; a branch by itself does not remember it",
        )
    repository = open_repository(root)
    state = repository.state()
    branch = new_branch(state, name)
    commit = find_commit(state, root, ref)
    repository.manifest(commit)
    point = ResumePoint(commit=commit, branch=branch)

    def prepare() -> None:
        repository.fork(branch, commit.checkpoint_id, writer=nonce())
        if not out.as_json:
            out.note(f"branch {branch} begins at {commit.checkpoint_id.ref}")

    began: dict[str, object] = {"branch": str(branch), "source": commit.checkpoint_id.ref}
    code = 0
    if words:
        child = _Child.of(repository, state, point, words, anew=anew)
        code = child.run(out, prepare)
        began |= child.to_json(code)
    else:
        prepare()
    if out.as_json:
        out.data({"repository": repository.url, **began})
    elif not words:
        out.note(f"go on with it: ckptcoord resume {branch} -- COMMAND")
    return code


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    """A command that can be started, and what its environment says."""

    file: str
    words: tuple[str, ...]
    said: dict[str, str]

    @classmethod
    def of(
        cls,
        repository: Repository,
        state: LogState,
        point: ResumePoint,
        words: Sequence[str],
        *,
        anew: Anew | None = None,
    ) -> _Child:
        """The one that goes on from there.

        Raises:
            CommandError: there is no such command.
        """
        anew = anew or Anew()
        folder = Path(repository.url)
        alone = not has_marker(folder.parent, WORKSPACE_PATH)
        told = HandOff(
            workspace=None if alone else str(folder.parent),
            repo=str(folder) if alone else folder.name,
            branch=str(point.branch),
            resume_ref=point.commit.checkpoint_id.ref,
            resume_since=state.number,
            resets=anew.resets,
            seed=anew.seed,
        ).to_environment()
        del told[Variable.AUTOCOMMIT]  # as it is
        return cls(file=find_command(words, os.environ), words=tuple(words), said=told)

    def to_json(self, exit_code: int | None) -> dict[str, object]:
        """What is run, and how it ended; None where it was not run."""
        return {
            "environment": {name: text for name, text in self.said.items() if text},
            "command": list(self.words),
            "exit_code": exit_code,
        }

    def run(self, out: Output, prepare: Callable[[], None]) -> int:
        """Run it to its end; with `--json`, what it writes to stdout goes to stderr."""
        environ = {**os.environ, **self.said}
        for name, text in self.said.items():
            if not text:
                del environ[name]
        with stdout_is_stderr() if out.as_json else nullcontext():
            return run_child(self.file, self.words, environ, prepare=prepare)


def _point(
    repository: Repository, state: LogState, root: Path, ref: str, *, rewinding: bool
) -> ResumePoint:
    commit = find_commit(state, root, ref)
    point = resume_point(state, commit.checkpoint_id.ref if "/" in ref else ref)
    if not rewinding:
        point.refuse_newer()
    for hold in holds(state, point.newer):
        if hold.by in (HeldBy.TAG, HeldBy.START):
            raise CheckpointInUseError(checkpoint_id=hold.checkpoint_id.ref, used_by=str(hold))
    repository.manifest(point.commit)
    return point


def _agreed(out: Output, point: ResumePoint) -> bool:
    out.lines(_retired_lines(out, point))
    many = counted(len(point.newer), "checkpoint")
    return agreed(f"Retire {many}, and go on from {point.commit.checkpoint_id.ref}?")


def _document(
    repository: Repository, state: LogState, point: ResumePoint, child: _Child, code: int | None
) -> dict[str, object]:
    return {
        "repository": repository.url,
        "ref": point.commit.checkpoint_id.ref,
        "branch": str(point.branch),
        "retire": [one.ref for one in point.newer],
        "freed_bytes": freed_bytes(state, point.newer),
        **child.to_json(code),
    }


def _show(
    out: Output, repository: Repository, state: LogState, point: ResumePoint, child: _Child
) -> None:
    if out.as_json:
        out.data(_document(repository, state, point, child, None))
        return
    out.lines(_retired_lines(out, point))
    out.lines(
        f"set\t{name}\t{printable(text)}" for name, text in sorted(child.said.items()) if text
    )
    out.lines([f"run\t{printable(shlex.join(child.words))}"])
    out.note("nothing was changed")


def _retired_lines(out: Output, point: ResumePoint) -> Iterator[str]:
    for one in point.newer:
        yield f"{out.paint('retire', Style.RED)}\t{one.ref}"


def _retired_note(state: LogState, point: ResumePoint) -> str:
    freed = bytes_text(freed_bytes(state, point.newer))
    return f"{counted(len(point.newer), 'checkpoint')} retired; `ckptcoord gc` frees {freed}"
