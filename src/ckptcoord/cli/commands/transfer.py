"""Commands that bring checkpoints in from other formats, and out to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, DryRun, RepoOption, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_IMPORT_HELP = """Commit what another tool has saved: each of its checkpoints as one of ours, in order.

PATH is a file of torch.save or safetensors, or a folder: of safetensors, of a Hugging Face model or
Trainer, of torch.distributed.checkpoint, of Forgather, of gradient-desc. Which one is found out.
Step, branch, lineage and metrics are kept where PATH has them. Nothing in PATH is changed, and no
code in it is run. What was written is read back and compared; what is there already is left alone.

Without --repo: the repository around the current directory. One that is named is made if absent.

\b
Examples:
  ckptcoord import ../old/model.pt --repo runs/gpt --step 500
  ckptcoord import outputs/ --repo runs/gpt --dry-run
  ckptcoord import outputs/checkpoint-500 --branch pretrained
  ckptcoord import workspace/gpt --repo runs/gpt --json
"""

app = commands()


@app.command("import", cls=Command, help=_IMPORT_HELP)
def _import(
    path: Annotated[str, typer.Argument(metavar="PATH", show_default=False)],
    *,
    repo_option: RepoOption = None,
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            metavar="NAME",
            help="Onto this branch, main by default; of a source with branches only that one.",
        ),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            "--step",
            metavar="N",
            help="As this step, 0 by default; of a source with several only that one.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import importing

        return importing.run(out, path, repo=repo_option, branch=branch, step=step, dry_run=dry_run)

    return run("import", body, as_json=as_json)
