"""What one rank writes in a save."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

from ckptcoord.core.box import parse_piece_name
from ckptcoord.core.lossy import EXACT, CompressionLevel
from ckptcoord.core.manifest import FileKind, FileRecord
from ckptcoord.core.sharing import SharingPattern, ValidationLevel
from ckptcoord.dist.messages import as_dict, as_int, as_list
from ckptcoord.dist.opening import validation_of
from ckptcoord.dist.replication import structure_digest, tensor_digest
from ckptcoord.dist.session import heard
from ckptcoord.errors import CkptError, ReplicationError
from ckptcoord.plan.placement import (
    Piece,
    ShardPlan,
    delta_path,
    index_path,
    plan_shards,
    state_path,
)
from ckptcoord.repo.casts import Casts, Equals, Held
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
    from ckptcoord.plan.lineage import Compression
    from ckptcoord.repo.attempt import Attempt
    from ckptcoord.repo.bases import Base

_LEAST_DELTA_BYTES = 4097  # of a tensor: smaller ones are stored as they are
_Loads: TypeAlias = "dict[tuple[int, ...], dict[int, int]]"
_Holders: TypeAlias = "dict[tuple[str, int], list[int]]"
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
    coded: Callable[[], None],
) -> JsonValue:
    """Write this rank's share into staging, durably; returns its file records as JSON.

    `coded` is called when a file's tensors are coded, so last when all are.

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
    others = _Others(_held(session, plans) if any(plan.coded for plan in plans) else [])
    for plan in plans:
        write = _ComponentWriter(session, attempt, plan.captured, plan.scope, coded)
        if plan.coded:
            files += write.deltas(plan.shards, opening.base, others)
        else:
            files += write.shards(plan.shards)
        files += write.documents(plan.shards, own_document=plan.own_document, coded=plan.coded)
    attempt.sync()
    session.step("written")
    return files


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One component's files.

    Attributes:
        own_document: whether members of the copy hold different things.
        coded: whether they are delta files.
    """

    captured: CapturedComponent
    scope: Scope
    shards: tuple[ShardPlan, ...]
    own_document: bool
    coded: bool

    def path(self, shard: ShardPlan) -> str:
        """The name that a shard gets."""
        return delta_path(shard.path) if self.coded else shard.path


class _Others:
    """What a tensor of this save may be that is another one of it."""

    def __init__(self, held: Sequence[Held]) -> None:
        self.casts = Casts(held)
        self.equals = Equals(held)


def own_tensors(
    session: Session, held: Mapping[str, CapturedComponent]
) -> Mapping[str, frozenset[str]]:
    """What this rank would write of the state that it holds, by component, before a save is open.

    Where that is for the other members of a group to say and they have not said it yet, all of it.
    """
    facts = (
        {key: tuple(tensor.spec for tensor in one.tensors.values()) for key, one in held.items()},
        dict(session.versions),
        frozenset(session.inventories),
    )
    if session.own is None or session.own[0] != facts:
        session.own = (facts, _own_tensors(session, held))
    return session.own[1]


def _own_tensors(
    session: Session, held: Mapping[str, CapturedComponent]
) -> Mapping[str, frozenset[str]]:
    own: dict[str, frozenset[str]] = {}
    loads: _Loads = {}
    unknown: set[tuple[int, ...]] = set()  # whose loads depend on what is not known
    for key, captured in held.items():
        scope = session.scope(captured.component)
        pieces = _expected_pieces(session, captured, scope)
        if pieces is None:
            unknown.add(scope.writers)
        if pieces is None or scope.writers in unknown:
            own[key] = frozenset(captured.tensors)
            continue
        shards = plan_shards(
            key,
            scope,
            pieces,
            max_shard_size=session.config.max_shard_size,
            loads=loads.setdefault(scope.writers, {}),
        )
        mine = (shard.names for shard in shards if shard.writer == session.world.rank)
        own[key] = frozenset(name for names in mine for name in names)
    return own


def _expected_pieces(
    session: Session, captured: CapturedComponent, scope: Scope
) -> list[Piece] | None:
    """As `_pieces` would say if no other member's structure changed since the last save."""
    component = captured.component
    if component.sharing_pattern is not SharingPattern.PER_GROUP or len(scope.writers) == 1:
        return _held_by_all(captured, scope)
    structure, version = session.versions.get(component.key, ("", None))
    if structure != structure_digest(captured):
        return None
    if version is None:
        return _held_by_all(captured, scope)
    found = session.inventories.get((component.key, version))
    return None if found is None else _held_by(_holders(found, scope))


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
    own = f"{key}/{scope.label}" in opening.documents
    level = session.config.rule.level_of(captured.component.compression)
    may_be_coded = opening.base is not None or session.config.rule.compress_anchors
    return _Plan(
        captured=captured,
        scope=scope,
        shards=shards,
        own_document=own,
        coded=may_be_coded and level is not CompressionLevel.OFF,
    )


def _held(session: Session, plans: Sequence[_Plan]) -> list[Held]:
    """Tensors that this rank holds and that may be named, each with its file of this save.

    They are those of which a reader has surely the bytes that this rank has: another rank writes
    them only if it was compared, and nothing may be given up of them. In the order that all ranks
    agree on: plain files, which name nothing, come first.
    """
    rank, rule = session.world.rank, session.config.rule
    ordered = sorted(plans, key=lambda p: (p.coded, p.captured.component.key, p.scope.label))
    return [
        Held(file=plan.path(shard), spec=tensor.spec, head=tensor.head, read=tensor.read)
        for plan in ordered
        for shard in plan.shards
        if shard.writer == rank or validation_of(plan.captured.component) in _COMPARED
        for name in shard.names
        # A member of a group may not hold all that its copy is made of.
        for tensor in (plan.captured.tensors.get(name),)
        if tensor is not None and tensor.value is not None
        if not plan.coded or _lossy(rule, plan.captured.component, name) == EXACT
    ]


class _ComponentWriter:
    """One component's files on this rank."""

    def __init__(
        self,
        session: Session,
        attempt: Attempt,
        captured: CapturedComponent,
        scope: Scope,
        coded: Callable[[], None],
    ) -> None:
        self._session = session
        self._coded = coded
        self._attempt = attempt
        self._captured = captured
        self._component: StateComponent = captured.component
        self._scope = scope
        self._rank = session.world.rank
        self._level = session.config.rule.level_of(captured.component.compression)

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

    def deltas(
        self, plans: Sequence[ShardPlan], base: Base | None, others: _Others
    ) -> list[JsonValue]:
        """The same in delta files."""
        session, files = self._session, []
        if base is not None and any(plan.writer == self._rank for plan in plans):
            session.bases.look(base, self._component.key, self._scope.label)
        for plan in plans:
            if plan.writer != self._rank:
                continue
            written = self._attempt.write_delta(
                delta_path(plan.path),
                [self._delta_source(plan, name, base, others) for name in plan.names],
                homes=session.bases.by_digest,
                level=self._level,
                threads=session.config.io_threads,
                coded=self._coded,
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

    def _delta_source(
        self, plan: ShardPlan, name: str, base: Base | None, others: _Others
    ) -> DeltaSource:
        bases, tensor = self._session.bases, self._captured.tensors[name]
        key, home, lossy = (self._component.key, self._scope.label, name), None, EXACT
        if base is not None:  # anchors are exact
            lossy = _lossy(self._session.config.rule, self._component, name)
        if tensor.spec.nbytes < _LEAST_DELTA_BYTES and not lossy.change_threshold:
            lossy = EXACT
        elif base is not None:
            home = bases.home(base, key, tensor.spec)
        return DeltaSource(
            spec=tensor.spec,
            read=tensor.read,
            base=home,
            held=partial(bases.take, key, home),
            known=partial(bases.known, key),
            equal=others.equals.find(delta_path(plan.path), tensor.spec, tensor.head),
            wide=others.casts.find(tensor.spec, tensor.head),
            lossy=lossy,
        )

    def _read(self, name: str) -> Callable[[], NDArray[np.uint8]]:
        """What gives the tensor's bytes; where deltas will follow, they are remembered by."""
        tensor, bases = self._captured.tensors[name], self._session.bases
        if self._level is CompressionLevel.OFF:
            return tensor.read
        key = (self._component.key, self._scope.label, name)

        def read_and_remember() -> NDArray[np.uint8]:
            data = tensor.read()
            bases.known(key, data)
            return data

        return read_and_remember

    def documents(
        self, plans: Sequence[ShardPlan], *, own_document: bool, coded: bool
    ) -> list[JsonValue]:
        """The state document, and what Hugging Face tools read beside the shards."""
        key, scope = self._component.key, self._scope
        first = scope.writers[0] == self._rank
        files = []
        if own_document or first:
            name = state_path(key, scope, self._rank if own_document else None)
            files.append(self._file(FileKind.STATE, name, self._captured.document))
        if first and len(plans) > 1 and not coded:
            names = {plan.path: plan.names for plan in plans}
            index = hf_index(names, sum(plan.nbytes for plan in plans))
            files.append(self._file(FileKind.INDEX, index_path(key, scope), index))
        if first and self._captured.config:
            files.append(self._file(FileKind.CONFIG, "config.json", self._captured.config))
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


def _lossy(rule: Compression, component: StateComponent, name: str) -> Lossy:
    """What may be given up of a tensor; optimizers call their running means by known names."""
    stateful = component.stateful
    held = getattr(stateful, "optimizer", stateful)  # as in OptimizerState, and Accelerate's
    optimizer = isinstance(held, torch.optim.Optimizer)
    piece = parse_piece_name(name)
    name = name if piece is None else piece[0]
    moment = _MOMENTS.get(name.rpartition(".")[2], 0) if optimizer else 0
    return rule.lossy_of(component.key, component.lossy, optimizer=optimizer, moment=moment)


def _pieces(
    session: Session,
    captured: CapturedComponent,
    scope: Scope,
    opening: Opening,
    deadline: Deadline,
) -> list[Piece]:
    """The copy's tensors and who holds them: usually every member all of it."""
    version = opening.versions.get(f"{captured.component.key}/{scope.label}")
    if captured.component.sharing_pattern is SharingPattern.PER_GROUP:
        session.versions[captured.component.key] = (structure_digest(captured), version)
    if version is None:
        return _held_by_all(captured, scope)
    holders = _holders(_inventories(session, captured, scope, version, deadline), scope)
    shared = sorted(name for (name, _), ranks in holders.items() if len(ranks) > 1)
    if captured.component.validate_replication and shared:
        key = f"overlap/{captured.component.key}/{scope.label}/{opening.attempt}"
        digests = heard(lambda: _digests(captured, shared))
        said = session.world.exchange(key, scope.writers, digests, deadline=deadline)
        _check_overlap(captured.component.key, shared, said)
    return _held_by(holders)


def _held_by_all(captured: CapturedComponent, scope: Scope) -> list[Piece]:
    return [
        Piece(name=name, nbytes=tensor.spec.nbytes, holders=scope.writers)
        for name, tensor in captured.tensors.items()
    ]


def _held_by(holders: _Holders) -> list[Piece]:
    return [
        Piece(name=name, nbytes=nbytes, holders=tuple(ranks))
        for (name, nbytes), ranks in holders.items()
    ]


def _holders(held: Mapping[int, JsonValue], scope: Scope) -> _Holders:
    """The members that hold a tensor of this name and size, for each."""
    holders: _Holders = {}
    for member in scope.writers:
        for name, said in as_dict(held[member]).items():
            nbytes, _ = as_list(said)
            holders.setdefault((name, as_int(nbytes)), []).append(member)
    return holders


def _check_forms(key: str, held: Mapping[int, JsonValue], scope: Scope) -> None:
    """Tensors of one name are one tensor: as many bytes of another dtype or shape are not."""
    first: dict[str, tuple[int, JsonValue]] = {}
    for member in scope.writers:
        for name, said in as_dict(held[member]).items():
            reference, form = first.setdefault(name, (member, said))
            if form != said:
                raise ReplicationError(
                    component=key,
                    tensor=name,
                    minority=(member,),
                    reference=reference,
                    apart=f"{_form_text(said)} against {_form_text(form)}",
                )


def _form_text(said: JsonValue) -> str:
    nbytes, form = as_list(said)
    return f"{form}, {nbytes} bytes"


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
            {
                name: [one.spec.nbytes, f"{one.spec.dtype}{list(one.spec.shape)}"]
                for name, one in captured.tensors.items()
            },
            deadline=deadline,
            keep=True,
        )
        _check_forms(captured.component.key, known, scope)
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
