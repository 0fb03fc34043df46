"""Commands that bring checkpoints in from other formats, and out to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, DryRun, GivenRef, RepoOption, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_IMPORT_HELP = """Commit what another tool has saved, in order, each checkpoint as one of ours.

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

_EXPORT_HELP = """Write a checkpoint as a folder that another tool opens.

REF is the checkpoint, or REPO for its latest; DIR is the folder to make. It is read back and
compared before it takes its name; a folder that is there is refused, unless --force is given and
an earlier export made it. The pieces of sharded tensors and of pipelines are put together, deltas
are resolved. --to says for what:

\b
  hf     transformers: safetensors, index, config.json and tokenizer files
  torch  one .pt of tensors that torch.load(weights_only=True) reads
  dcp    torch.distributed.checkpoint, on any number of ranks
  onnx   a graph, made from a module of your own (--model), which is imported

\b
Examples:
  ckptcoord export main@500 out/ --to hf
  ckptcoord export best out/ --to hf --dtype bfloat16 --config-from ../llama
  ckptcoord export runs/gpt/checkpoint-500 out/ --to dcp --all
  ckptcoord export latest out/ --to onnx --model train:make_model
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


@app.command("export", cls=Command, help=_EXPORT_HELP)
def _export(  # noqa: PLR0913 (each is an option)
    ref: GivenRef,
    folder: Annotated[str, typer.Argument(metavar="DIR", show_default=False)],
    *,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORM", help="hf, torch, dcp or onnx.")
    ] = None,
    component: Annotated[
        str, typer.Option("--component", metavar="KEY", help="What to export.")
    ] = "model",
    everything: Annotated[
        bool, typer.Option("--all", help="All components; for torch and dcp.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Cast KEY's floats: bfloat16, float16, ..."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="SIZE", help="Of hf's files; 5GiB by default."),
    ] = None,
    config_from: Annotated[
        str | None,
        typer.Option(
            "--config-from", metavar="PATH", help="hf's config.json and tokenizer are there."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODULE:FUNCTION",
            help="Gives onnx the module and example inputs; it is imported and run.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    repo_option: RepoOption = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import export, locate

        asked = export.wanted(
            to=to,
            component=component,
            everything=everything,
            dtype=dtype,
            max_shard_size=max_shard_size,
            config_from=config_from,
            model=model,
            force=force,
        )
        root, wanted = locate.locate(ref, None, repo_option)
        return export.run(out, root, wanted, folder, asked, dry_run=dry_run)

    return run("export", body, as_json=as_json)
