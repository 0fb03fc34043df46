"""The ranks of a job and the one way in which they agree: everyone says, rank 0 decides.

`agree` is one round: each rank posts a value or an error, rank 0 collects until the deadline,
decides, and publishes; every rank returns the decision or raises the same error (INV-7). Rounds go
over a private clone of the c10d store, never over the trainer's process groups, so they cannot
deadlock with NCCL and can run beside its collectives.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch.distributed as c10d

from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.messages import (
    as_dict,
    check_same_operation,
    document_of,
    posted,
    reason_of,
    word_of,
)
from ckptcoord.dist.outcomes import is_failure
from ckptcoord.dist.rendezvous import StoreClient, gather, join, store_host
from ckptcoord.errors import (
    CkptError,
    CollectiveError,
    ConfigError,
    StoreUnreachableError,
    ThreadLimitError,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Decide = Callable[[list[JsonValue]], JsonValue]
# How much longer the others wait for rank 0's decision than rank 0 waits for them.
_DECISION_SLACK_S = 1.0
# The store refuses values of more than 8 MiB.
_POST_BYTES = 4 << 20
_worlds = itertools.count()


class World(Protocol):
    """All ranks of the job, seen from one of them."""

    @property
    def rank(self) -> int:
        """This process's number."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def begin(self, operation: type[CollectiveError], label: str) -> None:
        """Start a collective operation: later failures are raised as that class."""
        ...

    def agree(
        self, phase: str, say: JsonValue | CkptError, decide: Decide, *, deadline: Deadline
    ) -> JsonValue:
        """One round; `decide` runs on rank 0 only, on what all ranks said, in rank order.

        Raises:
            CollectiveError: the class given to `begin`, when a rank said an error or nothing.
            DisagreementError: ranks are in different operations.
            CkptError: what `decide` raised, or the error that every rank said alike.
        """
        ...

    def exchange(
        self,
        key: str,
        members: Sequence[int],
        say: JsonValue | CkptError,
        *,
        deadline: Deadline,
        keep: bool = False,
    ) -> dict[int, JsonValue]:
        """What each member posted under `key`; rank 0 has no part in it.

        With `keep`, the posts stay for members that ask later.

        Raises:
            CollectiveError: the class given to `begin`, when a member said an error or nothing.
        """
        ...

    def post(self, key: str, value: JsonValue, *, deadline: Deadline) -> None:
        """Leave a value for other ranks; it stays until this rank's next operation.

        Raises:
            CollectiveError: the class given to `begin`, when the store cannot be reached.
        """
        ...

    def posts(self, key: str, ranks: Sequence[int], *, deadline: Deadline) -> dict[int, JsonValue]:
        """What these ranks left under `key` in this operation, without those that left nothing.

        Nobody is waited for: a round has to lie between the posting and this.

        Raises:
            CollectiveError: the class given to `begin`, when the store cannot be reached.
        """
        ...

    def note(self, where: str) -> None:
        """Leave word of where this rank is, for the message that names it if it falls silent."""
        ...

    def close(self) -> None:
        """End what runs for it."""
        ...


class Solo:
    """A world of one."""

    rank = 0
    size = 1

    def begin(self, operation: type[CollectiveError], label: str) -> None:
        """Nothing to prepare."""

    def agree(
        self, phase: str, say: JsonValue | CkptError, decide: Decide, *, deadline: Deadline
    ) -> JsonValue:
        """Decide alone; an error is raised as it is."""
        if isinstance(say, CkptError):
            raise say
        return decide([say])

    def exchange(
        self,
        key: str,
        members: Sequence[int],
        say: JsonValue | CkptError,
        *,
        deadline: Deadline,
        keep: bool = False,
    ) -> dict[int, JsonValue]:
        """Only one's own word; an error is raised as it is."""
        if isinstance(say, CkptError):
            raise say
        return {0: say}

    def post(self, key: str, value: JsonValue, *, deadline: Deadline) -> None:
        """Nobody reads it."""

    def posts(self, key: str, ranks: Sequence[int], *, deadline: Deadline) -> dict[int, JsonValue]:
        """Nobody else left anything."""
        return {}

    def note(self, where: str) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        """Nothing to close."""


class TorchWorld:
    """The ranks of a torch.distributed job, whatever the backend of its process groups.

    Args:
        store: the job's c10d store, under a prefix that no other world has.
        rank: of this process.
        size: number of ranks.
        host: where the store's server runs, for messages.
        host_is_rank_0: whether that is rank 0's own process.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, host: str, host_is_rank_0: bool
    ) -> None:
        self.rank = rank
        self.size = size
        self._store_on_rank_0 = host_is_rank_0
        self._client = StoreClient(store, hosted_by=host)
        self._met = False
        self._operation = 0
        self._round = 0
        self._error: type[CollectiveError] = CollectiveError
        self._label = ""
        self._stale: tuple[str, ...] = ()
        self._left: tuple[str, ...] = ()
        self._cause: BaseException | None = None

    def begin(self, operation: type[CollectiveError], label: str) -> None:
        """Number the operation, so that its keys are its own."""
        self._operation += 1
        self._round = 0
        self._error = operation
        self._label = label
        # Whoever takes part in a round of this operation has done with the one before.
        self._stale, self._left = (*self._stale, *self._left), ()

    def agree(
        self, phase: str, say: JsonValue | CkptError, decide: Decide, *, deadline: Deadline
    ) -> JsonValue:
        """One round over the store."""
        self._round += 1
        key = f"{self._operation}/{self._round}"
        post, local = posted(say, f"{self._error.operation} ({phase})")
        try:
            self._meet(phase, deadline)
            if self.rank == 0:
                data = self._lead(key, phase, post, decide, deadline)
            else:
                data = self._follow(key, phase, post, deadline)
        except StoreUnreachableError as error:
            raise self._unreachable(phase, error) from error
        return self._outcome(phase, parse_json(data, path=f"decision of {phase}"), local)

    def exchange(
        self,
        key: str,
        members: Sequence[int],
        say: JsonValue | CkptError,
        *,
        deadline: Deadline,
        keep: bool = False,
    ) -> dict[int, JsonValue]:
        """Post one's own and read the other members' values."""
        phase = f"exchange of {key}"
        keys = [f"x/{key}/{member}" for member in members]
        post, local = posted(say, phase)
        try:
            self._client.set(f"x/{key}/{self.rank}", post, deadline, phase)
            values = self._client.collect(keys, deadline, phase)
        except StoreUnreachableError as error:
            raise self._unreachable(phase, error) from error
        if not keep:  # forgotten after the next round, when all members have surely read it
            self._stale = (*self._stale, keys[list(members).index(self.rank)])
        silent = [m for m, value in zip(members, values, strict=True) if value is None]
        if silent:
            raise self._silent(phase, silent, deadline)
        words = {m: word_of(post or b"", phase) for m, post in zip(members, values, strict=True)}
        failures = {m: reason_of(as_dict(w["error"])) for m, w in words.items() if "error" in w}
        if failures:
            raise self._error(phase=phase, failures=failures, label=self._label) from local
        return {member: word["ok"] for member, word in words.items()}

    def post(self, key: str, value: JsonValue, *, deadline: Deadline) -> None:
        """Leave a value in the store."""
        data, phase = dump_json(value), f"post of {key}"
        parts = [data[at : at + _POST_BYTES] for at in range(0, len(data), _POST_BYTES)]
        names = [self._posted_at(key, self.rank, number) for number in range(len(parts))]
        self._left = (*self._left, *names)
        try:
            self._meet(phase, deadline)
            for name, part in zip(names[1:], parts[1:], strict=True):
                self._client.set(name, part, deadline, phase)
            self._client.set(names[0], f"{len(parts)} ".encode() + parts[0], deadline, phase)
        except StoreUnreachableError as error:
            raise self._unreachable(phase, error) from error

    def posts(self, key: str, ranks: Sequence[int], *, deadline: Deadline) -> dict[int, JsonValue]:
        """Read what is in the store by now."""
        phase = f"posts of {key}"
        names = [self._posted_at(key, rank) for rank in ranks]
        try:
            begun = self._client.peek(names, deadline, phase)
            found = {
                rank: self._whole(key, rank, data, deadline, phase)
                for rank, data in zip(ranks, begun, strict=True)
                if data is not None
            }
        except StoreUnreachableError as error:
            raise self._unreachable(phase, error) from error
        return {
            rank: parse_json(data, path=f"{phase} of rank {rank}") for rank, data in found.items()
        }

    def _whole(self, key: str, rank: int, begun: bytes, deadline: Deadline, phase: str) -> bytes:
        """All parts of what a rank has posted: the first one says how many there are."""
        count, _, first = begun.partition(b" ")
        names = [self._posted_at(key, rank, number) for number in range(1, int(count))]
        return first + b"".join(part or b"" for part in self._client.peek(names, deadline, phase))

    def note(self, where: str) -> None:
        """Overwrite this rank's own key; a failure shows at the next round."""
        if not self._client.is_open:
            return  # a store that was lost is looked for by a round, which has the time
        try:
            self._client.set(f"at/{self.rank}", where.encode(), Deadline.after(1.0), "note")
        except StoreUnreachableError:
            return  # the next round has the deadline and the words for it

    def close(self) -> None:
        """End the helper thread."""
        self._client.close()

    def _meet(self, phase: str, deadline: Deadline) -> None:
        """Once, before the first round."""
        if self._met:
            return
        if self.rank == 0:
            gather(self._client, self.size, deadline, phase)
        elif not join(self._client, self.rank, deadline.extended(_DECISION_SLACK_S), phase):
            raise self._silent(phase, [0], deadline)
        self._met = True

    def _posted_at(self, key: str, rank: int, part: int = 0) -> str:
        return f"{self._operation}/p/{key}/{rank}/{part}"

    def _lead(self, key: str, phase: str, post: bytes, decide: Decide, deadline: Deadline) -> bytes:
        others = range(1, self.size)
        posts = self._client.collect([f"{key}/{rank}" for rank in others], deadline, phase)
        decision = self._decide(phase, [post, *posts], decide, deadline)
        self._client.set(f"{key}/decision", decision, deadline.extended(1.0), phase)
        if all(value is not None for value in posts):
            # Everyone has posted here, so everyone has read the decision before.
            self._forget(deadline, phase)
            self._stale = (f"{key}/decision",)
        return decision

    def _follow(self, key: str, phase: str, post: bytes, deadline: Deadline) -> bytes:
        patience = deadline.extended(_DECISION_SLACK_S)
        self._client.set(f"{key}/{self.rank}", post, deadline, phase)
        (value,) = self._client.collect([f"{key}/decision"], patience, phase)
        if value is None:
            raise self._silent(phase, [0], deadline)
        self._forget(deadline, phase)
        self._stale = (f"{key}/{self.rank}",)
        return value

    def _forget(self, deadline: Deadline, phase: str) -> None:
        for key in self._stale:
            self._client.delete(key, deadline.extended(1.0), phase)
        self._stale = ()

    def _decide(
        self, phase: str, posts: list[bytes | None], decide: Decide, deadline: Deadline
    ) -> bytes:
        silent = [rank for rank, post in enumerate(posts) if post is None]
        words = {
            rank: word_of(post, f"rank {rank} in {phase}")
            for rank, post in enumerate(posts)
            if post is not None
        }
        try:
            check_same_operation(words)
            failed = {r: as_dict(word["error"]) for r, word in words.items() if "error" in word}
            if silent or failed:
                return dump_json(self._failures(failed, silent, deadline))
            return dump_json({"ok": decide([word["ok"] for word in words.values()])})
        except CkptError as error:
            self._cause = error
            return dump_json({"verdict": document_of(error)})
        except BaseException as error:
            if not is_failure(error):
                raise
            self._cause = error  # all must hear of it before rank 0 raises it
            what = f"rank 0 failed in phase {phase!r}: {type(error).__name__}: {error}"
            return dump_json({"verdict": document_of(CkptError(what=what))})

    def _failures(
        self, failed: dict[int, dict[str, JsonValue]], silent: Sequence[int], deadline: Deadline
    ) -> JsonValue:
        """What all ranks hear when some said errors or nothing."""
        alike = {dump_json(document) for document in failed.values()}
        if len(failed) == self.size and len(alike) == 1:
            return {"verdict": failed[0]}
        return {
            "failures": {str(rank): reason_of(document) for rank, document in failed.items()},
            "silent": self._last_words(silent, deadline) if silent else {},
        }

    def _outcome(self, phase: str, decision: JsonValue, local: CkptError | None) -> JsonValue:
        if not isinstance(decision, dict):
            raise self._error(phase=phase, failures={0: "sent no decision"}, label=self._label)
        if "ok" in decision:
            return decision["ok"]
        if "verdict" in decision:
            cause, self._cause = self._cause, None
            verdict = as_dict(decision["verdict"])
            if local is not None and verdict == document_of(local):
                raise local  # every rank said this
            raise CkptError.from_document(verdict) from cause
        spoken, silent = (
            {int(rank): str(why) for rank, why in as_dict(decision[name]).items()}
            for name in ("failures", "silent")
        )
        raise self._error(
            phase=phase, failures=spoken | silent, silent=tuple(sorted(silent)), label=self._label
        ) from local

    def _last_words(self, ranks: Sequence[int], deadline: Deadline) -> dict[str, JsonValue]:
        """For each silent rank, how long it was waited for and where it was last seen."""
        try:
            notes = self._client.peek(
                [f"at/{rank}" for rank in ranks], Deadline.after(1.0), "last words"
            )
        except StoreUnreachableError:
            notes = (None,) * len(ranks)
        return {
            str(rank): f"silent for {deadline.span_s:g} s, last seen in {note.decode()!r}"
            if note
            else f"silent for {deadline.span_s:g} s"
            for rank, note in zip(ranks, notes, strict=True)
        }

    def _silent(self, phase: str, ranks: Sequence[int], deadline: Deadline) -> CollectiveError:
        words = {int(rank): str(why) for rank, why in self._last_words(ranks, deadline).items()}
        return self._error(phase=phase, failures=words, silent=tuple(ranks), label=self._label)

    def _unreachable(self, phase: str, error: StoreUnreachableError) -> CollectiveError:
        own = isinstance(error.__cause__, ThreadLimitError)  # nobody was asked
        lost = self._store_on_rank_0 and not own
        return self._error(
            phase=phase,
            failures={0 if lost else self.rank: error.what},
            silent=(0,) if lost else (),
            label=self._label,
        )


def current_world() -> World:
    """torch.distributed's world when it is initialised, else a world of one.

    Raises:
        ConfigError: a launcher started several processes but the process group is not initialised.
    """
    if c10d.is_available() and c10d.is_initialized():
        store = c10d.distributed_c10d._get_default_store()  # noqa: SLF001 (no public way to it)
        host, host_is_rank_0 = store_host()
        # Worlds are made in the same order on every rank, so a count gives each the same prefix.
        prefix = f"ckptcoord/{next(_worlds)}"
        return TorchWorld(
            c10d.PrefixStore(prefix, store),  # type: ignore[attr-defined]  # it does export it
            c10d.get_rank(),
            c10d.get_world_size(),
            host=host,
            host_is_rank_0=host_is_rank_0,
        )
    promised = os.environ.get("WORLD_SIZE", "1")  # noqa: TID251 (dist is an edge)
    if promised not in ("", "1"):
        raise ConfigError(
            field="torch.distributed",
            why=f"WORLD_SIZE is {promised}, but the process group is not initialised",
            help="Call torch.distributed.init_process_group() before making the coordinator",
        )
    return Solo()
