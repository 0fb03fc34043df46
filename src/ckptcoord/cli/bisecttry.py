"""Try a command on a checkpoint, and say what its exit code means."""

from __future__ import annotations

import os
from itertools import chain, count
from typing import TYPE_CHECKING

from ckptcoord.cli.child import find_command, run_child, stdout_is_stderr
from ckptcoord.cli.errors import INTERRUPTED
from ckptcoord.core.context import HandOff, Variable
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import CkptError
from ckptcoord.plan.bisection import Verdict
from ckptcoord.plan.commit import branches

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.core.entries import Commit
    from ckptcoord.plan.commit import LogState

OWN = "bisect-"
"""What the names of branches begin with that a command may make."""
_SKIP = 125
_STOPS = 128


def judge(
    words: Sequence[str], *, root: Path, state: LogState, commit: Commit
) -> tuple[Verdict, str]:
    """Run a command; its verdict, and what that is from.

    In its words, `{ref}` and `{path}` stand for the checkpoint. A run that resumes as its
    environment says does so on a branch of its own: on that of the checkpoint there are newer ones,
    and it would be refused. What the command writes goes to stderr: stdout is for the answer.

    Returns:
        0 is good, 125 skips, any other from 1 to 127 is bad.

    Raises:
        CommandError: it cannot be started.
        CkptError: it ended with 128 or more, or by a signal: it has said nothing of the checkpoint.
        KeyboardInterrupt: by an interrupt.
    """
    ref, path = commit.checkpoint_id.ref, root.resolve() / commit.path
    named = [word.replace("{ref}", ref).replace("{path}", str(path)) for word in words]
    told = HandOff(
        repo=str(root.resolve()),
        branch=str(own_branch(state, commit)),
        resume_ref=ref,
        resume_since=state.number,
    ).to_environment()
    del told[Variable.AUTOCOMMIT]  # as it is
    environ = {name: text for name, text in (os.environ | told).items() if text or name not in told}
    file = find_command(named, environ)
    with stdout_is_stderr():
        code = run_child(file, named, environ, prepare=lambda: None)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code >= _STOPS:
        raise CkptError(
            what=f"the command ended with {code} on {ref}, which says nothing of it",
            help="Mend it and run it again, or `ckptcoord bisect skip`; all before it is kept",
            ref=ref,
            code=code,
        )
    if code == 0:
        return Verdict.GOOD, "exit code 0"
    return Verdict.SKIP if code == _SKIP else Verdict.BAD, f"exit code {code}"


def own_branch(state: LogState, commit: Commit) -> BranchName:
    """A branch that does not exist: `bisect-main-500`."""
    one = commit.checkpoint_id
    name = f"{OWN}{str(one.branch)[:60]}-{one.step}"
    taken = {str(branch) for branch in branches(state)}
    numbered = (f"{name}-{number}" for number in count(2))
    return BranchName(next(free for free in chain((name,), numbered) if free not in taken))
