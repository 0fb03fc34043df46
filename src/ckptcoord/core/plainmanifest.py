"""The manifest without its models, which take a tenth of a second to import: for quick answers.

The same laws hold: what `CheckpointManifest.parse` takes is taken here, with the same values by
the same names, and what it refuses is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from operator import attrgetter
from typing import TYPE_CHECKING, Self

from ckptcoord.core.digest import Digest
from ckptcoord.core.fields import Fields
from ckptcoord.core.jsonio import parse_json
from ckptcoord.core.manifest_facts import ManifestFacts
from ckptcoord.core.manifest_fields import (
    FORMAT_VERSION,
    MAX_GROUPS,
    MAX_LINEAGE,
    MAX_MANIFEST_BYTES,
    CheckpointKind,
    FileKind,
)
from ckptcoord.core.manifest_laws import check_whole
from ckptcoord.core.manifest_reader import ManifestReader
from ckptcoord.core.ranks import MAX_WORLD_SIZE
from ckptcoord.core.sharing import SharingPattern, ValidationLevel, check_component_key
from ckptcoord.errors import FormatVersionError, ManifestError

if TYPE_CHECKING:
    from ckptcoord.core.jsonio import JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """As `FileRecord`."""

    path: str
    size_bytes: int
    digest: Digest
    component: str
    scope: str
    writer_rank: int
    kind: FileKind

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str, within: str) -> Self:
        """The file at `within` in the manifest at `path`; a breach is a ManifestError."""
        with ManifestReader(value, path=path, within=within) as given:
            return cls(
                path=given.path("path"),
                size_bytes=given.count("size_bytes"),
                digest=given.digest("digest"),
                component=given.text("component"),
                scope=given.scope("scope"),
                writer_rank=given.count("writer_rank", most=MAX_WORLD_SIZE - 1),
                kind=given.member("kind", FileKind),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainComponent:
    """As `ComponentManifest`."""

    sharing_pattern: SharingPattern
    ranks: str
    replicated_across: tuple[str, ...]
    group_name: str | None
    required: bool
    metadata: dict[str, object]
    size_bytes: int
    stored_bytes: int
    checksum: Digest
    validation: ValidationLevel
    given_up_tensors: int
    given_up: float
    files: tuple[str, ...]

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str, within: str) -> Self:
        """The component at `within` in the manifest at `path`; a breach is a ManifestError."""
        with ManifestReader(value, path=path, within=within) as given:
            return cls(
                sharing_pattern=given.member("sharing_pattern", SharingPattern),
                ranks=given.text("ranks"),
                replicated_across=given.texts("replicated_across"),
                group_name=given.optional_text("group_name"),
                required=given.boolean("required"),
                metadata=given.metadata("metadata"),
                size_bytes=given.count("size_bytes"),
                stored_bytes=given.count("stored_bytes"),
                checksum=given.digest("checksum"),
                validation=given.member("validation", ValidationLevel),
                given_up_tensors=given.count("given_up_tensors"),
                given_up=given.amount("given_up"),
                files=tuple(sorted(given.texts("files"))),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTopology:
    """As `TopologyRecord`."""

    nodes: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str) -> Self:
        """That of the manifest at `path`; a breach is a ManifestError."""
        with ManifestReader(value, path=path, within="topology") as given:
            nodes, groups = given.texts("nodes"), given.mapping("groups")
            if len(groups) > MAX_GROUPS:
                why = f"topology.groups: are over {MAX_GROUPS}"
                raise ManifestError(path=path, why=why)
            with Fields(groups, path=path, within="topology.groups") as each:
                return cls(nodes=nodes, groups={name: each.texts(name) for name in sorted(groups)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLineage:
    """As `LineageRecord`."""

    base_path: str | None
    base_digest: Digest | None
    needs: tuple[str, ...]
    stored_bytes: tuple[int, ...]
    reason: str

    @classmethod
    def from_json(cls, value: JsonValue, *, path: str) -> Self:
        """That of the manifest at `path`; a breach is a ManifestError."""
        with ManifestReader(value, path=path, within="lineage") as given:
            return cls(
                base_path=given.optional_text("base_path"),
                base_digest=given.nullable("base_digest", given.digest),
                needs=given.texts("needs"),
                stored_bytes=given.counts("stored_bytes", MAX_LINEAGE),
                reason=given.text("reason"),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainManifest(ManifestFacts):
    """As `CheckpointManifest`."""

    format_version: int
    checkpoint_id: str
    step: int
    branch: str
    parent: str | None
    kind: CheckpointKind
    base: str | None
    lineage: PlainLineage
    attempt: str
    epoch: float | None
    world_size: int
    topology: PlainTopology
    timestamp: str
    message: str
    metrics: dict[str, float]
    training_args_hash: str | None
    ckptcoord_version: str
    pytorch_version: str
    components: dict[str, PlainComponent]
    files: tuple[PlainFile, ...]

    def to_json(self) -> dict[str, object]:
        """What the model's `model_dump(mode="json")` gives, in the same order."""
        return {field.name: _json(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """Read a manifest, whoever wrote it.

        Raises:
            FormatVersionError: a newer ckptcoord wrote it.
            ManifestError: it breaks the format; says which field and why.
        """
        document = parse_json(data, path=path, max_bytes=MAX_MANIFEST_BYTES)
        if isinstance(document, dict):
            version = document.setdefault("format_version", FORMAT_VERSION)
            if type(version) is int and version > FORMAT_VERSION:
                raise FormatVersionError(path=path, found=version, supported=FORMAT_VERSION)
        manifest = cls._from_json(document, path)
        try:
            check_whole(manifest)
        except ValueError as error:
            raise ManifestError(path=path, why=str(error)) from error
        return manifest

    @classmethod
    def _from_json(cls, value: JsonValue, path: str) -> Self:
        with ManifestReader(value, path=path) as given:
            return cls(
                format_version=given.count("format_version", least=1),
                checkpoint_id=given.text("checkpoint_id"),
                step=given.integer("step"),
                branch=given.text("branch"),
                parent=given.optional_text("parent"),
                kind=given.member("kind", CheckpointKind),
                base=given.optional_text("base"),
                lineage=PlainLineage.from_json(given.value("lineage"), path=path),
                attempt=given.nonce("attempt"),
                epoch=given.nullable("epoch", given.amount),
                world_size=given.count("world_size", least=1, most=MAX_WORLD_SIZE),
                topology=PlainTopology.from_json(given.value("topology"), path=path),
                timestamp=given.timestamp("timestamp"),
                message=given.text("message"),
                metrics=given.numbers("metrics"),
                training_args_hash=given.nullable("training_args_hash", given.short_text),
                ckptcoord_version=given.short_text("ckptcoord_version"),
                pytorch_version=given.short_text("pytorch_version"),
                components=_components(given.mapping("components"), path),
                files=_files(given.items("files"), path),
            )


def _components(given: dict[str, JsonValue], path: str) -> dict[str, PlainComponent]:
    for key in given:
        check_component_key(key)
    return {
        key: PlainComponent.from_json(given[key], path=path, within=f"components.{key}")
        for key in sorted(given)
    }


def _files(given: list[JsonValue], path: str) -> tuple[PlainFile, ...]:
    files = [
        PlainFile.from_json(item, path=path, within=f"files[{at}]") for at, item in enumerate(given)
    ]
    return tuple(sorted(files, key=attrgetter("path")))


def _json(value: object) -> object:
    match value:
        case Digest():
            return str(value)
        case StrEnum():
            return value.value
        case tuple() | list():
            return [_json(item) for item in value]
        case dict():
            return {name: _json(item) for name, item in value.items()}
        case _ if is_dataclass(value):
            return {field.name: _json(getattr(value, field.name)) for field in fields(value)}
        case _:
            return value
