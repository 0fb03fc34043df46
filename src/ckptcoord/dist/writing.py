"""What one rank writes in a save."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.lossy import EXACT, CompressionLevel
from ckptcoord.core.manifest import FileKind, FileRecord
from ckptcoord.core.sharing import ValidationLevel
from ckptcoord.dist.holdings import pieces_of, plan_pieces
from ckptcoord.dist.opening import validation_of
from ckptcoord.dist.roles import Roles
from ckptcoord.dist.session import heard
from ckptcoord.errors import CkptError
from ckptcoord.plan.placement import (
    ShardPlan,
    delta_path,
    index_path,
    state_path,
)
from ckptcoord.repo.casts import Casts, Equals, Held
from ckptcoord.repo.deltacoding import DeltaSource
from ckptcoord.repo.deltawriting import DeltaFile
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
    from ckptcoord.repo.deltawriting import WrittenDelta

_LEAST_DELTA_BYTES = 4097  # of a tensor: smaller ones are stored as they are
_Loads: TypeAlias = "dict[tuple[int, ...], dict[int, int]]"
_COMPARED = frozenset({ValidationLevel.TENSOR, ValidationLevel.FULL})  # every byte, in this save


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
    writers = [_ComponentWriter(session, attempt, plan) for plan in plans]
    files: list[JsonValue] = []
    shares: list[_Share] = []
    for plan, writer in zip(plans, writers, strict=True):
        if plan.coded:
            shares += writer.shares(plan.shards)
        else:
            files += writer.shards(plan.shards)
    others = _Others(_held(session, plans) if any(plan.coded for plan in plans) else [])
    files += _write_deltas(session, attempt, shares, opening.base, others, coded)
    for plan, writer in zip(plans, writers, strict=True):
        files += writer.documents(plan.shards, own_document=plan.own_document, coded=plan.coded)
    attempt.sync()
    session.step("written")
    return files


def _write_deltas(
    session: Session,
    attempt: Attempt,
    shares: Sequence[_Share],
    base: Base | None,
    others: _Others,
    coded: Callable[[], None],
) -> list[JsonValue]:
    """Write all delta files that fall to this rank: a file is begun before the last one is done."""
    written = attempt.write_deltas(
        (writer.delta_file(plan, base, others) for writer, plan in shares),
        homes=session.bases.by_digest,
        threads=session.config.io_threads,
        coded=coded,
    )
    return [
        writer.delta_record(plan, one) for (writer, plan), one in zip(shares, written, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One component's files.

    Attributes:
        own_document: whether members of the copy hold different things.
        coded: whether they are delta files.
        lossy: what may be given up of a tensor, by its name.
    """

    captured: CapturedComponent
    scope: Scope
    shards: tuple[ShardPlan, ...]
    own_document: bool
    coded: bool
    lossy: Callable[[str], Lossy]

    def path(self, shard: ShardPlan) -> str:
        """The name that a shard gets."""
        return delta_path(shard.path) if self.coded else shard.path


class _Others:
    """What a tensor of this save may be that is another one of it."""

    def __init__(self, held: Sequence[Held]) -> None:
        self.casts = Casts(held)
        self.equals = Equals(held)


def _plan(
    session: Session,
    captured: CapturedComponent,
    opening: Opening,
    loads: _Loads,
    deadline: Deadline,
) -> _Plan:
    key, scope = captured.component.key, session.scope(captured.component)
    pieces = pieces_of(session, captured, scope, opening, deadline)
    shards = plan_pieces(session, key, scope, pieces, loads.setdefault(scope.writers, {}))
    own = f"{key}/{scope.label}" in opening.documents
    level = session.config.rule.level_of(captured.component.compression)
    may_be_coded = opening.base is not None or session.config.rule.compress_anchors
    return _Plan(
        captured=captured,
        scope=scope,
        shards=shards,
        own_document=own,
        coded=may_be_coded and level is not CompressionLevel.OFF,
        lossy=_lossy_of(session, captured),
    )


def _held(session: Session, plans: Sequence[_Plan]) -> list[Held]:
    """Tensors that this rank holds and that may be named, each with its file of this save.

    They are those of which a reader has surely the bytes that this rank has: another rank writes
    them only if it was compared, and nothing may be given up of them. In the order that all ranks
    agree on: plain files, which name nothing, come first.
    """
    rank = session.world.rank
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
        if not plan.coded or plan.lossy(name) == EXACT
    ]


class _ComponentWriter:
    """One component's files on this rank."""

    def __init__(
        self,
        session: Session,
        attempt: Attempt,
        plan: _Plan,
    ) -> None:
        self._session = session
        self._attempt = attempt
        self._captured = plan.captured
        self._component: StateComponent = plan.captured.component
        self._scope = plan.scope
        self._lossy = plan.lossy
        self._rank = session.world.rank
        self._level = session.config.rule.level_of(self._component.compression)

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

    def shares(self, plans: Sequence[ShardPlan]) -> list[_Share]:
        """The delta files that fall to this rank."""
        return [(self, plan) for plan in plans if plan.writer == self._rank]

    def delta_file(self, plan: ShardPlan, base: Base | None, others: _Others) -> DeltaFile:
        """What a delta file is to hold.

        Raises:
            BaseUnreadableError: the base cannot be read.
        """
        if base is not None:
            self._session.bases.look(base, self._component.key, self._scope.label)
        sources = [self._delta_source(plan, name, base, others) for name in plan.names]
        return DeltaFile(path=delta_path(plan.path), tensors=sources, level=self._level)

    def delta_record(self, plan: ShardPlan, written: WrittenDelta) -> JsonValue:
        """Remember what was written of it, and say it."""
        self._session.bases.wrote_delta(self._component.key, self._scope.label, written)
        sources = [one.source[0].folder for one in written.recipes if one.source is not None]
        needs = tuple(sorted({folder for folder in sources if folder}))
        record = self._record(FileKind.DELTA, written.file, plan.nbytes)
        lost = [one.given_up.relative_l2 for one in written.recipes if one.given_up is not None]
        given_up = len(lost), max(lost, default=0.0)
        return replace(record, needs=needs, given_up=given_up).to_json()

    def _delta_source(
        self, plan: ShardPlan, name: str, base: Base | None, others: _Others
    ) -> DeltaSource:
        bases, tensor = self._session.bases, self._captured.tensors[name]
        key, home, lossy = (self._component.key, self._scope.label, name), None, EXACT
        if base is not None:  # anchors are exact
            lossy = self._lossy(name)
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


_Share: TypeAlias = "tuple[_ComponentWriter, ShardPlan]"
"""A delta file that falls to this rank."""


def _lossy_of(session: Session, captured: CapturedComponent) -> Callable[[str], Lossy]:
    """What may be given up of a component's tensors, by name."""
    rule, component = session.config.rule, captured.component
    if rule.is_exact and component.lossy in (None, EXACT):
        return lambda _: EXACT
    roles = Roles(captured, session.parameters.get(component.key, ()))
    return lambda name: rule.lossy_of(component.key, component.lossy, roles.of(name))
