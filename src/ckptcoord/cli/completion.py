"""`ckptcoord completion`: what a shell offers for a word that is being typed.

The shell hands the line over, up to the cursor, and gets one candidate a line. Refs come from the
log alone, and typer is imported for commands and options only: a shell waits for the answer.
"""

from __future__ import annotations

import os
import shlex
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ckptcoord.errors import CkptError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ckptcoord.cli.output import Output
    from ckptcoord.plan.commit import LogState

_MOST = 2000
_REPO_OPTIONS = ("--repo", "-C")
_BRANCH_OPTIONS = ("--branch",)
# Commands whose words are no refs.
NO_REFS = frozenset(
    {"log", "du", "gc", "import", "login", "logout", "whoami", "completion", "status"}
    | {"workspace", "repo", "config"}
)
GROUPS = frozenset({"bisect", "workspace", "repo", "config"})
_BASH = r"""_ckptcoord() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" word kept i
    word="${line##*[[:space:]]}"
    # Readline replaces $2, which of `--branch=ma` is `ma`, and of `main@5` is `@5`.
    kept="${word%"$2"}"
    COMPREPLY=($(ckptcoord __complete "$line" 2>/dev/null))
    for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]="${COMPREPLY[i]#"$kept"}"; done
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == */ ]] && compopt -o nospace
    return 0
}
complete -o nosort -o default -F _ckptcoord ckptcoord
"""
_ZSH = r"""#compdef ckptcoord
_ckptcoord() {
    local -a found
    found=("${(@f)$(ckptcoord __complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -V ckptcoord -- $found; else _files; fi
}
compdef _ckptcoord ckptcoord
"""
_FISH = r"""function __ckptcoord_complete
    ckptcoord __complete (commandline -cp) 2>/dev/null
end
complete -c ckptcoord -f -k -a '(__ckptcoord_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def run(out: Output, shell: str) -> int:
    """Print the script of a shell.

    Raises:
        ConfigError: there is none for it.
    """
    if shell not in SCRIPTS:
        raise ConfigError(field="SHELL", why=f"is {shell!r:.40}, not one of {', '.join(SCRIPTS)}")
    if out.as_json:
        out.data({"shell": shell, "script": SCRIPTS[shell]})
    else:
        out.lines(SCRIPTS[shell].splitlines())
    return 0


def complete(words: Sequence[str]) -> int:
    """Print what may stand for the last word of a line."""
    found = islice(candidates(words[0] if words else ""), _MOST)
    sys.stdout.write("".join(f"{one}\n" for one in found if one.isprintable()))
    return 0


def candidates(line: str) -> Iterator[str]:
    """What may stand for the last word of a line: whole words."""
    words, word = _split(line)
    option, equals, rest = word.partition("=")
    if equals and option.startswith("--"):
        for one in _of_option(words, option, rest):
            yield f"{option}={one}"
        return
    yield from _candidates(words, word)


def _split(line: str) -> tuple[list[str], str]:
    """The words behind the program's name, and the one that is being typed."""
    try:
        words = shlex.split(line)
    except ValueError:  # within quotes
        words = line.split()
    if not line or line[-1].isspace():
        words.append("")
    return words[1:-1], words[-1]


def _candidates(words: list[str], word: str) -> Iterator[str]:
    if "--" in words:  # what stands behind it is no word of ours
        return
    if not words or word.startswith("-") or (words[0] in GROUPS and len(words) == 1):
        yield from _of_program(words, word)
    elif words[-1].startswith("-") and words[-1] in (*_REPO_OPTIONS, *_BRANCH_OPTIONS):
        yield from _of_option(words, words[-1], word)
    elif words[0] == "completion":
        yield from _starting(SCRIPTS, word)
    elif "/" in word:
        yield from _folders(word)
    else:
        yield from _repositories(word) if len(words) == 1 else ()
        yield from () if words[0] in NO_REFS else _refs(words, word)


def _of_option(words: list[str], option: str, word: str) -> Iterator[str]:
    if option in _REPO_OPTIONS and "/" in word:
        yield from _folders(word)
    elif option in _REPO_OPTIONS:
        yield from _starting(_in_workspace(), word)
        yield from _folders(f"./{word}", cut=2)
    elif option in _BRANCH_OPTIONS:
        state = _state(words)
        yield from () if state is None else _starting(_branches(state), word)


def _of_program(words: list[str], word: str) -> Iterator[str]:
    """Commands and options, from their declarations."""
    import typer

    from ckptcoord.cli.app import app

    command = typer.main.get_command(app)
    for name in words[:2]:
        inner = command.get_command(None, name) if hasattr(command, "get_command") else None
        if inner is None:
            break
        command = inner
    if word.startswith("-"):
        names = [name for one in command.params for name in one.opts if name.startswith("-")]
        yield from _starting((*names, "--help"), word)
    elif hasattr(command, "list_commands"):
        yield from _starting(command.list_commands(None), word)


# --- refs ----------------------------------------------------------------------------------------


def _refs(words: list[str], word: str) -> Iterator[str]:
    state = _state(words)
    if state is None:
        return
    deletes = any(one in ("-d", "--delete") for one in words)
    if deletes and words[0] in ("tag", "branch"):
        names = sorted(map(str, state.tags)) if words[0] == "tag" else _branches(state)
        yield from _starting(names, word)
    elif "@" in word or word.startswith("checkpoint-"):
        yield from _starting(_steps(state, word), word)
    else:
        yield from _starting(_names(state), word)


def _names(state: LogState) -> Iterator[str]:
    """`latest`, tags, branches, and of each the newest step, which shows how others are written."""
    from ckptcoord.plan.lookup import newest_on

    if state.commits:
        yield "latest"
    yield from sorted(map(str, state.tags))
    yield from _branches(state)
    for branch in sorted({one.branch for one in state.commits}):
        newest = newest_on(state, branch)
        yield from () if newest is None else (newest.checkpoint_id.ref,)


def _steps(state: LogState, word: str) -> Iterator[str]:
    for one in sorted(state.commits):
        yield str(one) if word.startswith("checkpoint-") else one.ref
    yield from (f"{branch}@latest" for branch in _branches(state))


def _branches(state: LogState) -> list[str]:
    from ckptcoord.plan.commit import branches

    return [str(branch) for branch in branches(state)]


def _state(words: Sequence[str]) -> LogState | None:
    """What the log says of the repository that the words before mean; None where there is none."""
    from ckptcoord.cli.locate import locate_words
    from ckptcoord.repo.repository import open_repository

    given = [b for a, b in pairwise(words) if a in _REPO_OPTIONS]
    given += [one.partition("=")[2] for one in words if one.startswith("--repo=")]
    plain = [one for one in words[1:] if not one.startswith("-")]
    try:
        root, _ = locate_words([] if given else plain, given[-1] if given else None)
        return open_repository(root).state()
    except CkptError:  # the command itself will say what is wrong
        return None


# --- folders -------------------------------------------------------------------------------------


def _repositories(word: str) -> Iterator[str]:
    """Those in the current directory."""
    from ckptcoord.repo.workspace import is_repository

    return (name for name in _listed(Path(), word) if is_repository(Path(name)))


def _in_workspace() -> tuple[str, ...]:
    """The names of the repositories around here, which any folder of the workspace knows."""
    from ckptcoord.repo.workspace import find_workspace, repositories

    try:
        workspace = find_workspace()
        return () if workspace is None or workspace == Path.cwd() else repositories(workspace)
    except (CkptError, OSError):  # as above
        return ()


def _folders(word: str, *, cut: int = 0) -> Iterator[str]:
    parent, _, last = word.rpartition("/")
    for name in _listed(Path(parent or "/"), last):
        yield f"{parent}/{name}/"[cut:]


def _listed(folder: Path, start: str) -> list[str]:
    """The folders in one whose names begin so; hidden ones only where that is asked for."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except (OSError, ValueError):
        return []
    hidden = start.startswith(".")
    return sorted(
        name for name in names if name.startswith(start) and (hidden or not name.startswith("."))
    )


def _starting(names: Iterable[str], word: str) -> Iterator[str]:
    return (name for name in names if name.startswith(word))
