"""Commands that only look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import (
    AsJson,
    Command,
    OneComponent,
    RefWord,
    RepoOption,
    RepoWord,
    commands,
    run,
)
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_LOG_HELP = """Show the checkpoints, newest first.

The order is that in which they were committed, whatever the clocks said. With --graph, each stands
above its parent, with a line to it. `ckptcoord show` says more of one.

\b
Examples:
  ckptcoord log
  ckptcoord log runs/gpt -n 5
  ckptcoord log --graph
  ckptcoord log --retired
  ckptcoord log -n 20 --timing
  ckptcoord log --branch experiment --json
"""
_INSPECT_HELP = """Show what is in a checkpoint: where it comes from, its components and files.

Files, digests, and who wrote what; `ckptcoord show` says what place it has in the run. REF is
`latest` by default. One argument alone is REPO if it is a folder that is a repository, else it is
REF.

\b
Examples:
  ckptcoord inspect
  ckptcoord inspect main@500
  ckptcoord inspect runs/gpt main@500 --tensors --component model
  ckptcoord inspect runs/gpt/checkpoint-500 --json
"""
_VERIFY_HELP = """Read every byte of a checkpoint and compare it with its digests.

REF is `latest` by default. One argument alone is REPO if it is a folder that is a repository, else
it is REF. The exit code is 13 when anything is corrupt; a file that is in no manifest is named,
and does no harm.

\b
Examples:
  ckptcoord verify
  ckptcoord verify runs/gpt main@500
  ckptcoord verify runs/gpt --all
"""
_LS_HELP = """List the checkpoints, or with REF the files of one; one a line.

One argument alone is REPO if it is a folder that is a repository, else it is REF. Into a pipe the
columns are separated by tabs and sizes are in bytes.

\b
Examples:
  ckptcoord ls
  ckptcoord ls runs/gpt main@500
  ckptcoord ls runs/gpt | cut -f1
"""
_DU_HELP = """Show what takes how much: each checkpoint, and on a terminal each component and all.

`alone` is what gc could delete if that checkpoint alone were retired. Into a pipe the columns are
separated by tabs and sizes are in bytes: ref, state, stored, alone, folder, live or retired; with
--codec ref, codec, tensors, state, stored of each live checkpoint. On a terminal and with --json,
--codec adds two ratios: what dedup saves, and what compression does.

\b
Examples:
  ckptcoord du
  ckptcoord du --codec
  ckptcoord du runs/gpt --json
"""

_ALONE = "Give one of --graph, --timing and --retired"

app = commands()


@app.command("log", cls=Command, help=_LOG_HELP)
def _log(  # noqa: PLR0913 (each is an option)
    repo: RepoWord = None,
    *,
    repo_option: RepoOption = None,
    branch: Annotated[
        str | None, typer.Option("--branch", metavar="NAME", help="Only this branch's.")
    ] = None,
    limit: Annotated[
        str | None, typer.Option("--limit", "-n", metavar="N", help="Only the newest N.")
    ] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="One a line, with lines as in git.")
    ] = False,
    timing: Annotated[
        bool, typer.Option("--timing", help="How long each save took, and where.")
    ] = False,
    dropped: Annotated[
        bool, typer.Option("--retired", help="What was dropped instead, and waits for gc.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, log

        root, count = locate.locate_repository(repo, repo_option), log.limit_of(limit)
        if not dropped:
            return log.run(out, root, branch=branch, limit=count, timing=timing, graph=graph)
        if timing or graph:
            raise ConfigError(field="--retired", why="stands beside another view", help=_ALONE)
        from ckptcoord.cli import retired

        return retired.run(out, root, branch=branch, limit=count)

    return run("log", body, as_json=as_json)


@app.command("inspect", cls=Command, help=_INSPECT_HELP)
def _inspect(
    repo: RepoWord = None,
    ref: RefWord = None,
    *,
    repo_option: RepoOption = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also the tensors in each shard.")
    ] = False,
    component: OneComponent = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import inspect, locate

        root, wanted = locate.locate(repo, ref, repo_option)
        return inspect.run(out, root, wanted, component=component, with_tensors=tensors)

    return run("inspect", body, as_json=as_json)


@app.command("verify", cls=Command, help=_VERIFY_HELP)
def _verify(
    repo: RepoWord = None,
    ref: RefWord = None,
    *,
    repo_option: RepoOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every checkpoint.")] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, verify

        root, wanted = locate.locate(repo, ref, repo_option)
        return verify.run(out, root, wanted, everything=everything)

    return run("verify", body, as_json=as_json)


@app.command("ls", cls=Command, help=_LS_HELP)
def _ls(
    repo: RepoWord = None,
    ref: RefWord = None,
    *,
    repo_option: RepoOption = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, ls

        return ls.run(out, *locate.locate(repo, ref, repo_option))

    return run("ls", body, as_json=as_json)


@app.command("du", cls=Command, help=_DU_HELP)
def _du(
    repo: RepoWord = None,
    *,
    repo_option: RepoOption = None,
    codec: Annotated[
        bool, typer.Option("--codec", help="By codec, too; reads the header of each file.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import du, locate

        return du.run(out, locate.locate_repository(repo, repo_option), codecs=codec)

    return run("du", body, as_json=as_json)
