"""The components of a checkpoint, their files and tensors, as a tree of lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.cli.text import Style, aligned, bytes_text, clipped, counted, printable, short
from ckptcoord.core.manifest_fields import TENSOR_KINDS
from ckptcoord.core.sharing import SharingPattern, ValidationLevel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ckptcoord.cli.output import Output
    from ckptcoord.cli.text import Painter
    from ckptcoord.codec.bounded import GivenUp
    from ckptcoord.codec.recipe import Recipe
    from ckptcoord.codec.tensorfile import TensorEntry
    from ckptcoord.core.entries import Commit
    from ckptcoord.core.plainmanifest import PlainComponent, PlainFile, PlainManifest
    from ckptcoord.repo.repository import Repository

_RANKS_CHARS = 60
_METADATA_CHARS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One line and what hangs below it."""

    text: str
    children: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTensor:
    """A tensor as its file's header has it.

    Attributes:
        recipe: how one of a delta is made again.
        given_up: how far it is from what the trainer had; None: it is exactly that.
    """

    entry: TensorEntry
    recipe: Recipe | None
    given_up: GivenUp | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guides:
    """What stands before a node, and before what hangs below it; the last of its siblings apart."""

    branch: str
    below: str
    last: str
    below_last: str


_LINES = Guides(branch="├── ", below="│   ", last="└── ", below_last="    ")
_ASCII = Guides(branch="|-- ", below="|   ", last="`-- ", below_last="    ")


def guides_for(out: Output) -> Guides:
    """Lines where stdout can show them."""
    return _LINES if out.can_show(f"{_LINES.branch}{_LINES.below}{_LINES.last}") else _ASCII


def tree_lines(nodes: Iterable[Node], guides: Guides, indent: str = "") -> Iterator[str]:
    """The lines of a forest."""
    nodes = tuple(nodes)
    for at, node in enumerate(nodes):
        is_last = at == len(nodes) - 1
        yield f"{indent}{guides.last if is_last else guides.branch}{node.text}"
        below = guides.below_last if is_last else guides.below
        yield from tree_lines(node.children, guides, indent + below)


def tensors_of(
    repository: Repository, commit: Commit, manifest: PlainManifest, components: Iterable[str]
) -> dict[str, tuple[ShownTensor, ...]]:
    """The tensors of each shard of these components, from the shards' headers.

    Raises:
        CorruptError: a header is not the one that was written.
        StorageError: a shard cannot be read.
    """
    wanted, found = frozenset(components), {}
    for record in manifest.files:
        if record.kind in TENSOR_KINDS and record.component in wanted:
            with repository.open_shard(commit, record) as reader:
                given_up = (
                    reader.given_up()
                    if manifest.components[record.component].given_up_tensors
                    else {}
                )
                found[record.path] = tuple(
                    ShownTensor(
                        entry=entry, recipe=reader.recipes.get(name), given_up=given_up.get(name)
                    )
                    for entry in reader.header.entries
                    for name in (entry.spec.name,)
                )
    return found


def tensor_documents(
    manifest: PlainManifest, tensors: Mapping[str, tuple[ShownTensor, ...]]
) -> list[dict[str, object]]:
    """Tensors as JSON values."""
    return [
        {
            "file": record.path,
            "component": record.component,
            "scope": record.scope,
            "name": entry.spec.name,
            "dtype": entry.spec.dtype,
            "shape": list(entry.spec.shape),
            "size_bytes": entry.spec.nbytes,
            "digest": str(entry.digest),
            **_recipe_document(shown),
        }
        for record in manifest.files
        for shown in tensors.get(record.path, ())
        for entry in (shown.entry,)
    ]


def _recipe_document(shown: ShownTensor) -> dict[str, object]:
    recipe, lost = shown.recipe, shown.given_up
    given_up = None if lost is None else [lost.max_abs, lost.relative_l2]
    if recipe is None:
        return {} if lost is None else {"given_up": given_up}
    source = None if recipe.source is None else [recipe.source[0].path, recipe.source[1]]
    return {
        "how": recipe.how.value,
        "from": source,
        "stored_bytes": shown.entry.end - shown.entry.begin,
        "given_up": given_up,
    }


def _recipe_text(shown: ShownTensor) -> str:
    """`coded in 12 kB`, `same as in checkpoint-100`, `cast of master.w`; and what is given up."""
    lost = "" if shown.given_up is None else f"gives up {shown.given_up.relative_l2:.1e}"
    return ", ".join(part for part in (_how_text(shown), lost) if part)


def _how_text(shown: ShownTensor) -> str:
    recipe = shown.recipe
    if recipe is None:
        return ""
    file, name = recipe.source or (None, "")
    where = file.folder if file is not None and file.folder else "this checkpoint"
    match recipe.how.value:
        case "same":
            return f"same as in {where}"
        case "cast":
            return f"cast of {printable(name)}"
        case how:
            return f"{how} in {bytes_text(shown.entry.end - shown.entry.begin)}"


def component_nodes(
    manifest: PlainManifest,
    components: Iterable[str],
    tensors: Mapping[str, tuple[ShownTensor, ...]],
    paint: Painter,
) -> list[Node]:
    """The tree: component, file, tensor."""
    records: dict[str, list[PlainFile]] = {}
    for record in manifest.files:
        records.setdefault(record.component, []).append(record)
    return [
        Node(
            text=_component_text(key, manifest.components[key], paint),
            children=(
                *_metadata_nodes(manifest.components[key]),
                *_file_nodes(records.get(key, []), tensors, paint),
            ),
        )
        for key in components
    ]


def ranks_text(copies: Iterable[str]) -> str:
    """`0-1 | 2-3`."""
    return clipped(" | ".join(copies), _RANKS_CHARS)


def _component_text(key: str, component: PlainComponent, paint: Painter) -> str:
    parts = [
        component.sharing_pattern.name
        + (f" {component.group_name}" if component.group_name else ""),
        f"rank{'' if component.ranks.isdigit() else 's'} {clipped(component.ranks, _RANKS_CHARS)}",
        *_copies(component),
        f"{bytes_text(component.size_bytes)} in {counted(len(component.files), 'file')}",
    ]
    if component.stored_bytes < component.size_bytes:
        parts.append(f"{bytes_text(component.stored_bytes)} stored")
    if component.given_up_tensors:
        tensors = counted(component.given_up_tensors, "tensor")
        parts.append(f"gives up {component.given_up:.1e} in {tensors}")
    if not component.required:
        parts.append("optional")
    checksum = paint(short(component.checksum), Style.DIM)
    return f"{paint(key, Style.BOLD)}  {', '.join(parts)}  {checksum}"


def _copies(component: PlainComponent) -> Iterator[str]:
    """How many copies there are, and how closely the holders of each were compared."""
    match component.sharing_pattern:
        case SharingPattern.GLOBAL | SharingPattern.PER_RANK:
            return
        case SharingPattern.REPLICATED:
            pass
        case SharingPattern.PER_GROUP | SharingPattern.PER_NODE:
            yield f"copies {ranks_text(component.replicated_across)}"
    if component.validation is ValidationLevel.NONE:
        yield "not compared"
    else:
        yield f"compared: {component.validation.name}"


def _metadata_nodes(component: PlainComponent) -> Iterator[Node]:
    if component.metadata:
        text = clipped(json.dumps(component.metadata), _METADATA_CHARS)
        yield Node(text=f"metadata {printable(text)}")


def _file_nodes(
    records: list[PlainFile], tensors: Mapping[str, tuple[ShownTensor, ...]], paint: Painter
) -> list[Node]:
    rows: list[tuple[str, ...]] = [
        (
            record.path,
            record.kind.value,
            bytes_text(record.size_bytes),
            f"by rank {record.writer_rank}",
            short(record.digest),
        )
        for record in records
    ]
    return [
        Node(
            text=f"{'  '.join(cells)}  {paint(digest, Style.DIM)}",
            children=tuple(_tensor_nodes(tensors.get(record.path, ()), paint)),
        )
        for record, (*cells, digest) in zip(records, _columns(rows), strict=True)
    ]


def _tensor_nodes(entries: tuple[ShownTensor, ...], paint: Painter) -> list[Node]:
    rows: list[tuple[str, ...]] = [
        (
            printable(entry.spec.name),
            entry.spec.dtype,
            bytes_text(entry.spec.nbytes),
            f"[{', '.join(map(str, entry.spec.shape))}]",
            short(entry.digest),
            _recipe_text(shown),
        )
        for shown in entries
        for entry in (shown.entry,)
    ]
    return [
        Node(text=f"{'  '.join(cells)}  {paint(digest, Style.DIM)}  {how}".rstrip())
        for *cells, digest, how in _columns(rows)
    ]


def _columns(rows: list[tuple[str, ...]]) -> list[list[str]]:
    return aligned(rows, right=frozenset({2}))
