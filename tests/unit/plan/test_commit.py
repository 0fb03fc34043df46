"""The transition table: what the log says, and what may be said next."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import (
    Claim,
    Commit,
    Entry,
    Fork,
    Retire,
    Rewrite,
    Snapshot,
    Sweep,
    Tag,
)
from ckptcoord.core.refs import BranchName, CheckpointId, TagName, parse_ref
from ckptcoord.errors import (
    AttemptSweptError,
    BaseGoneError,
    BranchExistsError,
    CheckpointExistsError,
    CheckpointInUseError,
    CkptError,
    ConfigError,
    FencedError,
    ManifestError,
    RefNotFoundError,
)
from ckptcoord.plan.commit import (
    MAX_SWEPT,
    SNAPSHOT_EVERY,
    STAGING,
    LogState,
    apply,
    branches,
    head,
    latest,
    live_folders,
    needed_by,
    next_epoch,
    parent_of,
    refusal,
    replay,
    resolve,
    snapshot_of,
    state_from_snapshot,
    taken_folders,
)

ALICE, BOB = "a" * 32, "b" * 32
TIME = "2026-01-02T03:04:05Z"
MAIN, EXP = BranchName(), BranchName("exp")


def cid(step, branch=MAIN):
    return CheckpointId(branch, step)


def claim(branch=MAIN, epoch=1, writer=ALICE):
    return Claim(writer=writer, branch=branch, epoch=epoch, world_size=1)


BESIDE = "checkpoint-1.01234567"


def commit(step, branch=MAIN, **changes):
    path = changes.get("path", str(cid(step, branch)))
    whole = {
        "writer": ALICE,
        "checkpoint_id": cid(step, branch),
        "path": path,
        "manifest_digest": Digest(bytes(32)),
        "epoch": 1,
        "attempt": path.encode().hex()[-32:].rjust(32, "0"),
        "size_bytes": 1,
        "stored_bytes": 1,
    }
    return Commit(**{**whole, **changes})


def fork(branch=EXP, source=None):
    return Fork(writer=ALICE, branch=branch, source=source or cid(1))


def tag(name="best", target=None):
    return Tag(writer=ALICE, name=TagName(name), target=target)


def retire(*ids):
    return Retire(writer=ALICE, checkpoint_ids=ids)


def sweep(*paths):
    return Sweep(writer=ALICE, paths=paths)


def following(state, body):
    return Entry(number=state.number + 1, timestamp=TIME, body=body)


def refused(state, body):
    return refusal(state, following(state, body))


def log(*bodies, state=None):
    """The state after these, each of which must be allowed."""
    state = state or LogState()
    for body in bodies:
        assert refused(state, body) is None, body
        state = apply(state, following(state, body))
    return state


# --- timing -------


TIMING = {"stall_s": 0.5, "slowest_rank": 1}


def test_the_state_does_not_keep_the_times_of_saves():
    state = log(claim(), commit(1, timing=TIMING), commit(2, timing=TIMING))
    assert state == log(claim(), commit(1), commit(2))
    other = commit(1, path=BESIDE, replaces="checkpoint-1", timing=TIMING)
    rewritten = log(Rewrite(writer=ALICE, commit=other), state=state)
    assert rewritten.commits[cid(1)] == replace(other, timing={})
    assert "timing" not in json.dumps(snapshot_of(rewritten))


def test_a_snapshot_with_the_times_of_a_save_is_refused():
    value = snapshot_of(log(claim(), commit(1)))
    value["commits"][0]["commit"]["timing"] = TIMING
    with pytest.raises(ManifestError, match="timing"):
        state_from_snapshot(value, path="s")


# --- fencing -------


def test_a_commit_needs_a_claim():
    error = refused(LogState(), commit(1))
    assert isinstance(error, FencedError)
    assert (error.holder, error.epoch) == ("nobody", 0)
    assert log(claim(), commit(1)).commits[cid(1)] == commit(1)


def test_a_writer_is_fenced_by_a_later_claim():
    state = log(claim(), claim(epoch=2, writer=BOB))
    error = refused(state, commit(1))
    assert isinstance(error, FencedError)
    assert (error.writer, error.holder, error.epoch, error.branch) == (ALICE, BOB, 2, "main")
    assert "on host" not in error.what
    log(commit(1, writer=BOB, epoch=2), state=state)


def test_who_is_fenced_hears_on_which_host_the_other_writer_is():
    state = log(claim(), replace(claim(epoch=2, writer=BOB), host="node-7\x1b"))
    error = refused(state, commit(1))
    assert f"claimed by writer {BOB} on host 'node-7\\x1b' (epoch 2)" in error.what
    assert CkptError.from_document(error.to_document()).host == "node-7\x1b"


def test_a_writer_is_fenced_by_its_own_later_claim():
    state = log(claim(), claim(epoch=2))
    assert isinstance(refused(state, commit(1)), FencedError)
    log(commit(1, epoch=2), state=state)


def test_a_claim_fences_its_own_branch_only():
    state = log(claim(), claim(EXP, writer=BOB))
    log(commit(1), state=state)
    assert isinstance(refused(state, commit(1, EXP)), FencedError)


def test_a_claim_takes_the_next_epoch_of_its_branch():
    state = log(claim(), claim(epoch=2), claim(EXP))
    assert isinstance(refused(state, claim(epoch=2, writer=BOB)), FencedError)
    assert isinstance(refused(state, claim(epoch=4)), ConfigError)
    assert (next_epoch(state, MAIN), next_epoch(state, BranchName("new"))) == (3, 1)


# --- commits -------


def test_a_step_is_committed_once_unless_its_folder_is_named():
    state = log(claim(), commit(1))
    assert isinstance(refused(state, commit(1)), CheckpointExistsError)
    assert isinstance(
        refused(state, commit(1, path=BESIDE, replaces="checkpoint-1.00000000")),
        CheckpointExistsError,
    )
    over = commit(1, path=BESIDE, replaces="checkpoint-1", message="again")
    state = log(over, state=state)
    assert state.commits == {cid(1): over}
    assert isinstance(
        refused(state, commit(1, path="checkpoint-1.89abcdef", replaces="checkpoint-1")),
        CheckpointExistsError,
    )


def test_a_committed_folder_is_never_committed_again():
    state = log(claim(), commit(1))
    assert isinstance(refused(state, commit(1, replaces="checkpoint-1")), CheckpointInUseError)
    # A branch's name may end like the folder of a replaced checkpoint.
    state = log(claim(EXP), claim(odd := BranchName("exp.01234567")), commit(1, odd))
    body = commit(1, EXP, path="checkpoint-1@exp.01234567")
    assert isinstance(refused(state, body), CheckpointInUseError)


@pytest.mark.parametrize(
    "path",
    [
        "checkpoint-2",
        "b",
        "",
        "..",
        "checkpoint-1.",
        "checkpoint-1.0123456",
        "checkpoint-1.0123456G",
    ],
)
def test_a_commit_names_no_folder_but_its_own(path):
    for changes in ({"path": path}, {"replaces": path}):
        with pytest.raises(ConfigError, match="cannot be the folder of checkpoint-1"):
            commit(1, **changes)


def test_the_fence_is_asked_before_the_step():
    state = log(claim(), commit(1), claim(epoch=2, writer=BOB))
    assert isinstance(refused(state, commit(1)), FencedError)


def test_latest_and_heads_go_by_the_log_and_not_by_the_step():
    state = log(claim(), commit(700), claim(EXP), commit(1, EXP), commit(500))
    assert latest(state).checkpoint_id == cid(500)
    assert head(state, MAIN).checkpoint_id == cid(500)
    assert head(state, EXP).checkpoint_id == cid(1, EXP)
    assert head(state, BranchName("new")) is None
    over = commit(700, path="checkpoint-700.01234567", replaces="checkpoint-700")
    assert latest(log(over, state=state)) == over
    assert latest(LogState()) is None


# --- forks, tags, retirement, sweeps -------


def test_a_fork_begins_at_its_source():
    state = log(claim(), commit(1), commit(2), fork())
    assert head(state, EXP) == state.commits[cid(1)]
    assert branches(state) == (EXP, MAIN)
    assert parent_of(state, cid(5, EXP)) == cid(1)
    state = log(claim(EXP), commit(2, EXP), state=state)
    assert head(state, EXP) == state.commits[cid(2, EXP)]


def test_a_fork_needs_a_new_name_and_a_known_source():
    state = log(claim(), commit(1), claim(EXP))
    for branch in (MAIN, EXP):
        assert isinstance(refused(state, fork(branch)), BranchExistsError)
    error = refused(state, fork(BranchName("new"), cid(3)))
    assert isinstance(error, RefNotFoundError)
    assert (error.ref, error.nearest) == ("main@3", ("main@1",))


def test_a_parent_is_the_head_or_what_the_replaced_commit_had():
    state = log(claim(), commit(1), commit(2, parent=cid(1)))
    assert parent_of(state, cid(3)) == cid(2)
    assert parent_of(state, cid(2)) == cid(1)
    assert parent_of(state, cid(1)) is None
    assert parent_of(LogState(), cid(1)) is None


def test_tags_are_set_moved_and_deleted():
    state = log(claim(), commit(1), commit(2), tag(target=cid(1)), tag(target=cid(2)))
    assert state.tags == {TagName("best"): cid(2)}
    assert log(tag(), state=state).tags == {}
    assert isinstance(refused(state, tag(target=cid(9))), RefNotFoundError)
    error = refused(state, tag("bets"))
    assert isinstance(error, RefNotFoundError)
    assert error.nearest == ("best",)


def test_retiring_drops_a_commit_and_remembers_its_folder_until_it_is_swept():
    state = log(claim(), commit(1), commit(2), retire(cid(2)))
    assert list(state.commits) == list(state.stamps) == [cid(1)]
    assert [one.commit for one in state.retired.values()] == [commit(2)]
    assert latest(state).checkpoint_id == cid(1)
    error = refused(state, commit(2))
    assert isinstance(error, CheckpointInUseError)
    assert "retired checkpoint-2" in error.used_by
    beside = commit(2, path="checkpoint-2.01234567", attempt="1" * 32)
    state = log(beside, state=state)
    assert list(state.retired) == ["checkpoint-2"]
    state = log(sweep("checkpoint-2"), state=state)
    assert state.retired == {}
    assert state.commits[cid(2)] == beside


def test_a_replaced_checkpoint_is_retired():
    state = log(claim(), commit(1), commit(1, path=BESIDE, replaces="checkpoint-1"))
    assert [one.commit for one in state.retired.values()] == [commit(1)]
    assert state.retired["checkpoint-1"].stamp.number == 3


def test_what_is_named_or_unknown_is_not_retired():
    state = log(claim(), commit(1), commit(2), commit(3), tag(target=cid(1)), fork(source=cid(2)))
    for ids, kind, word in (
        ((cid(9),), RefNotFoundError, "main@9"),
        ((cid(3), cid(1)), CheckpointInUseError, "tag 'best'"),
        ((cid(2),), CheckpointInUseError, "branch 'exp'"),
    ):
        error = refused(state, retire(*ids))
        assert isinstance(error, kind)
        assert word in error.what
    # Once the branch has a checkpoint of its own, its fork point may go; lineage keeps its name.
    state = log(claim(EXP), commit(5, EXP), retire(cid(2)), state=state)
    assert state.forks[EXP].source == cid(2)


def test_a_branch_whose_checkpoints_are_all_gone_has_no_head():
    state = log(claim(), commit(1), fork(), claim(EXP), commit(2, EXP), retire(cid(1)))
    state = log(retire(cid(2, EXP)), state=state)
    assert head(state, EXP) is None
    assert parent_of(state, cid(3, EXP)) is None


def test_nothing_live_is_swept():
    state = log(claim(), commit(1), commit(2), retire(cid(2)))
    for path in ("checkpoint-1", "checkpoint-1/model.safetensors"):
        assert isinstance(refused(state, sweep("x", path)), CheckpointInUseError)
    assert log(sweep("checkpoint-2", ".ckptcoord/staging/x"), state=state).commits == state.commits


# --- what a checkpoint needs -------


def test_what_a_live_checkpoint_needs_is_not_swept_though_it_is_retired():
    delta = commit(2, needs=("checkpoint-1",))
    state = log(claim(), commit(1), delta, retire(cid(1)))
    for path in ("checkpoint-1", "checkpoint-1/model.safetensors"):
        error = refused(state, sweep(path))
        assert isinstance(error, CheckpointInUseError)
        assert "main@2" in error.used_by
    assert live_folders(state) == taken_folders(state) == {"checkpoint-1", "checkpoint-2"}
    assert needed_by(state, "checkpoint-1") == (cid(2),)
    assert isinstance(refused(state, commit(1)), CheckpointInUseError)
    state = log(commit(3), retire(cid(2)), state=state)
    assert live_folders(state) == {"checkpoint-3"}
    log(sweep("checkpoint-1", "checkpoint-2"), state=state)


def test_a_base_may_be_live_or_retired_but_not_swept_and_not_unknown():
    delta = commit(2, needs=("checkpoint-1",))
    state = log(claim(), commit(1))
    log(delta, state=state)
    state = log(retire(cid(1)), state=state)
    log(delta, state=state)
    state = log(sweep("checkpoint-1"), state=state)
    for state_ in (state, log(claim())):
        error = refused(state_, delta)
        assert isinstance(error, BaseGoneError)
        assert error.folder == "checkpoint-1"


def test_a_replaced_checkpoint_may_be_the_base_of_what_replaces_it():
    over = commit(1, path=BESIDE, replaces="checkpoint-1", needs=("checkpoint-1",))
    state = log(claim(), commit(1), over)
    assert isinstance(refused(state, sweep("checkpoint-1")), CheckpointInUseError)


def test_a_swept_attempt_commits_no_more():
    state = log(claim(), sweep(f"{STAGING}/{'1' * 32}", f"{STAGING}/{'2' * 32}-debris"))
    assert isinstance(refused(state, commit(1, attempt="1" * 32)), AttemptSweptError)
    log(commit(1, attempt="2" * 32), state=state)  # its debris was swept, not its own files
    state = log(commit(1), retire(cid(1)), sweep("checkpoint-1"), state=state)
    assert isinstance(refused(state, commit(1)), AttemptSweptError)
    log(commit(1, attempt="3" * 32), state=state)


def test_the_attempt_of_a_live_checkpoint_is_not_swept():
    state = log(claim(), commit(1, attempt="1" * 32))
    error = refused(state, sweep(f"{STAGING}/{'1' * 32}"))
    assert isinstance(error, CheckpointInUseError)
    assert "checkpoint-1" in error.used_by


def test_the_newest_swept_attempts_are_remembered_however_the_log_is_read():
    nonces = [f"{number:032x}" for number in [*range(MAX_SWEPT), 0, *range(MAX_SWEPT + 9)]]
    bodies = [
        sweep(*(f"{STAGING}/{one}" for one in nonces[at : at + 7])) for at in range(0, 999, 7)
    ]
    bodies.append(sweep(*(f"{STAGING}/{one}" for one in nonces[999:])))
    entries = [Entry(number=i, timestamp=TIME, body=b) for i, b in enumerate(bodies, 1)]
    state = LogState()
    for entry in entries:
        state = apply(state, entry)
    assert replay(LogState(), entries) == state
    assert len(state.swept) == MAX_SWEPT
    assert state.swept[-1] == nonces[-1]


# --- refs -------


@pytest.fixture
def history():
    state = log(claim(), *(commit(step) for step in (0, 90, 100, 110, 1000)), fork(source=cid(90)))
    return log(claim(EXP), commit(95, EXP), tag("best", cid(100)), state=state)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("main@100", "checkpoint-100"),
        ("checkpoint-100", "checkpoint-100"),
        ("checkpoint-95@exp", "checkpoint-95@exp"),
        ("latest", "checkpoint-95@exp"),
        ("main@latest", "checkpoint-1000"),
        ("exp@latest", "checkpoint-95@exp"),
        ("best", "checkpoint-100"),
        ("exp", "checkpoint-95@exp"),
        ("main", "checkpoint-1000"),
        ("./checkpoint-110", "checkpoint-110"),
        ("checkpoint-95@exp/", "checkpoint-95@exp"),
    ],
)
def test_refs_resolve(history, text, found):
    assert str(resolve(history, parse_ref(text)).checkpoint_id) == found


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("main@99", ("main@90", "main@100", "main@110")),
        ("main@5000", ("main@100", "main@110", "main@1000")),
        ("exb@95", ("exp@95",)),
        ("exb@7", ("exp",)),
        ("zzz@95", ("exp@95",)),
        ("exq@latest", ("exp",)),
        ("bestt", ("best",)),
        ("zzzz", ("exp@95",)),
        ("/elsewhere/bestt", ("best",)),
        ("./", ("exp@95",)),
    ],
)
def test_a_ref_that_names_nothing_names_its_nearest(history, text, nearest):
    with pytest.raises(RefNotFoundError) as caught:
        resolve(history, parse_ref(text))
    assert caught.value.nearest == nearest


def test_in_an_empty_log_nothing_resolves():
    for text in ("latest", "main", "main@1", "main@latest", "./x"):
        with pytest.raises(RefNotFoundError, match="none yet"):
            resolve(LogState(), parse_ref(text))


def test_a_tag_wins_over_a_branch_of_its_name(history):
    state = log(tag("exp", cid(0)), state=history)
    assert resolve(state, parse_ref("exp")).checkpoint_id == cid(0)


# --- numbers, replay, snapshots -------


def test_numbers_follow_each_other():
    state = log(claim())
    for number in (1, 3):
        entry = Entry(number=number, timestamp=TIME, body=claim(epoch=2))
        assert isinstance(refusal(state, entry), ManifestError)
        with pytest.raises(ManifestError):
            apply(state, entry)


def test_every_so_many_entries_one_is_a_snapshot_of_what_came_before():
    state = replace(log(claim(), commit(1)), number=SNAPSHOT_EVERY - 1)
    assert isinstance(refused(state, claim(epoch=2)), ConfigError)
    right = Snapshot(writer=ALICE, state=snapshot_of(state))
    wrong = Snapshot(writer=ALICE, state=snapshot_of(log(claim())))
    assert isinstance(refused(state, wrong), ManifestError)
    after = log(right, state=state)
    assert after == replace(state, number=SNAPSHOT_EVERY)
    assert isinstance(refused(after, right), ConfigError)


def test_a_snapshot_restores_the_state(history):
    state = log(tag("other", cid(0)), retire(cid(110), cid(90)), state=history)
    state = log(sweep("checkpoint-90"), commit(91, needs=("checkpoint-110",)), state=state)
    value = snapshot_of(state)
    assert state_from_snapshot(json.loads(json.dumps(value)), path="s") == state
    assert snapshot_of(state_from_snapshot(value, path="s")) == value
    assert state_from_snapshot(snapshot_of(LogState()), path="s") == LogState()


def test_a_malformed_snapshot_is_refused(history):
    value = snapshot_of(history)
    with pytest.raises(ManifestError, match="swept"):
        state_from_snapshot({**value, "swept": ["me"]}, path="s")
    for name in value:
        for wrong in (None, [1], {"a": 1}, {"a": "../b"}, "x"):
            with pytest.raises(ManifestError, match=r"^s: "):
                state_from_snapshot({**value, name: wrong}, path="s")


def test_what_stands_in_the_log_is_applied_though_it_would_be_refused():
    state = log(claim(), commit(1))
    for body in (retire(cid(9)), tag("none"), commit(2, writer=BOB)):
        assert refused(state, body) is not None
        state = apply(state, following(state, body))
    assert list(state.commits) == [cid(1), cid(2)]


def test_replaying_does_not_touch_the_state_that_it_starts_from():
    state = log(claim(), commit(1), fork())
    before = snapshot_of(state)
    bodies = [claim(EXP), commit(2), tag(target=cid(1)), tag(), commit(3), retire(cid(3))]
    log(*bodies, state=state)
    assert snapshot_of(state) == before


STEPS = st.integers(0, 3)
FOLDERS = st.builds(
    lambda step, branch, beside: f"{cid(step, branch)}{beside}",
    STEPS,
    st.sampled_from([MAIN, EXP]),
    st.sampled_from(["", ".01234567"]),
)


def any_commit(step, branch, epoch, writer, beside, needs, attempt, over):
    own = f"{cid(step, branch)}{beside}"
    return commit(
        step,
        branch,
        epoch=epoch,
        writer=writer,
        path=own,
        needs=tuple(sorted(needs - {own})),
        attempt=f"{attempt:032x}",
        replaces=str(cid(step, branch)) if over else None,
    )


BODIES = st.one_of(
    st.builds(
        claim, st.sampled_from([MAIN, EXP]), st.integers(1, 3), st.sampled_from([ALICE, BOB])
    ),
    st.builds(
        any_commit,
        STEPS,
        st.sampled_from([MAIN, EXP]),
        st.integers(1, 3),
        st.sampled_from([ALICE, BOB]),
        st.sampled_from(["", ".01234567"]),
        st.sets(FOLDERS, max_size=1),
        st.integers(0, 20),
        st.booleans(),
    ),
    st.builds(fork, st.just(EXP), st.builds(cid, STEPS)),
    st.builds(tag, st.just("best"), st.none() | st.builds(cid, STEPS)),
    st.builds(retire, st.builds(cid, STEPS, st.sampled_from([MAIN, EXP]))),
    st.builds(sweep, FOLDERS | st.builds(lambda one: f"{STAGING}/{one:032x}", st.integers(0, 20))),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(BODIES, max_size=40))
def test_whatever_is_appended_the_laws_hold(bodies):
    state, entries = LogState(), []
    claims, on_disk = {}, {}
    for body in [claim(), claim(EXP), commit(0), *bodies]:
        entry = following(state, body)
        if refusal(state, entry) is None:
            if isinstance(body, Claim):
                assert body.epoch == claims.get(body.branch, (0, ""))[0] + 1
                claims[body.branch] = (body.epoch, body.writer)
            if isinstance(body, Commit):
                assert claims[body.checkpoint_id.branch] == (body.epoch, body.writer)
                assert body.path not in on_disk
                on_disk[body.path] = body.attempt
            if isinstance(body, Sweep):
                for path in body.paths:
                    on_disk.pop(path, None)
            state = apply(state, entry)
            entries.append(entry)
        assert set(state.tags.values()) <= set(state.commits)
        assert set(state.commits) == set(state.stamps)
        assert len({one.path for one in state.commits.values()}) == len(state.commits)
        assert live_folders(state) <= on_disk.keys() == taken_folders(state)  # INV-5
        for one in state.commits.values():
            assert on_disk[one.path] == one.attempt
            assert one.attempt not in state.swept
    assert replay(LogState(), entries) == state
    assert state_from_snapshot(snapshot_of(state), path="s") == state


def test_ten_thousand_commits_are_replayed_and_appended_to():
    entries = [Entry(number=1, timestamp=TIME, body=claim())]
    entries += [Entry(number=step + 2, timestamp=TIME, body=commit(step)) for step in range(10_000)]
    state = replay(LogState(), entries)
    for _ in range(20):
        body = commit(state.number)
        assert refused(state, body) is None
        state = apply(state, following(state, body))
    assert resolve(state, parse_ref("latest")).checkpoint_id.step == state.number - 1


# --- rewriting -----------------------------------------------------------------------------------


def rewrite(step, **changes):
    beside = f"checkpoint-{step}.01234567"
    changes = {"path": beside, "replaces": str(cid(step)), "writer": BOB, **changes}
    return Rewrite(writer=BOB, commit=commit(step, **changes))


def test_a_rewrite_needs_no_claim_and_keeps_the_place_in_history():
    state = log(claim(), commit(1), commit(2))
    assert refusal(state, Entry(number=state.number + 1, timestamp=TIME, body=rewrite(1))) is None
    after = log(claim(), commit(1), commit(2), rewrite(1))
    assert after.commits[cid(1)].path == BESIDE
    assert after.stamps[cid(1)] == state.stamps[cid(1)]
    assert head(after, MAIN).checkpoint_id == cid(2)
    assert set(after.retired) == {"checkpoint-1"}, "its old files wait for gc"
    assert state_from_snapshot(json.loads(json.dumps(snapshot_of(after))), path="s") == after


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (rewrite(9), RefNotFoundError),
        (rewrite(1, replaces=None), CheckpointInUseError),
        (rewrite(1, replaces=BESIDE, path="checkpoint-1.76543210"), CheckpointInUseError),
        (rewrite(1, path="checkpoint-1"), CheckpointInUseError),
        (rewrite(1, size_bytes=2), ConfigError),
        (rewrite(1, metrics={"loss": 1.0}), ConfigError),
        (rewrite(1, needs=("checkpoint-7",)), BaseGoneError),
    ],
)
def test_a_rewrite_that_would_change_history_is_refused(body, error):
    state = log(claim(), commit(1), commit(2))
    found = refusal(state, Entry(number=state.number + 1, timestamp=TIME, body=body))
    assert isinstance(found, error)


def test_a_rewrite_of_nothing_in_a_log_that_stands_changes_nothing():
    state = log(claim(), commit(1))
    after = apply(state, Entry(number=state.number + 1, timestamp=TIME, body=rewrite(9)))
    assert after.commits == state.commits
