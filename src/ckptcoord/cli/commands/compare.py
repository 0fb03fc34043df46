"""Commands that compare checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptcoord.cli.options import AsJson, Command, OneComponent, RepoOption, commands, run

if TYPE_CHECKING:
    from ckptcoord.cli.output import Output

_DIFF_HELP = """Show what differs between two checkpoints: values, layers, tensors.

Of each tensor that changed: the norm of the change over that of the old tensor (relative L2), the
largest change of an element, the cosine of the angle between old and new, and how many elements
differ in any bit. What is NaN or infinite is counted, and in none of these. Those that changed most
come first. What is equal by digest is not read; what is read is checked as in a load.

Values are what a state has beside its tensors (learning rates, steps) and tensors without
dimensions. Metrics are shown, and are no part of the state. A tensor that was saved in pieces is
compared with the same tensor whole, or cut otherwise.

Into a pipe the columns are separated by tabs: tensor, value or metric; changed, reshaped, added,
removed or partial; name; old; new; relative L2; largest change; cosine; elements that differ;
elements. Equal tensors are left out.

\b
Examples:
  ckptcoord diff main@100 main@200
  ckptcoord diff runs/gpt main best --component model --top 5
  ckptcoord diff main@200 exp@300 --exit-code > /dev/null || echo "they differ"
"""

app = commands()


@app.command("diff", cls=Command, help=_DIFF_HELP)
def _diff(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[REPO] REF REF", show_default=False)
    ] = None,
    *,
    repo_option: RepoOption = None,
    top: Annotated[
        str | None,
        typer.Option("--top", metavar="N", help="Only the N of each kind that changed most."),
    ] = None,
    component: OneComponent = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 3 where the states differ.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    def body(out: Output) -> int:
        from ckptcoord.cli import diff, locate

        root, refs = locate.locate_words(words or [], repo_option)
        return diff.run(out, root, refs, component=component, top=top, exit_code=exit_code)

    return run("diff", body, as_json=as_json)
