"""Commands that rewrite and delete what was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import (
    AsJson,
    Command,
    DryRun,
    RefWord,
    RepoOption,
    RepoWord,
    Yes,
    commands,
    run,
)

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_COMPACT_HELP = """Write deltas and coded anchors anew as plain safetensors that stand alone.

Without REF: those for whose sake `ckptcoord gc` keeps checkpoints that were retired. The state
stays the same to the last bit, and so do its place in history, metrics and message; a later gc
deletes the old files. Safe beside running saves and loads.

\b
Examples:
  ckptcoord compact --dry-run
  ckptcoord compact runs/gpt main@500
"""
_GC_HELP = """Delete what no checkpoint needs: retired ones, and what killed saves left.

A retired checkpoint whose files a live one needs stays, and so does what is younger than the grace,
what a running save may own, and all that is not ckptcoord's. It asks first, unless -y is given.

\b
Examples:
  ckptcoord gc --dry-run
  ckptcoord gc runs/gpt --grace 7d
  ckptcoord gc runs/gpt --compact
  ckptcoord gc runs/gpt -y --json
"""

app = commands()


@app.command("compact", cls=Command, help=_COMPACT_HELP)
def _compact(
    repo: RepoWord = None,
    ref: RefWord = None,
    *,
    repo_option: RepoOption = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import compact, locate

        root, wanted = locate.locate(repo, ref, repo_option)
        return compact.run(out, root, wanted, dry_run=dry_run)

    return run("compact", body, as_json=as_json)


@app.command("gc", cls=Command, help=_GC_HELP)
def _gc(  # noqa: PLR0913 (each is an option)
    repo: RepoWord = None,
    *,
    repo_option: RepoOption = None,
    dry_run: DryRun = False,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="SPAN",
            help="Keep what was retired so lately: 90s, 1h (default), 7d.",
        ),
    ] = None,
    rebase: Annotated[
        bool,
        typer.Option("--compact", help="First make those stand alone that need retired ones."),
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import gc as collect
        from ckptcoord.cli import locate

        root = locate.locate_repository(repo, repo_option)
        return collect.run(out, root, grace=grace, dry_run=dry_run, yes=yes, rebase=rebase)

    return run("gc", body, as_json=as_json)
