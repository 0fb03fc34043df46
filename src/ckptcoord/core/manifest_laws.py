"""What must hold between the fields of a manifest; a breach is a ValueError that names a field."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import blake3

from ckptcoord.core.digest import Digest
from ckptcoord.core.manifest_fields import MANIFEST_NAME
from ckptcoord.core.ranks import Runs, parse_runs
from ckptcoord.core.refs import CheckpointId, StepRef, is_checkpoint_folder, parse_ref
from ckptcoord.core.sharing import SharingPattern
from ckptcoord.core.topology import GroupLayout, ScopeKind

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    from ckptcoord.core.manifest import (
        CheckpointManifest,
        ComponentManifest,
        FileRecord,
        TopologyRecord,
    )
    from ckptcoord.core.plainmanifest import (
        PlainComponent,
        PlainFile,
        PlainManifest,
        PlainTopology,
    )

    _Manifest: TypeAlias = CheckpointManifest | PlainManifest
    _Component: TypeAlias = ComponentManifest | PlainComponent
    _File: TypeAlias = FileRecord | PlainFile


def check_whole(manifest: _Manifest) -> None:
    """Check a manifest whose fields are each well formed.

    Raises:
        ValueError: the first breach, as `field: why`.
    """
    _check_identity(manifest)
    _check_topology(manifest.topology, manifest.world_size)
    for key, component in manifest.components.items():
        _check_sharing(f"components.{key}", component, manifest)
    _check_files(manifest)
    _check_lineage(manifest)


def checksum_of(digests_in_path_order: Iterable[Digest]) -> Digest:
    """A component's checksum: BLAKE3 over the raw digests of its files."""
    return Digest(blake3.blake3(b"".join([d.value for d in digests_in_path_order])).digest())


def step_ref(field: str, text: str) -> CheckpointId:
    """The id in a `branch@step`.

    Raises:
        ValueError: the text is anything else.
    """
    ref = parse_ref(text)
    if not isinstance(ref, StepRef) or ref.id.ref != text:
        raise ValueError(f"{field}: {shown(text)} is not <branch>@<step>")
    return ref.id


def shown(text: str) -> str:
    """A text of unknown origin for a message: short, escaped, quoted."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")


def _check_identity(manifest: _Manifest) -> None:
    own = manifest.id
    if manifest.checkpoint_id != str(own):
        raise ValueError(
            f"checkpoint_id: is {shown(manifest.checkpoint_id)}, not {str(own)!r} as branch and "
            "step say"
        )
    for name, other in (("parent", manifest.parent_id), ("base", manifest.base_id)):
        if other == own:
            raise ValueError(f"{name}: is the checkpoint itself")
    if (manifest.kind.value == "delta") != (manifest.base is not None):
        raise ValueError(f"base: is {manifest.base!r} for the kind {manifest.kind.value!r}")


def _check_lineage(manifest: _Manifest) -> None:
    """What an anchor and a delta stand on."""
    lineage, delta = manifest.lineage, manifest.kind.value == "delta"
    for name, value in (("base_path", lineage.base_path), ("base_digest", lineage.base_digest)):
        if delta != (value is not None):
            raise ValueError(f"lineage.{name}: is {value} for the kind {manifest.kind.value!r}")
    _check_needs(lineage.needs)
    if (lineage.base_path in lineage.needs) != delta or bool(lineage.needs) != delta:
        raise ValueError("lineage.needs: a delta needs its base, an anchor nothing")
    if bool(lineage.stored_bytes) != delta:
        raise ValueError("lineage.stored_bytes: a delta comes after its anchor, an anchor first")


def _check_needs(folders: tuple[str, ...]) -> None:
    if list(folders) != sorted(set(folders)):
        raise ValueError("lineage.needs: is not sorted, or names a folder twice")
    for folder in folders:
        if not is_checkpoint_folder(folder):
            raise ValueError(f"lineage.needs: {shown(folder)} is no checkpoint's folder")


def _check_topology(topology: TopologyRecord | PlainTopology, world_size: int) -> None:
    runs = _disjoint("topology.nodes", topology.nodes, world_size, ordered=False)
    if sum(last - first + 1 for first, last in runs) != world_size:
        raise ValueError(f"topology.nodes: do not hold each of {world_size} ranks once")
    for name, instances in topology.groups.items():
        GroupLayout(name=name, instances=())
        field = f"topology.groups.{name}"
        _disjoint(field, instances, world_size)
        firsts = [parse_runs(text)[0] for text in instances]
        if firsts != sorted(firsts):
            raise ValueError(f"{field}: the instances are not in ascending order")


def _disjoint(field: str, texts: Iterable[str], world_size: int, *, ordered: bool = True) -> Runs:
    """The runs of all texts, checked to share no rank and to be of this world."""
    runs: list[tuple[int, int]] = []
    for text in texts:
        own = _runs(field, text)
        if ordered and list(own) != sorted(own):
            raise ValueError(f"{field}: {shown(text)} is not in ascending order")
        runs.extend(own)
    runs.sort()
    for (_, last), (first, _) in pairwise(runs):
        if first <= last:
            raise ValueError(f"{field}: rank {first} is there twice")
    if runs and runs[-1][1] >= world_size:
        raise ValueError(f"{field}: rank {runs[-1][1]} is not in a world of {world_size}")
    return tuple(runs)


def _runs(field: str, text: str) -> Runs:
    try:
        return parse_runs(text)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _check_sharing(field: str, component: _Component, manifest: _Manifest) -> None:
    """Ranks and group of a component fit the topology."""
    _disjoint(f"{field}.ranks", [component.ranks], manifest.world_size)
    _disjoint(f"{field}.replicated_across", component.replicated_across, manifest.world_size)
    name = component.group_name
    if (component.sharing_pattern is SharingPattern.PER_GROUP) != (name is not None):
        raise ValueError(
            f"{field}.group_name: is {name!r} for the pattern {component.sharing_pattern.value!r}"
        )
    if name is not None and name not in manifest.topology.groups:
        raise ValueError(f"{field}.group_name: {shown(name)} is not in topology.groups")


def _check_files(manifest: _Manifest) -> None:
    """Files and components name each other, and sizes and checksums add up."""
    owned: dict[str, list[_File]] = {key: [] for key in manifest.components}
    labels = {key: _labels(component, manifest) for key, component in manifest.components.items()}
    files: tuple[_File, ...] = manifest.files
    _check_paths([record.path for record in files])
    world_size = manifest.world_size
    for at, record in enumerate(files):
        found = owned.get(record.component)
        if found is None:
            raise ValueError(f"files[{at}].component: {shown(record.component)} is unknown")
        if record.writer_rank >= world_size:
            raise ValueError(f"files[{at}].writer_rank: is not in a world of {world_size}")
        # Files of one copy stand side by side: its label is looked at once.
        if not (found and found[-1].scope == record.scope) and not _is_label(
            record.scope, *labels[record.component]
        ):
            raise ValueError(
                f"files[{at}].scope: {shown(record.scope)} is no copy of {record.component!r}"
            )
        found.append(record)
    for key, component in manifest.components.items():
        _check_sums(f"components.{key}", component, owned[key])


def _check_paths(paths: list[str]) -> None:
    """No two files have one path, and none is a folder of another."""
    taken = {MANIFEST_NAME, *paths}
    if len(taken) != len(paths) + 1:
        twice = [a for a, b in pairwise(sorted([MANIFEST_NAME, *paths])) if a == b]
        raise ValueError(f"files: the path {twice[0]!r} is there twice, or reserved")
    for path in paths:
        folder = path.rpartition("/")[0] if "/" in path else ""
        while folder:
            if folder in taken:
                raise ValueError(f"files: the path {folder!r} is a file and a folder")
            folder = folder.rpartition("/")[0]


def _labels(component: _Component, manifest: _Manifest) -> tuple[str, int]:
    """What stands before the number in a component's scope labels, and how many there are."""
    match component.sharing_pattern:
        case SharingPattern.GLOBAL | SharingPattern.REPLICATED:
            return "", 0
        case SharingPattern.PER_RANK:
            return ScopeKind.RANK.value, manifest.world_size
        case SharingPattern.PER_NODE:
            return ScopeKind.NODE.value, len(manifest.topology.nodes)
        case SharingPattern.PER_GROUP:
            name = component.group_name or ""
            return name, len(manifest.topology.groups[name])


def _is_label(label: str, prefix: str, count: int) -> bool:
    if not prefix:
        return label == ""
    digits = label.removeprefix(prefix)
    if len(digits) + len(prefix) != len(label) or not (digits.isascii() and digits.isdigit()):
        return False
    return int(digits) < count and digits == f"{int(digits):05d}"


def _check_sums(field: str, component: _Component, records: list[_File]) -> None:
    found = tuple([record.path for record in records])
    if component.files != found:
        odd = sorted(set(component.files) ^ set(found))
        raise ValueError(
            f"{field}.files: {shown(odd[0])} is listed only here or only in the manifest's files"
            if odd
            else f"{field}.files: names a file twice"
        )
    stored_bytes = sum([record.size_bytes for record in records])
    if component.stored_bytes != stored_bytes:
        raise ValueError(
            f"{field}.stored_bytes: is {component.stored_bytes}, but the files have {stored_bytes}"
        )
    if component.checksum != checksum_of([record.digest for record in records]):
        raise ValueError(f"{field}.checksum: is not that of its files' digests")
