"""What one rank writes in a save."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from ckptcoord.core.manifest import FileKind, FileRecord
from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.messages import as_dict, as_int
from ckptcoord.dist.opening import validation_of
from ckptcoord.dist.replication import tensor_digest
from ckptcoord.dist.session import heard
from ckptcoord.errors import CkptError, ReplicationError
from ckptcoord.plan.lineage import CompressionLevel
from ckptcoord.plan.placement import (
    Piece,
    ShardPlan,
    delta_path,
    index_path,
    plan_shards,
    state_path,
)
from ckptcoord.repo.casts import Casts, Held
from ckptcoord.repo.deltawriting import DeltaSource
from ckptcoord.repo.manifests import Written
from ckptcoord.repo.shards import TensorSource, WrittenFile, hf_index

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.lossy import Lossy
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.core.topology import Scope
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.opening import Opening
    from ckptcoord.dist.session import Session
    from ckptcoord.repo.attempt import Attempt
    from ckptcoord.repo.bases import Base

_Loads: TypeAlias = "dict[tuple[int, ...], dict[int, int]]"
# Running means of gradients, and of their squares, as torch's optimizers call them.
_COMPARED = frozenset({ValidationLevel.TENSOR, ValidationLevel.FULL})  # every byte, in this save
_MOMENTS = dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), 1) | dict.fromkeys(
    ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"), 2
)


def write_pieces(
    session: Session,
    attempt: Attempt,
    held: Mapping[str, CapturedComponent],
    opening: Opening,
) -> JsonValue:
    """Write this rank's share into staging, durably; returns its file records as JSON.

    Raises:
        CkptError: the storage, or replicas of a group's member that differ.
    """
    # All that depends on other ranks comes first, and all of it: a rank that failed with one
    # component or in a write leaves no partner of another one waiting.
    loads: _Loads = {}
    deadline = session.deadline()
    tried = [
        heard(partial(_plan, session, captured, opening, loads, deadline))
        for captured in held.values()
    ]
    plans = [plan for plan in tried if isinstance(plan, _Plan)]
    for failure in tried:
        if isinstance(failure, CkptError):
            raise failure
    files: list[JsonValue] = []
    casts = None if opening.base is None else Casts(_held(plans, session.world.rank))
    for plan in plans:
        write = _ComponentWriter(session, attempt, plan.captured, plan.scope)
        if opening.base is None or casts is None:
            files += write.shards(plan.shards)
        else:
            files += write.deltas(plan.shards, opening.base, casts)
        files += write.documents(
            plan.shards, own_document=plan.own_document, is_delta=opening.base is not None
        )
    attempt.sync()
    session.step("written")
    return files


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One component's files; `own_document` where members of the copy hold different things."""

    captured: CapturedComponent
    scope: Scope
    shards: tuple[ShardPlan, ...]
    own_document: bool


def _plan(
    session: Session,
    captured: CapturedComponent,
    opening: Opening,
    loads: _Loads,
    deadline: Deadline,
) -> _Plan:
    key, scope = captured.component.key, session.scope(captured.component)
    shards = plan_shards(
        key,
        scope,
        _pieces(session, captured, scope, opening, deadline),
        max_shard_size=session.config.max_shard_size,
        loads=loads.setdefault(scope.writers, {}),
    )
    own = f"{key}/{scope.label}" in opening.versions
    return _Plan(captured=captured, scope=scope, shards=shards, own_document=own)


def _held(plans: Sequence[_Plan], rank: int) -> list[Held]:
    """Tensors that this rank holds, and the delta file of this save that each is in.

    Those that another rank writes only if that has surely the same bytes.
    """
    return [
        Held(file=delta_path(shard.path), spec=tensor.spec, head=tensor.head, read=tensor.read)
        for plan in plans
        for shard in plan.shards
        if shard.writer == rank or validation_of(plan.captured.component) in _COMPARED
        for name in shard.names
        # A member of a group may not hold all that its copy is made of.
        for tensor in (plan.captured.tensors.get(name),)
        if tensor is not None
    ]


class _ComponentWriter:
    """One component's files on this rank."""

    def __init__(
        self, session: Session, attempt: Attempt, captured: CapturedComponent, scope: Scope
    ) -> None:
        self._session = session
        self._attempt = attempt
        self._captured = captured
        self._component: StateComponent = captured.component
        self._scope = scope
        self._rank = session.world.rank

    def shards(self, plans: Sequence[ShardPlan]) -> list[JsonValue]:
        """The tensors that fall to this rank."""
        files = []
        for plan in plans:
            if plan.writer != self._rank:
                continue
            sources = [
                TensorSource(spec=self._captured.tensors[name].spec, read=self._read(name))
                for name in plan.names
            ]
            written = self._attempt.write_shard(
                plan.path, sources, threads=self._session.config.io_threads
            )
            self._session.bases.wrote(self._component.key, self._scope.label, written)
            files.append(self._record(FileKind.TENSORS, written, plan.nbytes).to_json())
        return files

    def deltas(self, plans: Sequence[ShardPlan], base: Base, casts: Casts) -> list[JsonValue]:
        """The same as deltas."""
        session, files = self._session, []
        for plan in plans:
            if plan.writer != self._rank:
                continue
            written = self._attempt.write_delta(
                delta_path(plan.path),
                [self._delta_source(name, base, casts) for name in plan.names],
                homes=session.bases.by_digest(),
                level=session.config.rule.level.value,
                threads=session.config.io_threads,
            )
            session.bases.wrote_delta(self._component.key, self._scope.label, written)
            sources = [one.source[0].folder for one in written.recipes if one.source is not None]
            needs = tuple(sorted({folder for folder in sources if folder}))
            record = self._record(FileKind.DELTA, written.file, plan.nbytes)
            lost = [one.given_up.relative_l2 for one in written.recipes if one.given_up is not None]
            files.append(
                replace(record, needs=needs, given_up=(len(lost), max(lost, default=0.0))).to_json()
            )
        return files

    def _delta_source(self, name: str, base: Base, casts: Casts) -> DeltaSource:
        bases, tensor = self._session.bases, self._captured.tensors[name]
        key = (self._component.key, self._scope.label, name)
        return DeltaSource(
            spec=tensor.spec,
            read=tensor.read,
            base=bases.home(base, key, tensor.spec),
            known=partial(bases.known, key),
            wide=casts.find(tensor.spec, tensor.head),
            lossy=self._lossy(name),
        )

    def _lossy(self, name: str) -> Lossy:
        """What may be given up of a tensor; optimizers call their running means by known names."""
        optimizer = isinstance(self._component.stateful, torch.optim.Optimizer)
        moment = _MOMENTS.get(name.rpartition(".")[2], 0) if optimizer else 0
        return self._session.config.rule.lossy_of(
            self._component.key, optimizer=optimizer, moment=moment
        )

    def _read(self, name: str) -> Callable[[], NDArray[np.uint8]]:
        """What gives the tensor's bytes; where deltas will follow, they are remembered by."""
        tensor, bases = self._captured.tensors[name], self._session.bases
        if self._session.config.rule.level is CompressionLevel.OFF:
            return tensor.read
        key = (self._component.key, self._scope.label, name)

        def read_and_remember() -> NDArray[np.uint8]:
            data = tensor.read()
            bases.known(key, data)
            return data

        return read_and_remember

    def documents(
        self, plans: Sequence[ShardPlan], *, own_document: bool, is_delta: bool
    ) -> list[JsonValue]:
        """The state document, and what Hugging Face tools read beside the shards."""
        key, scope = self._component.key, self._scope
        first = scope.writers[0] == self._rank
        files = []
        if own_document or first:
            name = state_path(key, scope, self._rank if own_document else None)
            files.append(self._file(FileKind.STATE, name, self._captured.document))
        if first and len(plans) > 1 and not is_delta:
            names = {plan.path: plan.names for plan in plans}
            index = hf_index(names, sum(plan.nbytes for plan in plans))
            files.append(self._file(FileKind.INDEX, index_path(key, scope), index))
        config = _hf_config(self._component)
        if first and config:
            files.append(self._file(FileKind.CONFIG, "config.json", config))
        return files

    def _file(self, kind: FileKind, name: str, data: bytes) -> JsonValue:
        return self._record(kind, self._attempt.write_file(name, data), len(data)).to_json()

    def _record(
        self,
        kind: FileKind,
        written: WrittenFile,
        logical_bytes: int,
    ) -> Written:
        record = FileRecord(
            path=posixpath.basename(written.path),
            size_bytes=written.size_bytes,
            digest=written.digest,
            component=self._component.key,
            scope=self._scope.label,
            writer_rank=self._rank,
            kind=kind,
        )
        return Written(record=record, logical_bytes=logical_bytes)


def _hf_config(component: StateComponent) -> bytes:
    """The config.json of a Hugging Face model, so that the folder loads with from_pretrained."""
    to_json = getattr(getattr(component.stateful, "config", None), "to_json_string", None)
    if component.key != "model" or not callable(to_json):
        return b""
    return str(to_json()).encode()


def _pieces(
    session: Session,
    captured: CapturedComponent,
    scope: Scope,
    opening: Opening,
    deadline: Deadline,
) -> list[Piece]:
    """The copy's tensors and who holds them: usually every member all of it."""
    version = opening.versions.get(f"{captured.component.key}/{scope.label}")
    if version is None:
        return [
            Piece(name=name, nbytes=tensor.spec.nbytes, holders=scope.writers)
            for name, tensor in captured.tensors.items()
        ]
    held = _inventories(session, captured, scope, version, deadline)
    holders: dict[tuple[str, int], list[int]] = {}
    for member in scope.writers:
        for name, nbytes in as_dict(held[member]).items():
            holders.setdefault((name, as_int(nbytes)), []).append(member)
    shared = sorted(name for (name, _), ranks in holders.items() if len(ranks) > 1)
    if captured.component.validate_replication and shared:
        key = f"overlap/{captured.component.key}/{scope.label}/{opening.attempt}"
        digests = heard(lambda: _digests(captured, shared))
        said = session.world.exchange(key, scope.writers, digests, deadline=deadline)
        _check_overlap(captured.component.key, shared, said)
    return [
        Piece(name=name, nbytes=nbytes, holders=tuple(ranks))
        for (name, nbytes), ranks in holders.items()
    ]


def _inventories(
    session: Session,
    captured: CapturedComponent,
    scope: Scope,
    version: str,
    deadline: Deadline,
) -> dict[int, JsonValue]:
    """What each member of the instance holds; asked for once per structure."""
    known = session.inventories.get((captured.component.key, version))
    if known is None:
        known = session.world.exchange(
            f"inventory/{captured.component.key}/{scope.label}/{version}",
            scope.writers,
            {name: tensor.spec.nbytes for name, tensor in captured.tensors.items()},
            deadline=deadline,
            keep=True,
        )
        session.inventories[captured.component.key, version] = known
    return known


def _check_overlap(key: str, shared: Sequence[str], said: Mapping[int, JsonValue]) -> None:
    """Where two members hold the same name, the bytes must be equal: one of them is written."""
    for name in shared:
        values = {rank: as_dict(word).get(name) for rank, word in said.items()}
        have = {rank: value for rank, value in values.items() if value is not None}
        reference = min(have)
        minority = tuple(rank for rank in sorted(have) if have[rank] != have[reference])
        if minority:
            raise ReplicationError(
                component=key,
                tensor=name,
                minority=minority,
                reference=reference,
                apart="their digests differ",
            )


def _digests(captured: CapturedComponent, names: Sequence[str]) -> JsonValue:
    level = captured.component.validation_level
    return {
        name: tensor_digest(captured.tensors[name], level).hex()
        for name in names
        if name in captured.tensors
    }
