"""Who holds what of a copy, and hence who writes it: usually every member holds all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.sharing import SharingPattern
from ckptcoord.dist.messages import as_dict, as_int, as_list
from ckptcoord.dist.replication import structure_digest, tensor_digest
from ckptcoord.dist.session import heard
from ckptcoord.errors import ReplicationError
from ckptcoord.plan.placement import Piece, ShardPlan, plan_shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.topology import Scope
    from ckptcoord.dist.capture import CapturedComponent
    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.opening import Opening
    from ckptcoord.dist.session import Session

_Loads: TypeAlias = "dict[tuple[int, ...], dict[int, int]]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inventory:
    """What the members of an instance hold together.

    Attributes:
        pieces: each with those that hold it.
        shared: the names that several hold.
    """

    pieces: tuple[Piece, ...]
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Planned:
    """The files of a copy in the last save.

    Attributes:
        pieces: what it was made of, the same object for as long as nobody's structure changes.
        before: what its writers had to write already.
        after: what they had then.
        shards: the files.
    """

    pieces: Sequence[Piece]
    before: Mapping[int, int]
    after: Mapping[int, int]
    shards: tuple[ShardPlan, ...]


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
        shards = plan_pieces(session, key, scope, pieces, loads.setdefault(scope.writers, {}))
        mine = (shard.names for shard in shards if shard.writer == session.world.rank)
        own[key] = frozenset(name for names in mine for name in names)
    return own


def _expected_pieces(
    session: Session, captured: CapturedComponent, scope: Scope
) -> Sequence[Piece] | None:
    """As `pieces_of` would say if no other member's structure changed since the last save."""
    component = captured.component
    if component.sharing_pattern is not SharingPattern.PER_GROUP or len(scope.writers) == 1:
        return _held_by_all(captured, scope)
    structure, version = session.versions.get(component.key, ("", None))
    if structure != structure_digest(captured):
        return None
    if version is None:
        return _held_by_all(captured, scope)
    found = session.inventories.get((component.key, version))
    return None if found is None else found.pieces


def plan_pieces(
    session: Session,
    key: str,
    scope: Scope,
    pieces: Sequence[Piece],
    loads: dict[int, int],
) -> tuple[ShardPlan, ...]:
    """The files of one copy; `loads`, what its writers have to write, grows by it.

    For the members of a group, who plan for all of them, the last answer is kept.
    """
    known, before = session.planned.get(key), dict(loads)
    if known is None or known.pieces is not pieces or known.before != before:
        size = session.config.max_shard_size
        shards = plan_shards(key, scope, pieces, max_shard_size=size, loads=loads)
        known = Planned(pieces=pieces, before=before, after=dict(loads), shards=shards)
        session.planned[key] = known
    loads.update(known.after)
    return known.shards


def pieces_of(
    session: Session,
    captured: CapturedComponent,
    scope: Scope,
    opening: Opening,
    deadline: Deadline,
) -> Sequence[Piece]:
    """The copy's tensors and who holds them.

    Raises:
        ReplicationError: members hold different tensors by one name.
        CkptError: one of them failed, or fell silent.
    """
    version = opening.versions.get(f"{captured.component.key}/{scope.label}")
    if captured.component.sharing_pattern is SharingPattern.PER_GROUP:
        session.versions[captured.component.key] = (structure_digest(captured), version)
    if version is None:
        return _held_by_all(captured, scope)
    found = _inventory(session, captured, scope, version, deadline)
    if captured.component.validate_replication and found.shared:
        key = f"overlap/{captured.component.key}/{scope.label}/{opening.attempt}"
        digests = heard(lambda: _digests(captured, found.shared))
        said = session.world.exchange(key, scope.writers, digests, deadline=deadline)
        _check_overlap(captured.component.key, found.shared, said)
    return found.pieces


def _held_by_all(captured: CapturedComponent, scope: Scope) -> list[Piece]:
    return [
        Piece(name=name, nbytes=tensor.spec.nbytes, holders=scope.writers)
        for name, tensor in captured.tensors.items()
    ]


def _united(held: Mapping[int, JsonValue], scope: Scope) -> Inventory:
    """The members that hold a tensor of this name and size, for each."""
    holders: dict[tuple[str, int], list[int]] = {}
    for member in scope.writers:
        for name, said in as_dict(held[member]).items():
            nbytes, _ = as_list(said)
            holders.setdefault((name, as_int(nbytes)), []).append(member)
    return Inventory(
        pieces=tuple(
            Piece(name=name, nbytes=nbytes, holders=tuple(ranks))
            for (name, nbytes), ranks in holders.items()
        ),
        shared=tuple(sorted(name for (name, _), ranks in holders.items() if len(ranks) > 1)),
    )


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


def _inventory(
    session: Session,
    captured: CapturedComponent,
    scope: Scope,
    version: str,
    deadline: Deadline,
) -> Inventory:
    """What each member of the instance holds; asked for once per structure."""
    known = session.inventories.get((captured.component.key, version))
    if known is None:
        held = session.world.exchange(
            f"inventory/{captured.component.key}/{scope.label}/{version}",
            scope.writers,
            {
                name: [one.spec.nbytes, f"{one.spec.dtype}{list(one.spec.shape)}"]
                for name, one in captured.tensors.items()
            },
            deadline=deadline,
            keep=True,
        )
        _check_forms(captured.component.key, held, scope)
        known = session.inventories[captured.component.key, version] = _united(held, scope)
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
