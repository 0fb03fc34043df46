"""What is said between ranks gets there, or its failure does."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
import torch.distributed as c10d

from ckptcoord.dist import rendezvous
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.messages import as_dict, as_int, as_list, document_of, posted, word_of
from ckptcoord.dist.rendezvous import StoreClient
from ckptcoord.dist.session import heard
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    SaveAbortedError,
    StorageError,
    StoreUnreachableError,
)
from ckptcoord.testing.ranks import run_ranks

UNSAYABLE = [math.nan, object(), {1, 2}, b"bytes"]


def later() -> Deadline:
    return Deadline.after(60)


@pytest.mark.parametrize("value", UNSAYABLE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("odd", [0, 1])
def test_what_cannot_be_sent_is_that_ranks_error(value, odd):
    def work(world):
        world.begin(SaveAbortedError, "x")
        say = value if world.rank == odd else 1
        return world.agree("vote", say, lambda _: None, deadline=later())

    for error in run_ranks(2, work).errors:
        assert isinstance(error, SaveAbortedError)
        assert "cannot be sent" in error.failures[odd]


@pytest.mark.parametrize("value", UNSAYABLE, ids=lambda value: type(value).__name__)
def test_a_decision_that_cannot_be_sent_is_an_error_on_every_rank(value):
    def work(world):
        world.begin(SaveAbortedError, "x")
        return world.agree("vote", 1, lambda _: value, deadline=later())

    assert all(isinstance(error, CkptError) for error in run_ranks(2, work).errors)


def test_an_error_in_an_exchange_is_raised_by_every_member_and_names_its_rank():
    full = StorageError(operation="read", path="x", why="I/O error")

    def work(world):
        world.begin(SaveAbortedError, "x")
        say = full if world.rank == 1 else "fine"
        return world.exchange("k", (0, 1, 2), say, deadline=later())

    for error in run_ranks(3, work).errors:
        assert isinstance(error, SaveAbortedError)
        assert set(error.failures) == {1}
        assert "I/O error" in error.failures[1]


def test_a_post_that_cannot_be_read_is_its_ranks_error():
    assert "ok" in word_of(posted(5, "save (vote)")[0], "rank 1")
    for data in (b"", b"[]", b'{"ok": "\\ud800"}', b"[" * 1000):
        assert set(word_of(data, "rank 1")) == {"error"}


def test_an_error_of_any_content_can_be_said_and_is_of_bounded_size():
    error = CkptError(
        what="x" * 10**6,
        help="\ud800",
        numbers=[math.inf, 1.5, None, True],
        nested={"\udcff": ("a", "b")},
    )
    document = as_dict(word_of(posted(error, "save (vote)")[0], "rank 0")["error"])
    assert len(str(document["what"])) == 10_000
    assert document == document_of(error)
    assert as_dict(document["facts"])["numbers"] == ["inf", 1.5, None, True]
    assert isinstance(CkptError.from_document(document), CkptError)


@pytest.mark.parametrize("read", [as_dict, as_list, as_int])
def test_a_message_of_another_shape_is_refused(read):
    for value in (None, "text", True, 1.5):
        with pytest.raises(ConfigError, match="message"):
            read(value)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_word_for_others(stop):
    def work():
        raise stop

    with pytest.raises(stop):
        heard(work)


def test_a_rank_0_that_is_interrupted_while_it_decides_is_named_by_the_others():
    def interrupted(_):
        raise KeyboardInterrupt

    def work(world):
        world.begin(SaveAbortedError, "x")
        try:
            world.agree("vote", 1, interrupted, deadline=Deadline.after(1))
        except KeyboardInterrupt:
            failure = None
        except SaveAbortedError as error:
            failure = error
        world.begin(SaveAbortedError, "y")
        return failure, world.agree("vote", world.rank, lambda said: said, deadline=later())

    (first, said), (error, _) = run_ranks(2, work).values
    assert first is None
    assert error.silent == (0,)
    assert said == [0, 1]


def test_an_interrupted_wait_does_not_hold_up_the_next_call(monkeypatch):
    client = StoreClient(c10d.HashStore(), hosted_by="here")
    result = "ckptcoord.dist.rendezvous.Future.result"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(result, interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.collect(["never"], Deadline.after(3), "vote")
    before = threading.active_count()
    client.set("k", b"v", Deadline.after(5), "vote")
    assert client.peek(["k"], Deadline.after(5), "vote") == (b"v",)
    assert threading.active_count() == before + 1, "a connection of its own"
    client.close()


@pytest.mark.parametrize("late_s", [0.0, 60.0])
def test_who_was_stopped_past_the_deadline_hears_a_slow_answer_before_the_store_is_blamed(late_s):
    class Slow:
        def clone(self):
            return self

        def check(self, keys):
            time.sleep(0.6)
            return True

        def get(self, key):
            return b"v"

    client = StoreClient(Slow(), hosted_by="here")
    passed = Deadline(time.monotonic() - late_s, 1.0)
    if late_s:
        assert client.peek(["k"], passed, "vote") == (b"v",)
    else:
        with pytest.raises(StoreUnreachableError, match="did not answer"):
            client.peek(["k"], passed, "vote")
    client.close()


def test_who_is_stopped_while_it_waits_hears_what_was_said_meanwhile(monkeypatch):
    answered: Future[bytes] = Future()
    slept_s = 60.0

    def sleep_through(self, timeout):
        if not self.done():
            monkeypatch.setattr(time, "monotonic", lambda: started_s + slept_s)
            self.set_result(b"v")
            raise FutureTimeoutError
        return waited(self, timeout)

    started_s, waited = time.monotonic(), Future.result
    monkeypatch.setattr(Future, "result", sleep_through)
    assert rendezvous._answer(answered, Deadline.after(5)) == b"v"
