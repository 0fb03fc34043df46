"""From what the ranks wrote to the manifest of the whole checkpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ckptcoord.core.digest import Digest
from ckptcoord.core.manifest import (
    CheckpointKind,
    CheckpointManifest,
    ComponentManifest,
    FileKind,
    FileRecord,
    LineageRecord,
    TopologyRecord,
    checksum_of,
)
from ckptcoord.core.ranks import format_ranks
from ckptcoord.core.sharing import ComponentSpec, SharingPattern, ValidationLevel
from ckptcoord.errors import ManifestError
from ckptcoord.plan.placement import scopes_of
from ckptcoord.redact import redact, redact_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.lossy import CompressionLevel
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.core.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A component as its ranks declared it.

    Attributes:
        compression: its own level; None for the job's.
        is_exact: whether its own settings let nothing of it be given up.
    """

    spec: ComponentSpec
    validation: ValidationLevel
    required: bool
    metadata: Mapping[str, Any] = field(default_factory=dict)
    compression: CompressionLevel | None = None
    is_exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One file as its writer reported it.

    Attributes:
        logical_bytes: the state in it before any coding.
        needs: the folders of checkpoints whose files it refers to.
        given_up: of each tensor that is not exactly the trainer's, the relative L2 norm of what is
            missing; how many there are, and the largest.
    """

    record: FileRecord
    logical_bytes: int
    needs: tuple[str, ...] = ()
    given_up: tuple[int, float] = (0, 0.0)

    def to_json(self) -> JsonValue:
        """For the vote; the writer is known from who says it."""
        record = self.record
        return [
            record.path,
            record.size_bytes,
            record.digest.hex,
            record.component,
            record.scope,
            record.kind.value,
            self.logical_bytes,
            list(self.needs),
            *self.given_up,
        ]

    @classmethod
    def from_json(cls, value: JsonValue, *, writer_rank: int) -> Written:
        """What `to_json` wrote.

        Raises:
            ManifestError: it is malformed.
        """
        match value:
            case [
                str(path),
                int(size),
                str(digest),
                str(component),
                str(scope),
                str(kind),
                int(logical),
                list(needs),
                int(count),
                float(largest),
            ]:
                record = FileRecord(
                    path=path,
                    size_bytes=size,
                    digest=Digest.parse(f"blake3:{digest}"),
                    component=component,
                    scope=scope,
                    writer_rank=writer_rank,
                    kind=FileKind(kind),
                )
                return cls(
                    record=record,
                    logical_bytes=logical,
                    needs=tuple(map(str, needs)),
                    given_up=(count, largest),
                )
            case _:
                raise ManifestError(path=f"vote of rank {writer_rank}", why="is malformed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What a checkpoint stands on.

    Attributes:
        reason: why it is an anchor, or a delta.
        base: the ref, the folder and the manifest's digest of a delta's base.
        needs: the folders of all that it needs.
        stored_bytes: of the last anchor and of each delta since; without this checkpoint.
    """

    reason: str
    base: tuple[str, str, Digest] | None = None
    needs: tuple[str, ...] = ()
    stored_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFacts:
    """What a manifest says beside its files."""

    checkpoint_id: CheckpointId
    parent: CheckpointId | None
    lineage: Lineage
    attempt: str
    epoch: float | None
    topology: Topology
    timestamp: datetime
    components: Sequence[Declared]
    metrics: Mapping[str, float]
    message: str
    training_args_hash: str | None
    ckptcoord_version: str
    pytorch_version: str


def build_manifest(facts: ManifestFacts, files: Sequence[Written]) -> CheckpointManifest:
    """The manifest of a checkpoint; tokens in its message and metadata are masked."""
    lineage = facts.lineage
    by_component: dict[str, list[Written]] = {one.spec.key: [] for one in facts.components}
    for file in sorted(files, key=lambda file: file.record.path):
        by_component[file.record.component].append(file)
    return CheckpointManifest(
        checkpoint_id=str(facts.checkpoint_id),
        step=facts.checkpoint_id.step,
        branch=str(facts.checkpoint_id.branch),
        parent=None if facts.parent is None else facts.parent.ref,
        kind=CheckpointKind.ANCHOR if lineage.base is None else CheckpointKind.DELTA,
        base=None if lineage.base is None else lineage.base[0],
        lineage=LineageRecord(
            base_path=None if lineage.base is None else lineage.base[1],
            base_digest=None if lineage.base is None else lineage.base[2],
            needs=lineage.needs,
            stored_bytes=lineage.stored_bytes,
            reason=lineage.reason,
        ),
        attempt=facts.attempt,
        epoch=facts.epoch,
        world_size=facts.topology.world_size,
        topology=TopologyRecord.of(facts.topology),
        timestamp=facts.timestamp.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        message=redact(facts.message),
        metrics=dict(facts.metrics),
        training_args_hash=facts.training_args_hash,
        ckptcoord_version=facts.ckptcoord_version,
        pytorch_version=facts.pytorch_version,
        components={
            one.spec.key: _component(one, facts.topology, by_component[one.spec.key])
            for one in facts.components
        },
        files=tuple(file.record for file in files),
    )


def _component(
    declared: Declared, topology: Topology, files: Sequence[Written]
) -> ComponentManifest:
    spec = declared.spec
    labels = {file.record.scope for file in files}
    scopes = [scope for scope in scopes_of(spec, topology) if scope.label in labels]
    single = spec.pattern in (SharingPattern.GLOBAL, SharingPattern.PER_RANK)
    return ComponentManifest(
        sharing_pattern=spec.pattern,
        ranks=format_ranks(sorted({rank for scope in scopes for rank in scope.readers})),
        replicated_across=() if single else tuple(format_ranks(s.readers) for s in scopes),
        group_name=spec.group_name,
        required=declared.required,
        metadata=redact_all(dict(declared.metadata)),
        size_bytes=sum(file.logical_bytes for file in files),
        stored_bytes=sum(file.record.size_bytes for file in files),
        checksum=checksum_of(file.record.digest for file in files),
        validation=declared.validation,
        given_up_tensors=sum(file.given_up[0] for file in files),
        given_up=max((file.given_up[1] for file in files), default=0.0),
        files=tuple(file.record.path for file in files),
    )
