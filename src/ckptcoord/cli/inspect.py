"""`ckptcoord inspect`: one checkpoint's manifest, as people want to read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.commits import Naming, commit_document, lineage
from ckptcoord.cli.locate import LATEST, find_commit
from ckptcoord.cli.manifest_tree import (
    component_nodes,
    guides_for,
    ranks_text,
    tensor_documents,
    tensors_of,
    tree_lines,
)
from ckptcoord.cli.text import (
    Style,
    bytes_text,
    clipped,
    counted,
    metrics_text,
    printable,
    when,
)
from ckptcoord.errors import ConfigError
from ckptcoord.repo.plain import plain_manifest
from ckptcoord.repo.repository import open_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.plainmanifest import PlainManifest
    from ckptcoord.plan.commit import LogState

_SHOWN_ANCESTORS = 4
_LABEL_CHARS = 9
_NEEDS_CHARS = 120


def run(
    out: Output, root: Path, ref: str | None, *, component: str | None, with_tensors: bool
) -> int:
    """Show a checkpoint.

    Raises:
        RefNotFoundError: there is no such checkpoint.
        ConfigError: it has no such component.
        CkptError: the repository, the manifest or a shard's header cannot be read.
    """
    repository = open_repository(root)
    state = repository.state()
    commit = find_commit(state, root, LATEST if ref is None else ref)
    manifest = plain_manifest(repository, commit)
    shown = _chosen(manifest, component)
    tensors = tensors_of(repository, commit, manifest, shown) if with_tensors else {}
    if out.as_json:
        document = _document(state, commit, manifest)
        if with_tensors:
            document["tensors"] = tensor_documents(manifest, tensors)
        out.data({"repository": repository.url, **document})
        return 0
    nodes = component_nodes(manifest, shown, tensors, out.paint)
    names = Naming(state).of(commit.checkpoint_id).text(out.paint)
    out.lines(
        [
            f"{out.paint(commit.checkpoint_id.ref, Style.YELLOW)}{names}  {commit.path}",
            *(
                f"  {out.paint(label.ljust(_LABEL_CHARS), Style.DIM)}  {text}"
                for label, text in _facts(out, state, commit, manifest)
            ),
            "components" if nodes else "no components",
            *tree_lines(nodes, guides_for(out)),
        ]
    )
    return 0


def _chosen(manifest: PlainManifest, component: str | None) -> tuple[str, ...]:
    if component is None:
        return tuple(manifest.components)
    if component not in manifest.components:
        raise ConfigError(
            field="--component",
            why=f"{component!r} is not in {manifest.id.ref}, which has: "
            f"{', '.join(manifest.components) or 'none'}",
        )
    return (component,)


def _facts(
    out: Output, state: LogState, commit: Commit, manifest: PlainManifest
) -> Iterator[tuple[str, str]]:
    """What is known beside the components, as label and text."""
    versions = f"ckptcoord {manifest.ckptcoord_version}, torch {manifest.pytorch_version}"
    yield "saved", f"{when(manifest.timestamp, out.now)} by {printable(versions)}"
    yield "lineage", _lineage_text(state, commit)
    base = f", against {manifest.base}" if manifest.base else ""
    yield "kind", f"{manifest.kind.value}{base}: {printable(manifest.lineage.reason)}"
    if manifest.lineage.needs:
        yield "needs", clipped(", ".join(manifest.lineage.needs), _NEEDS_CHARS)
    stored = f"{bytes_text(manifest.stored_bytes)} stored in {counted(len(manifest.files), 'file')}"
    yield "size", f"{bytes_text(manifest.size_bytes)}, {stored}"
    if manifest.epoch is not None:
        yield "epoch", f"{manifest.epoch:g}"
    if manifest.metrics:
        yield "metrics", metrics_text(manifest.metrics)
    yield from _origin(state, commit, manifest)
    for at, line in enumerate(manifest.message.splitlines()):
        yield "" if at else "message", printable(line)


def _origin(state: LogState, commit: Commit, manifest: PlainManifest) -> Iterator[tuple[str, str]]:
    """Who wrote it, and on what."""
    nodes = manifest.topology.nodes
    extent = f"{counted(manifest.world_size, 'rank')} on {counted(len(nodes), 'node')}"
    yield "world", f"{extent}: {ranks_text(nodes)}"
    for name, instances in manifest.topology.groups.items():
        yield "group", f"{name}: {ranks_text(instances)}"
    claim = state.claims.get(commit.checkpoint_id.branch)
    ours = claim is not None and claim.writer == commit.writer
    host = f" on {printable(claim.host)}" if claim and ours and claim.host else ""
    yield "writer", f"{commit.writer}{host}, claim {commit.epoch}"
    stamp = state.stamps[commit.checkpoint_id]
    yield "attempt", f"{commit.attempt}, log entry {stamp.number}"
    yield "manifest", str(commit.manifest_digest)
    if manifest.training_args_hash:
        yield "arguments", printable(manifest.training_args_hash)


def _lineage_text(state: LogState, commit: Commit) -> str:
    """`main@500 <- main@400 <- ... <- main@100 (5 in all)`."""
    chain, dropped = lineage(state, commit)
    refs = [checkpoint_id.ref for checkpoint_id in chain]
    if dropped:
        refs[-1] += " (dropped)"
    if len(refs) > _SHOWN_ANCESTORS + 1:
        refs[_SHOWN_ANCESTORS - 1 : -1] = ["..."]
    return f"{' <- '.join(refs)}{f' ({len(chain)} in all)' if len(chain) > len(refs) else ''}"


def _document(state: LogState, commit: Commit, manifest: PlainManifest) -> dict[str, object]:
    names = Naming(state).of(commit.checkpoint_id)
    chain, dropped = lineage(state, commit)
    return {
        **commit_document(state, commit, names),
        "lineage": [checkpoint_id.ref for checkpoint_id in chain],
        "lineage_is_cut": dropped,
        "manifest": manifest.to_json(),
    }
