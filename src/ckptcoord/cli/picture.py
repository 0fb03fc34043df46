"""`ckptcoord log --graph`: a line for each checkpoint, and lines between them."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ckptcoord.cli.commits import Names, Naming, commit_document
from ckptcoord.cli.graph import GLYPHS, Node, children_first, draw
from ckptcoord.cli.text import Style, ago, metrics_text, subject
from ckptcoord.plan.ancestry import Ancestry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState
    from ckptcoord.repo.repository import Repository

_COLORS = (Style.RED, Style.GREEN, Style.YELLOW, Style.CYAN)


def show_picture(
    out: Output, repository: Repository, state: LogState, commits: list[Commit], limit: int | None
) -> None:
    """Show these commits, or the first so many, each above its parent.

    Args:
        out: where.
        repository: whose.
        state: what its log says.
        commits: newest first.
        limit: how many; None: all.
    """
    ancestry, naming = Ancestry(state), Naming(state)
    links = [Node(one.checkpoint_id, ancestry.above(one)) for one in commits]
    nodes = children_first(links)[:limit]
    if out.as_json:
        documents = [_drawn_document(state, one, naming.of(one.key)) for one in nodes]
        out.data({"repository": repository.url, "checkpoints": documents})
    else:
        out.lines(_picture(out, state, nodes, naming))


def _drawn_document(state: LogState, node: Node[CheckpointId], names: Names) -> dict[str, object]:
    commit = state.commits[node.key]
    return {
        **commit_document(state, commit, names),
        "parents": [] if node.parent is None else [node.parent.ref],
        "parent_dropped": _parent_dropped(state, commit),
    }


def _parent_dropped(state: LogState, commit: Commit) -> bool:
    return commit.parent is not None and commit.parent not in state.commits


def _picture(
    out: Output, state: LogState, nodes: list[Node[CheckpointId]], naming: Naming
) -> Iterator[str]:
    show_lines = out.can_show(GLYPHS)
    for row in draw(nodes):
        lines = _painted(out, row.glyphs if show_lines else row.in_ascii(), row.colors)
        if row.node is None:
            yield lines
            continue
        commit = state.commits[row.node.key]
        names = naming.of(row.node.key).text(out.paint)
        ref = out.paint(row.node.key.ref, Style.YELLOW)
        yield "  ".join((f"{lines} {ref}{names}", *_line(out, state, commit)))


def _line(out: Output, state: LogState, commit: Commit) -> Iterator[str]:
    """What stands behind a checkpoint in the picture."""
    stamp = state.stamps[commit.checkpoint_id]
    yield out.paint(ago(stamp.timestamp, out.now), Style.DIM)
    if _parent_dropped(state, commit):
        yield f"[{commit.parent.ref if commit.parent else ''} was dropped]"
    if commit.metrics:
        yield metrics_text(commit.metrics)
    if commit.message.strip():
        yield subject(commit.message)


def _painted(out: Output, glyphs: str, colors: tuple[int, ...]) -> str:
    """Each line in its own colour."""
    parts = groupby(zip(glyphs, colors, strict=False), key=lambda one: one[1])
    return "".join(
        out.paint("".join(glyph for glyph, _ in part), _COLORS[color % len(_COLORS)])
        for color, part in parts
    )
