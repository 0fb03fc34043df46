"""Try a command on a checkpoint, and say what its exit code means."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptcoord.cli.child import find_command, run_child
from ckptcoord.cli.errors import INTERRUPTED
from ckptcoord.errors import CkptError
from ckptcoord.plan.bisection import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ckptcoord.core.entries import Commit

_SKIP = 125
_STOPS = 128
_STDOUT, _STDERR = 1, 2


def judge(words: Sequence[str], *, root: Path, commit: Commit) -> tuple[Verdict, str]:
    """Run a command; its verdict, and what that is from.

    In its words, `{ref}` and `{path}` stand for the checkpoint. What it writes goes to stderr:
    stdout is for the answer.

    Returns:
        0 is good, 125 skips, any other from 1 to 127 is bad.

    Raises:
        CommandError: it cannot be started.
        CkptError: it ended with 128 or more, or by a signal: it has said nothing of the checkpoint.
        KeyboardInterrupt: by an interrupt.
    """
    ref, path = commit.checkpoint_id.ref, root.resolve() / commit.path
    named = [word.replace("{ref}", ref).replace("{path}", str(path)) for word in words]
    environ = {
        **os.environ,
        "CKPTCOORD_RESUME_REF": ref,
        "CKPTCOORD_REPO": str(root.resolve()),
    }
    file = find_command(named, environ)
    with _stdout_is_stderr():
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


@contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """What a child inherits as stdout."""
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    try:
        os.dup2(_STDERR, _STDOUT)
        yield
    finally:
        os.dup2(kept, _STDOUT)
        os.close(kept)
