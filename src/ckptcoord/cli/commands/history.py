"""Commands that look at the history of a run as git does, and name what is in it."""

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
from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_SHOW_HELP = """Show a checkpoint's place in the run: parent, children, metrics, message.

Beside them stand learning rate and step, and each component in a line. Metrics are held against
the nearest ancestor that is there. `ckptcoord inspect` shows what the checkpoint consists of:
files, digests, and who wrote what. REF is `latest` by default. One argument alone is
REPO if it is a folder that is a repository, else it is REF.

\b
Examples:
  ckptcoord show
  ckptcoord show main@500
  ckptcoord show runs/gpt best --json
"""
_TAG_HELP = """Give a checkpoint a name of its own, list such names, or delete one.

Without words it lists them; with NAME it tags REF, which is `latest` by default. Retention keeps
what is tagged, and NAME is a ref wherever one is asked for. A name that is there is moved with
--force only.

\b
Examples:
  ckptcoord tag
  ckptcoord tag best main@500
  ckptcoord tag runs/gpt best exp --force
  ckptcoord tag -d best
"""
_BRANCH_HELP = """Show where each branch stands, begin one, or retire what was made on one.

Without words it lists them: newest checkpoint, age, how many were made on it, and where it was
forked. NAME begins one at REF, which is `latest` by default; `ckptcoord fork` trains on it, too.

-d retires the checkpoints that were made on the branch; gc deletes them later. What a tag names and
what another branch begins at stays, and so do files that other checkpoints' deltas need.

\b
Examples:
  ckptcoord branch
  ckptcoord branch experiment main@500
  ckptcoord branch -d experiment --dry-run
"""
_RM_HELP = """Retire checkpoints: no ref names them any more, and a later gc deletes their files.

What a tag names, what another branch begins at, and the newest of a branch is refused, unless there
is --force, which deletes the tags, too. It asks first, unless -y is given. What was retired is
shown by `ckptcoord log --retired` until it is deleted; the log cannot take it back.

\b
Examples:
  ckptcoord rm main@100 main@200 --dry-run
  ckptcoord rm runs/gpt exp@300 -y
"""
_CAT_HELP = """Show what is in tensors: dtype, shape, range, mean, norm, zeros, NaN and Inf.

TENSOR is a component and a name in it, as `ckptcoord inspect --tensors` shows them, and may be a
pattern: `model.wte.weight`, 'optimizer.*.exp_avg'. Of a component that differs from rank to rank it
has the copy in it: `rng.rank00002.cpu`. Without TENSOR, all are meant. REF stands first; without
any word it is `latest`. Deltas and tensors in pieces are put together, and every byte is checked.

\b
Examples:
  ckptcoord cat main@500 model.wte.weight
  ckptcoord cat runs/gpt best 'model.*' --json
  ckptcoord cat main@500 --nan
  ckptcoord cat main@500 model.wte.weight --values 8
  ckptcoord cat main@500 model.wte.weight --raw > wte.bin
"""
_COMPLETION_HELP = """Print a script that completes commands, options, refs and folders in a shell.

SHELL is bash, zsh or fish. Refs are those of the repository that the words before name, else of the
one around the current directory.

\b
Examples:
  eval "$(ckptcoord completion bash)"                   # in ~/.bashrc
  ckptcoord completion zsh > ~/.zfunc/_ckptcoord        # a folder of $fpath
  ckptcoord completion fish > ~/.config/fish/completions/ckptcoord.fish
"""
Force = Annotated[bool, typer.Option("--force", "-f", help="Also what is refused else.")]

app = commands()


@app.command("show", cls=Command, help=_SHOW_HELP)
def _show(
    repo: RepoWord = None,
    ref: RefWord = None,
    *,
    repo_option: RepoOption = None,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import locate, show

        return show.run(out, *locate.locate(repo, ref, repo_option))

    return run("show", body, as_json=as_json)


@app.command("tag", cls=Command, help=_TAG_HELP)
def _tag(  # noqa: PLR0913 (each is an option)
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[REPO] [NAME [REF]]", show_default=False)
    ] = None,
    *,
    repo_option: RepoOption = None,
    delete: Annotated[bool, typer.Option("--delete", "-d", help="Delete the tag NAME.")] = False,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import dropping, locate, tag

        root, names = locate.locate_words(words or [], repo_option)
        if delete:
            consent = dropping.Consent(command="tag -d", dry_run=dry_run, yes=yes)
            return tag.delete(out, root, names, consent)
        _require_delete("tag", dry_run=dry_run, yes=yes)
        return tag.run(out, root, names, force=force)

    return run("tag", body, as_json=as_json)


@app.command("branch", cls=Command, help=_BRANCH_HELP)
def _branch(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[REPO] [NAME [REF]]", show_default=False)
    ] = None,
    *,
    repo_option: RepoOption = None,
    delete: Annotated[
        bool, typer.Option("--delete", "-d", help="Retire the checkpoints of the branch NAME.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import branch, dropping, locate

        root, names = locate.locate_words(words or [], repo_option)
        if delete:
            consent = dropping.Consent(command="branch -d", dry_run=dry_run, yes=yes)
            return branch.retire_branch(out, root, names, consent)
        _require_delete("branch", dry_run=dry_run, yes=yes)
        return branch.run(out, root, names)

    return run("branch", body, as_json=as_json)


@app.command("rm", cls=Command, help=_RM_HELP)
def _rm(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[REPO] REF...", show_default=False)
    ] = None,
    *,
    repo_option: RepoOption = None,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import dropping, locate, rm

        root, refs = locate.locate_words(words or [], repo_option)
        consent = dropping.Consent(command="rm", dry_run=dry_run, yes=yes)
        return rm.run(out, root, refs, force=force, consent=consent)

    return run("rm", body, as_json=as_json)


def _require_delete(command: str, *, dry_run: bool, yes: bool) -> None:
    if dry_run or yes:
        option = "--dry-run" if dry_run else "--yes"
        raise ConfigError(field=command, why=f"takes {option} only with -d")


@app.command("cat", cls=Command, help=_CAT_HELP)
def _cat(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[REPO] [REF [TENSOR...]]", show_default=False)
    ] = None,
    *,
    repo_option: RepoOption = None,
    nan: Annotated[
        bool,
        typer.Option("--nan", help="Only those with NaN or Inf; exit code 3 if there are any."),
    ] = False,
    values: Annotated[
        str | None, typer.Option("--values", metavar="N", help="Also the first N values of each.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Write the bytes of one tensor to stdout instead.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import cat, locate

        root, rest = locate.locate_words(words or [], repo_option)
        wish = cat.Wish(nan=nan, raw=raw, values=cat.count_of(values))
        return cat.run(out, root, rest, wish)

    return run("cat", body, as_json=as_json)


@app.command("completion", cls=Command, help=_COMPLETION_HELP)
def _completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", show_default=False)],
    *,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import completion

        return completion.run(out, shell)

    return run("completion", body, as_json=as_json)
