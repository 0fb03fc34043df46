"""`ckptcoord show`: a checkpoint's place in the run, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.cli.commits import Naming, commit_document
from ckptcoord.cli.locate import LATEST, find_commit
from ckptcoord.cli.log import timing_of
from ckptcoord.cli.scalars import Scalar, scalars_of
from ckptcoord.cli.text import (
    Style,
    aligned,
    bytes_text,
    clipped,
    counted,
    printable,
    seconds_text,
    when,
)
from ckptcoord.core.entries import SECONDS
from ckptcoord.plan.ancestry import Ancestry
from ckptcoord.repo.plain import plain_manifest
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.plainmanifest import PlainManifest
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState

_LABEL_CHARS = 8
_LIST_CHARS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """All that is shown of one checkpoint.

    Attributes:
        before: the nearest ancestor that is there, which the metrics are held against.
        children: those that went on from it, by branch and step.
        timing: what its save cost, see `core.entries.Commit`.
    """

    state: LogState
    commit: Commit
    manifest: PlainManifest
    before: Commit | None
    children: tuple[CheckpointId, ...]
    timing: Mapping[str, float]
    scalars: tuple[Scalar, ...]


def run(out: Output, root: Path, ref: str | None) -> int:
    """Show a checkpoint.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        CkptError: the repository, the manifest or a state document cannot be read.
    """
    repository = open_repository(root)
    state = repository.state()
    commit = find_commit(state, root, LATEST if ref is None else ref)
    manifest = plain_manifest(repository, commit)
    above = Ancestry(state).above(commit)
    shown = _Shown(
        state=state,
        commit=commit,
        manifest=manifest,
        before=None if above is None else state.commits[above],
        children=_children(state, commit),
        timing=timing_of(repository, state, commit),
        scalars=scalars_of(repository, commit, manifest),
    )
    if out.as_json:
        out.data({"repository": repository.url, **_document(shown)})
    else:
        out.lines(_lines(out, shown))
    return 0


def _children(state: LogState, commit: Commit) -> tuple[CheckpointId, ...]:
    own = commit.checkpoint_id
    return tuple(sorted(one for one, child in state.commits.items() if child.parent == own))


# --- for people ----------------------------------------------------------------------------------


def _lines(out: Output, shown: _Shown) -> Iterator[str]:
    commit = shown.commit
    names = Naming(shown.state).of(commit.checkpoint_id).text(out.paint)
    yield f"{out.paint(commit.checkpoint_id.ref, Style.YELLOW)}{names}  {commit.path}"
    for label, text in _facts(out, shown):
        yield f"  {out.paint(label.ljust(_LABEL_CHARS), Style.DIM)}  {text}"
    message = shown.manifest.message.strip()
    if message:
        yield ""
        yield from (f"    {printable(line)}".rstrip() for line in message.splitlines())
    rows = _components(shown.manifest)
    if rows:
        yield ""
    for key, *rest in aligned(rows, right=frozenset({1})):
        yield f"  {out.paint(key, Style.BOLD)}  {'  '.join(rest)}".rstrip()


def _facts(out: Output, shown: _Shown) -> Iterator[tuple[str, str]]:
    """What is known beside message and components, as label and text."""
    commit, manifest = shown.commit, shown.manifest
    yield "saved", when(shown.state.stamps[commit.checkpoint_id].timestamp, out.now)
    yield "parent", _parent_text(shown)
    if shown.children:
        refs = ", ".join(one.ref for one in shown.children)
        yield "children", clipped(refs, _LIST_CHARS)
    for at, line in enumerate(_metric_lines(shown)):
        yield "" if at else "metrics", line
    if manifest.epoch is not None:
        yield "epoch", f"{manifest.epoch:g}"
    for at, one in enumerate(shown.scalars):
        yield "" if at else "values", one.text()
    stored = f"{bytes_text(commit.size_bytes)}, {bytes_text(commit.stored_bytes)} stored"
    yield "state", f"{stored} {_kind_text(manifest)}"
    known = [name for name in SECONDS if name in shown.timing]
    times = [f"{name[:-2]} {seconds_text(shown.timing[name])}" for name in known]
    if times:
        yield "save", ", ".join(times)


def _parent_text(shown: _Shown) -> str:
    parent, before = shown.commit.parent, shown.before
    if parent is None:
        return "none"
    if before is not None and before.checkpoint_id == parent:
        return parent.ref
    instead = f"; before it comes {before.checkpoint_id.ref}" if before else ""
    return f"{parent.ref}, which was dropped{instead}"


def _metric_lines(shown: _Shown) -> Iterator[str]:
    """Each metric, and how far it is from that of the ancestor."""
    rows: list[tuple[str, ...]] = []
    for name, number in sorted(shown.commit.metrics.items()):
        old = None if shown.before is None else shown.before.metrics.get(name)
        change = "" if old is None else f"{number - old:+.4g}"
        rows.append((printable(name), f"{number:.6g}", change))
    for name, shown_number, change in aligned(rows, right=frozenset({1})):
        where = f"  from {shown.before.checkpoint_id.ref}" if shown.before and change else ""
        yield f"{name}  {shown_number}  {change}{where}".rstrip()


def _kind_text(manifest: PlainManifest) -> str:
    """`as an anchor: ...`, `as a delta against main@500, which reads 2 other checkpoints`."""
    if manifest.base is None:
        return f"as an anchor: {printable(manifest.lineage.reason)}"
    count = counted(len(manifest.lineage.needs), "other checkpoint")
    return f"as a delta against {manifest.base}; a load reads {count}, too"


def _components(manifest: PlainManifest) -> list[tuple[str, ...]]:
    return [
        (
            key,
            bytes_text(one.size_bytes),
            f"{bytes_text(one.stored_bytes)} stored in {counted(len(one.files), 'file')}",
            f"{one.sharing_pattern.name} {one.group_name or ''}".rstrip(),
        )
        for key, one in manifest.components.items()
    ]


# --- for programs --------------------------------------------------------------------------------


def _document(shown: _Shown) -> dict[str, object]:
    commit, manifest, before = shown.commit, shown.manifest, shown.before
    names = Naming(shown.state).of(commit.checkpoint_id)
    old = {} if before is None else before.metrics
    return {
        **commit_document(shown.state, commit, names),
        "children": [one.ref for one in shown.children],
        "before": None if before is None else before.checkpoint_id.ref,
        "metric_changes": {
            name: number - old[name]
            for name, number in sorted(commit.metrics.items())
            if name in old
        },
        "training_epoch": manifest.epoch,
        "kind": manifest.kind.value,
        "reason": manifest.lineage.reason,
        "base": manifest.base,
        "needs": list(manifest.lineage.needs),
        "values": {one.path: one.value for one in shown.scalars},
        "timing": dict(shown.timing) or None,
        "components": {
            key: {
                "sharing_pattern": one.sharing_pattern.value,
                "size_bytes": one.size_bytes,
                "stored_bytes": one.stored_bytes,
                "files": len(one.files),
            }
            for key, one in manifest.components.items()
        },
    }
