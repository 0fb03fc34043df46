"""`ckptcoord bisect` and what belongs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, DryRun, RefWord, RepoOption, Yes, commands, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptcoord.cli.output import Output

_BISECT_HELP = """Find the checkpoint where a metric or a command turned bad.

Begin with a checkpoint that is good and one that came out of it and is bad. Then judge the one that
is next, yourself or by a command, until the first bad one is found: of 1,000 checkpoints, ten are
judged. Lineage is followed across forks. What is found is kept for you alone, in a file under
$XDG_STATE_HOME or the one that --state names; bisect itself does not write to the repository.

\b
Examples:
  ckptcoord bisect start --metric 'loss > 3'
  ckptcoord bisect start --good main@100 --bad main@900
  ckptcoord bisect run python evaluate.py {path}
  ckptcoord bisect bad
  ckptcoord bisect reset -y
"""
_START_HELP = """Begin, between a good checkpoint and a bad one.

With --metric, what holds for a checkpoint's metrics is bad, and the answer comes at once; --bad is
`latest` then, and --good the oldest that is good. A NaN is bad. Saves leave out metrics that are
not finite: --absent says what a checkpoint without the metric is.

\b
Examples:
  ckptcoord bisect start --good main@100 --bad main@900
  ckptcoord bisect start --metric 'loss > 3' --absent bad
  ckptcoord bisect start --good main@100 --bad exp@latest --metric 'accuracy < 0.5'
"""
_RUN_HELP = """Judge by a command, until the answer is there.

It runs with CKPTCOORD_REPO, _RESUME_REF and _BRANCH set, so that a training script resumes from the
checkpoint, on a branch of its own (bisect-main-500) if it saves anything; in its words, {ref} and
{path} stand for the checkpoint. Exit code 0 is good, 125 skips, any
other up to 127 is bad; 128 and more, or a signal, stops. What it writes goes to stderr. Options
before CMD are bisect's, those after it are CMD's.

\b
Examples:
  ckptcoord bisect run python evaluate.py --checkpoint {path}
  ckptcoord bisect run -- sh -c 'test $(python loss.py {ref}) -lt 3'
"""
_GOOD_HELP = """Say that a checkpoint is good; without REF the one that is next.

\b
Examples:
  ckptcoord bisect good
  ckptcoord bisect good main@300
"""
_BAD_HELP = """Say that a checkpoint is bad; without REF the one that is next.

\b
Examples:
  ckptcoord bisect bad
  ckptcoord bisect bad main@700
"""
_SKIP_HELP = """Say that a checkpoint cannot be judged; without REF the one that is next.

\b
Examples:
  ckptcoord bisect skip
  ckptcoord bisect skip main@500
"""
_LOG_HELP = """Show what has been judged, in that order, and what is next.

\b
Examples:
  ckptcoord bisect log
  ckptcoord bisect log --json
"""
_RESET_HELP = """Forget the bisection. It asks first, unless -y is given.

\b
Examples:
  ckptcoord bisect reset -y
"""

_State = Annotated[
    str | None,
    typer.Option("--state", metavar="FILE", help="Keep what is found there, for a search apart."),
]

app = commands()
_bisect = commands("bisect", _BISECT_HELP)
app.add_typer(_bisect)


@_bisect.command("start", cls=Command, help=_START_HELP)
def _start(  # noqa: PLR0913 (each is an option)
    *,
    good: Annotated[
        str | None, typer.Option("--good", metavar="REF", help="One that is good.")
    ] = None,
    bad: Annotated[
        str | None, typer.Option("--bad", metavar="REF", help="A later one that is bad.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="COND", help="What is bad: 'loss > 3'.")
    ] = None,
    absent: Annotated[
        str,
        typer.Option("--absent", metavar="VERDICT", help="Without the metric: good, bad or skip."),
    ] = "skip",
    repo_option: RepoOption = None,
    state: _State = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import bisect, bisectfile, locate
        from ckptcoord.plan.condition import Condition

        root = locate.locate_repository(None, repo_option)
        verdict = bisectfile.verdict_of("--absent", absent)
        condition = None if metric is None else Condition.parse(metric, absent=verdict)
        file = bisectfile.SessionFile(root, state)
        return bisect.start(out, root, file, ends=(good, bad), condition=condition)

    return run("bisect start", body, as_json=as_json)


def _judging(verdict: str) -> Callable[..., int]:
    """The command that says so of a checkpoint."""

    def judge(
        ref: RefWord = None,
        *,
        repo_option: RepoOption = None,
        state: _State = None,
        as_json: AsJson = False,
    ) -> int:
        return _mark(verdict, ref, repo_option, state, as_json=as_json)

    return judge


for _verdict, _help in (("good", _GOOD_HELP), ("bad", _BAD_HELP), ("skip", _SKIP_HELP)):
    _bisect.command(_verdict, cls=Command, help=_help)(_judging(_verdict))


@_bisect.command(
    "run",
    cls=Command,
    help=_RUN_HELP,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def _run(
    words: Annotated[list[str], typer.Argument(metavar="CMD...", show_default=False)],
    *,
    repo_option: RepoOption = None,
    state: _State = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import bisect, bisectfile, locate

        root = locate.locate_repository(None, repo_option)
        return bisect.run(out, root, bisectfile.SessionFile(root, state), words)

    return run("bisect run", body, as_json=as_json)


@_bisect.command("log", cls=Command, help=_LOG_HELP)
def _log(*, repo_option: RepoOption = None, state: _State = None, as_json: AsJson = False) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import bisect, bisectfile, locate

        root = locate.locate_repository(None, repo_option)
        return bisect.log(out, root, bisectfile.SessionFile(root, state))

    return run("bisect log", body, as_json=as_json)


@_bisect.command("reset", cls=Command, help=_RESET_HELP)
def _reset(
    *,
    repo_option: RepoOption = None,
    state: _State = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import bisect, bisectfile, locate

        root = locate.locate_repository(None, repo_option)
        file = bisectfile.SessionFile(root, state)
        return bisect.reset(out, file, dry_run=dry_run, yes=yes)

    return run("bisect reset", body, as_json=as_json)


def _mark(
    word: str, ref: str | None, repo_option: str | None, state: str | None, *, as_json: bool
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import bisect, bisectfile, locate

        root = locate.locate_repository(None, repo_option)
        verdict = bisectfile.verdict_of("verdict", word)
        return bisect.mark(out, root, bisectfile.SessionFile(root, state), ref, verdict)

    return run(f"bisect {word}", body, as_json=as_json)
