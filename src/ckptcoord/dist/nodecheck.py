"""The ranks of a node read from one page cache, so each tensor is checked once a node."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ckptcoord.dist.messages import as_dict
from ckptcoord.dist.shardset import key_of
from ckptcoord.dist.wanted import Wanted, dealt_out
from ckptcoord.errors import ConfigError
from ckptcoord.plan.placement import Piece

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.session import Session
    from ckptcoord.dist.shardset import Proofs, ShardSet, Want
    from ckptcoord.dist.wanted import Key
    from ckptcoord.repo.readers import Proof

_FINGERPRINTS = re.compile("(?:[0-9a-f]{32})*")  # XXH3-128s


class NodeCheck:
    """This rank's part of checking what its node reads, and what the others found.

    What another rank was to check and did not is checked here: ranks need not want the same.

    Args:
        session: of the coordinator.
        shards: that are loaded from.

    Attributes:
        found: of what was checked, what it is held to when it is read.
    """

    def __init__(self, session: Session, shards: ShardSet) -> None:
        self._session = session
        self._shards = shards
        self._rank = session.world.rank
        self._node = next(node for node in session.topology.nodes if self._rank in node)
        self._alone: list[Want] = []
        self._shared: dict[Key, tuple[Want, Piece]] = {}
        self._parts: dict[Key, tuple[Want, bool]] = {}
        self._ranks: Wanted | None = None
        self.found: Proofs = {}

    def add(self, component: StateComponent, want: Want, *, first: bool) -> None:
        """Something that all ranks want that load the same copy of a component.

        Args:
            component: which.
            want: what.
            first: it has to be checked before it is read, so here, if nobody else wants it.
        """
        readers = self._session.scope(component).readers
        mates = tuple(rank for rank in readers if rank in self._node)
        if len(mates) > 1:
            key = key_of(want)
            piece = Piece(name="/".join(key), nbytes=want[0][1].spec.nbytes, holders=mates)
            self._shared[key] = want, piece
        elif first:
            self._alone.append(want)

    def add_part(self, want: Want, *, first: bool) -> None:
        """Something of a tensor in pieces: which ranks want it, too, they have to say."""
        self._parts[key_of(want)] = want, first

    def announce(self) -> None:
        """Let the others of this node know what this rank wants; a round has to follow."""
        if self._parts and len(self._node) > 1:
            self._ranks = Wanted(self._session, [w for w, _ in self._parts.values()], self._node)
            self._ranks.announce()

    def run(self) -> None:
        """Check this rank's part and let the others know.

        Raises:
            CorruptError, StorageError: the first failure.
        """
        pieces = {} if self._ranks is None else self._ranks.shared()
        part = self._dealt([piece for _, piece in self._shared.values()], self._shared)
        part += self._dealt(list(pieces.values()), self._parts)
        for key, (want, first) in self._parts.items():
            if key in pieces:
                self._shared[key] = want, pieces[key]
            elif first:
                self._alone.append(want)
        self._check([*self._alone, *part])
        if self._shared:
            found: dict[str, JsonValue] = {}
            for path, name in map(key_of, part):
                proof = self.found[path, name]
                as_dict(found.setdefault(path, {}))[name] = None if proof is None else proof.hex()
            self._session.world.post("checked", found, deadline=self._session.deadline())

    def _dealt(self, pieces: list[Piece], wants: Mapping[Key, tuple[Want, object]]) -> list[Want]:
        """What of these pieces, each of which several ranks want, this one is to check."""
        ranks = dealt_out(pieces)
        return [want for key, (want, _) in wants.items() if ranks.get("/".join(key)) == self._rank]

    def hear(self, needed: Iterable[Want]) -> None:
        """Take over what the others of this node found, and check what is needed and unknown still.

        Raises:
            CorruptError, StorageError: the first failure.
        """
        if self._shared:
            others = [rank for rank in self._node if rank != self._rank]
            posts = self._session.world.posts("checked", others, deadline=self._session.deadline())
            for post in posts.values():
                for path, names in as_dict(post).items():
                    for name, proof in as_dict(names).items():
                        self.found[path, name] = _proof(proof)
        self._check([want for want in needed if key_of(want) not in self.found])

    def _check(self, wanted: list[Want]) -> None:
        self.found |= self._shards.check(wanted, threads=self._session.config.io_threads)


def _proof(value: JsonValue) -> Proof:
    """Fingerprints in hex, or null."""
    if value is None:
        return None
    if not isinstance(value, str) or not _FINGERPRINTS.fullmatch(value):
        raise ConfigError(field="message", why=f"has the fingerprints {ascii(value)[:80]}")
    return bytes.fromhex(value)
