"""Try a command on a checkpoint, and say what its exit code means."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from ckptcoord.errors import CkptError, ConfigError
from ckptcoord.plan.bisection import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.core.entries import Commit

_SKIP = 125
_STOPS = 128
_STDERR = 2


def judge(words: Sequence[str], *, root: Path, commit: Commit) -> tuple[Verdict, str]:
    """Run a command; its verdict, and what that is from.

    In its words, `{ref}` and `{path}` stand for the checkpoint. What it writes goes to stderr:
    stdout is for the answer.

    Returns:
        0 is good, 125 skips, any other from 1 to 127 is bad.

    Raises:
        ConfigError: it cannot be started.
        CkptError: it ended with 128 or more, or by a signal: it has said nothing of the checkpoint.
    """
    ref, path = commit.checkpoint_id.ref, root.resolve() / commit.path
    named = [word.replace("{ref}", ref).replace("{path}", str(path)) for word in words]
    environ = {
        **os.environ,
        "CKPTCOORD_RESUME_REF": ref,
        "CKPTCOORD_REPO": str(root.resolve()),
    }
    try:
        code = subprocess.run(named, env=environ, stdout=_STDERR, check=False).returncode
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        why = f"{named[0][:200]!r} cannot be started: {error}"
        raise ConfigError(field="bisect run", why=why) from error
    if code < 0 or code >= _STOPS:
        how = f"ended by signal {-code}" if code < 0 else f"ended with {code}"
        raise CkptError(
            what=f"the command {how} on {ref}, which says nothing of it",
            help="Mend it and run it again, or `ckptcoord bisect skip`; all before it is kept",
            ref=ref,
            code=code,
        )
    if code == 0:
        return Verdict.GOOD, "exit code 0"
    return Verdict.SKIP if code == _SKIP else Verdict.BAD, f"exit code {code}"
