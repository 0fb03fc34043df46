"""The manifest of one checkpoint: what it holds, who wrote it, and the digest of every file.

The fields and their order are a public interface, described in docs/format.md.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Self

import blake3
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from ckptcoord.core.digest import Digest
from ckptcoord.core.jsonio import parse_json
from ckptcoord.core.manifest_facts import ManifestFacts
from ckptcoord.core.manifest_fields import (
    ATTEMPT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_GROUPS,
    MAX_LINEAGE,
    MAX_MANIFEST_BYTES,
    MAX_METADATA_DEPTH,
    MAX_PATH_CHARS,
    MAX_SCOPE_CHARS,
    MAX_SHORT_CHARS,
    MAX_SIZE_BYTES,
    PATH,
    TENSOR_KINDS,
    CheckpointKind,
    FileKind,
    check_text,
    check_timestamp,
    sorted_json,
)
from ckptcoord.core.manifest_laws import check_whole, checksum_of, shown
from ckptcoord.core.ranks import MAX_WORLD_SIZE, format_ranks, parse_ranks
from ckptcoord.core.sharing import SharingPattern, ValidationLevel, check_component_key
from ckptcoord.core.topology import GroupLayout, Topology
from ckptcoord.errors import FormatVersionError, ManifestError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "TENSOR_KINDS",
    "CheckpointKind",
    "CheckpointManifest",
    "ComponentManifest",
    "FileKind",
    "FileRecord",
    "LineageRecord",
    "TopologyRecord",
    "checksum_of",
]

_SHOWN_ERRORS = 3


def _to_digest(value: object) -> Digest:
    if isinstance(value, Digest):
        return value
    if not isinstance(value, str):
        raise ValueError("is not a digest's text")  # noqa: TRY004 (pydantic collects ValueErrors only)
    return Digest.parse(value)


_Digest = Annotated[Digest, PlainValidator(_to_digest), PlainSerializer(str, return_type=str)]
_Bytes = Annotated[int, Field(ge=0, le=MAX_SIZE_BYTES)]
_Path = Annotated[str, Field(pattern=f"^{PATH}$", max_length=MAX_PATH_CHARS)]
_Texts = Annotated[tuple[str, ...], Field(strict=False)]
_Text = Annotated[str, AfterValidator(check_text)]
_ShortText = Annotated[_Text, Field(min_length=1, max_length=MAX_SHORT_CHARS)]


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
    )


class FileRecord(_Record):
    """One file of a checkpoint.

    Attributes:
        path: relative to the checkpoint's folder, normalised, ASCII.
        size_bytes: its length.
        digest: of a shard over its header and its tensors' digests, else over its bytes.
        component: the key of the component that it belongs to.
        scope: the label of the copy that it belongs to; empty when the job has one copy.
        writer_rank: who wrote it.
        kind: what is in it.
    """

    path: _Path
    size_bytes: _Bytes
    digest: _Digest
    component: str
    scope: Annotated[str, Field(max_length=MAX_SCOPE_CHARS)]
    writer_rank: Annotated[int, Field(ge=0, lt=MAX_WORLD_SIZE)]
    kind: Annotated[FileKind, Field(strict=False)]


class ComponentManifest(_Record):
    """One component of a checkpoint.

    Attributes:
        sharing_pattern: who holds a copy.
        ranks: the ranks that declared it, as runs ("0-3,6").
        replicated_across: the ranks that share each copy, as runs, one text a copy in the order of
            their scopes; empty for GLOBAL and PER_RANK, of which each copy has one holder.
        group_name: the process group, for PER_GROUP.
        required: whether a load without it fails.
        metadata: the trainer's own JSON values.
        size_bytes: of its state before any coding: the tensors of every copy and the documents.
        stored_bytes: of its files.
        checksum: BLAKE3 over its files' raw digests in path order (`checksum_of`).
        validation: how closely its replicas were compared in this save.
        given_up_tensors: how many of its tensors are not exactly what the trainer had.
        given_up: the largest relative L2 norm of what was given up of one of them.
        files: their paths, sorted.
    """

    sharing_pattern: Annotated[SharingPattern, Field(strict=False)]
    ranks: str
    replicated_across: _Texts
    group_name: str | None
    required: bool
    metadata: dict[str, JsonValue]
    size_bytes: _Bytes
    stored_bytes: _Bytes
    checksum: _Digest
    validation: Annotated[ValidationLevel, Field(strict=False)]
    given_up_tensors: _Bytes
    given_up: Annotated[float, Field(ge=0)]
    files: _Texts

    @field_validator("metadata", mode="before")
    @classmethod
    def _check_metadata(cls, value: object) -> object:
        return sorted_json(value, MAX_METADATA_DEPTH)

    @field_validator("files")
    @classmethod
    def _sort_files(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(value))


class TopologyRecord(_Record):
    """Where the saving ranks lived.

    Attributes:
        nodes: the ranks of each node in local order, as runs ("0-3", or "1,0" when out of order).
        groups: name to the ranks of each instance, as runs.
    """

    nodes: _Texts
    groups: Annotated[dict[str, _Texts], Field(max_length=MAX_GROUPS)]

    @field_validator("groups")
    @classmethod
    def _sort_groups(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return dict(sorted(value.items()))

    @classmethod
    def of(cls, topology: Topology) -> Self:
        """The record of a topology."""
        return cls(
            nodes=tuple(format_ranks(node) for node in topology.nodes),
            groups={g.name: tuple(format_ranks(i) for i in g.instances) for g in topology.groups},
        )

    def to_topology(self) -> Topology:
        """The topology that `of` was given.

        Raises:
            ConfigError: the record is not that of a topology (a manifest's always is).
            ValueError: a text is not runs of ranks (a manifest's always is).
        """
        groups = tuple(
            GroupLayout(name=name, instances=tuple(parse_ranks(i) for i in instances))
            for name, instances in self.groups.items()
        )
        return Topology(nodes=tuple(parse_ranks(node) for node in self.nodes), groups=groups)


class LineageRecord(_Record):
    """What a checkpoint stands on, and why it was written as it was.

    Attributes:
        base_path: the folder of the base; of a DELTA only.
        base_digest: of the base's manifest.
        needs: the folders of all checkpoints whose files this one's refer to, and of those that
            they need in turn; sorted.
        stored_bytes: of the last anchor and of each delta after it, before this one; oldest first.
        reason: why it is an anchor or a delta, in words.
    """

    base_path: str | None
    base_digest: _Digest | None
    needs: _Texts
    stored_bytes: Annotated[tuple[_Bytes, ...], Field(strict=False, max_length=MAX_LINEAGE)]
    reason: _Text


class CheckpointManifest(ManifestFacts, _Record):
    """All that is known of one checkpoint, in the order in which it is written.

    Building one checks the same laws as reading one; a breach is a pydantic ValidationError (a
    ValueError) here and a ManifestError in `parse`.

    Attributes:
        checkpoint_id: `checkpoint-500`, or `checkpoint-500@branch`; that of branch and step.
        parent: the ref of the checkpoint that training went on from: `main@400`.
        base: the ref of the checkpoint that deltas are against; of a DELTA only.
        lineage: where that is, what else is needed, and why.
        attempt: the nonce of the save, 32 hex digits.
        epoch: position in the data, in epochs.
        timestamp: UTC, ISO 8601 with `Z`.
        components: by key, sorted.
        files: sorted by path; each belongs to exactly one component.
        training_args_hash: tells whether two runs had the same arguments.
    """

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    checkpoint_id: str
    step: int
    branch: str
    parent: str | None
    kind: Annotated[CheckpointKind, Field(strict=False)]
    base: str | None
    lineage: LineageRecord
    attempt: Annotated[str, Field(pattern=f"^{ATTEMPT}$")]
    epoch: Annotated[float, Field(ge=0)] | None
    world_size: Annotated[int, Field(ge=1, le=MAX_WORLD_SIZE)]
    topology: TopologyRecord
    timestamp: str
    message: _Text
    metrics: dict[_Text, float]
    training_args_hash: _ShortText | None
    ckptcoord_version: _ShortText
    pytorch_version: _ShortText
    components: dict[str, ComponentManifest]
    files: Annotated[tuple[FileRecord, ...], Field(strict=False)]

    @field_validator("metrics")
    @classmethod
    def _sort_metrics(cls, value: dict[str, float]) -> dict[str, float]:
        return dict(sorted(value.items()))

    @field_validator("timestamp")
    @classmethod
    def _check_timestamp(cls, value: str) -> str:
        return check_timestamp(value)

    @field_validator("components")
    @classmethod
    def _sort_components(cls, value: dict[str, ComponentManifest]) -> dict[str, ComponentManifest]:
        for key in value:
            check_component_key(key)
        return dict(sorted(value.items()))

    @field_validator("files")
    @classmethod
    def _sort_files(cls, value: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
        return tuple(sorted(value, key=attrgetter("path")))

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        check_whole(self)
        return self

    def _repr_html_(self) -> str:
        """For notebooks."""
        from ckptcoord.core.html import manifest_html  # late: only notebooks need it

        return manifest_html(self)

    def to_bytes(self) -> bytes:
        """The file's content: the same bytes for the same manifest, made to be read by people.

        Raises:
            ManifestError: it would be larger than `parse` reads.
        """
        data = self.model_dump_json(indent=2).encode() + b"\n"
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(
                path=f"{self.checkpoint_id}/{MANIFEST_NAME}",
                why=f"{len(self.files)} files make {len(data)} bytes of manifest, more than "
                f"{MAX_MANIFEST_BYTES}",
                help="Raise max_shard_size so that there are fewer files",
            )
        return data

    @property
    def digest(self) -> Digest:
        """The digest of `to_bytes()`, which a commit names; computed anew at each call."""
        return Digest(blake3.blake3(self.to_bytes()).digest())

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """Read a manifest, whoever wrote it.

        Raises:
            FormatVersionError: a newer ckptcoord wrote it.
            ManifestError: it breaks the format; says which field and why.
        """
        document = parse_json(data, path=path, max_bytes=MAX_MANIFEST_BYTES)
        version = document.get("format_version") if isinstance(document, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise FormatVersionError(path=path, found=version, supported=FORMAT_VERSION)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ManifestError(path=path, why=_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """The first breaches, each as `field: why`."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = []
    for item in found[:_SHOWN_ERRORS]:
        where = "".join(
            f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in item["loc"]
        ).lstrip(".")
        why = "unknown field" if item["type"] == "extra_forbidden" else item["msg"]
        why = why.removeprefix("Value error, ")
        shown.append(f"{where}: {why}" if where else why)
    more = f"; and {len(found) - _SHOWN_ERRORS} breaches more" if len(found) > _SHOWN_ERRORS else ""
    return "; ".join(shown) + more


def _plain(text: str) -> str:
    return text if len(text) <= 80 and text.isprintable() else shown(text)
