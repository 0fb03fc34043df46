"""Commands that run a command: from a checkpoint on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, DryRun, GivenRef, RepoOption, Yes, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_RESUME_HELP = """Run a command that goes on training from a checkpoint.

COMMAND finds in its environment where to go on (CKPTCOORD_WORKSPACE, _REPO, _BRANCH, _RESUME_REF);
ckptcoord's trainers and engine heed that in an unchanged script. Signals go on to it, and its exit
code is that of this command. REF must be the newest of its branch: to go on from an older one, fork
it, or give --rewind, which retires what the branch has after it; the files stay until gc.

\b
Examples:
  ckptcoord resume latest -- python train.py
  ckptcoord resume main@500 -- torchrun --nproc-per-node 8 train.py
  ckptcoord resume main@500 --rewind --dry-run -- python train.py
"""
_FORK_HELP = """Begin a branch at a checkpoint, and run a command that trains on it.

COMMAND finds in its environment where to go on, as with `ckptcoord resume`, and what to begin anew.
Without a command the branch is made, and `ckptcoord resume BRANCH -- COMMAND` goes on with it. The
branch is not made where the command cannot be started. What begins anew need not be in the
checkpoint: with --weights-only, an imported or averaged model is enough.

\b
Examples:
  ckptcoord fork main@500 exp -- python train.py --learning-rate 1e-4
  ckptcoord fork main@500 exp --reset-optimizer --seed 7 -- torchrun train.py
  ckptcoord fork imported@0 tune --weights-only -- python train.py
  ckptcoord fork latest exp
"""
_Words = Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND", show_default=False)]

app = commands()


@app.command("resume", cls=Command, help=_RESUME_HELP)
def _resume(  # noqa: PLR0913 (each is an option)
    ref: GivenRef,
    words: _Words = None,
    *,
    repo_option: RepoOption = None,
    rewind: Annotated[
        bool, typer.Option("--rewind", help="Retire what the branch has after REF.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import children, locate

        root, wanted = locate.locate(ref, None, repo_option)
        return children.resume(
            out,
            root,
            locate.LATEST if wanted is None else wanted,
            words or (),
            rewinding=rewind,
            dry_run=dry_run,
            yes=yes,
        )

    return run("resume", body, as_json=as_json)


@app.command("fork", cls=Command, help=_FORK_HELP)
def _fork(  # noqa: PLR0913 (each is an option)
    ref: GivenRef,
    branch: Annotated[str, typer.Argument(metavar="BRANCH", show_default=False)],
    words: _Words = None,
    *,
    repo_option: RepoOption = None,
    reset_optimizer: Annotated[
        bool, typer.Option("--reset-optimizer", help="Begin with a new optimizer.")
    ] = False,
    reset_scheduler: Annotated[
        bool, typer.Option("--reset-scheduler", help="Begin the learning rate's schedule anew.")
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Take over the model, and begin all else anew.")
    ] = False,
    seed: Annotated[
        str | None,
        typer.Option("--seed", metavar="N", help="Seed the random number generators anew."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import children, locate
        from ckptcoord.core.context import Anew, Reset

        chosen = {
            Reset.OPTIMIZER: reset_optimizer,
            Reset.SCHEDULER: reset_scheduler,
            Reset.WEIGHTS_ONLY: weights_only,
        }
        anew = Anew(
            resets=tuple(one for one, wanted in chosen.items() if wanted),
            seed=children.seed_of(seed),
        )
        root, wanted = locate.locate(ref, None, repo_option)
        return children.fork(
            out, root, locate.LATEST if wanted is None else wanted, branch, words or (), anew=anew
        )

    return run("fork", body, as_json=as_json)
