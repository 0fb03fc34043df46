"""`ckptcoord merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, DryRun, RepoOption, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_MERGE_HELP = """Average the models of several checkpoints as a new branch.

The branch begins at the first of them. Weights are 1 unless given, and are made to sum to one. Sums
are in float64, in the order of the words: the same everywhere, bit for bit. Tensors must have one
shape; integers must be equal; a NaN is refused: all that does not fit is named, and nothing is
written then. --dry-run looks at headers alone; its exit code is 3 where something does not fit.

Only the model is in the new checkpoint: no optimizer, schedule or random state.

\b
Examples:
  ckptcoord merge --average main@800 main@900 main@1000 --into soup
  ckptcoord merge --average main@1000:0.7 exp@1000:0.3 --into mixed -m "mostly main"
  ckptcoord merge --average tuned base:-1 other:1 --as-given --into arithmetic --dry-run
"""

app = commands()


@app.command("merge", cls=Command, help=_MERGE_HELP)
def _merge(  # noqa: PLR0913 (each is an option)
    refs: Annotated[list[str], typer.Argument(metavar="REF[:WEIGHT]...", show_default=False)],
    *,
    average: Annotated[bool, typer.Option("--average", help="What to do: the only merge.")] = False,
    into: Annotated[
        str | None, typer.Option("--into", metavar="BRANCH", help="The new branch.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="N", help="Of the checkpoint; the highest of theirs."),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Its message.")
    ] = None,
    component: Annotated[
        str, typer.Option("--component", metavar="KEY", help="What is averaged.")
    ] = "model",
    as_given: Annotated[
        bool, typer.Option("--as-given", help="Weights are taken as they are, also negative.")
    ] = False,
    keep_first: Annotated[
        bool,
        typer.Option("--keep-first", help="Integers that differ are those of the first."),
    ] = False,
    repo_option: RepoOption = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, merge
        from ckptcoord.repo.repository import open_repository

        root = locate.locate_repository(None, repo_option)
        repository = open_repository(root)
        asked = merge.wanted(
            repository,
            root,
            refs,
            average=average,
            into=into,
            component=component,
            step=step,
            message=message,
            as_given=as_given,
            keep_first=keep_first,
        )
        return merge.run(out, repository, asked, dry_run=dry_run)

    return run("merge", body, as_json=as_json)
