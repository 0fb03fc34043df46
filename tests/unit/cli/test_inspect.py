import pytest


def test_the_manifest_is_shown_as_people_want_to_read_it(cli, history) -> None:
    answer = cli("inspect", history.root, "best")

    commit = history.repository.resolve("best")
    manifest = history.repository.manifest(commit)
    shard = manifest.files[0]
    model, rng = (manifest.components[key].checksum.hex[:12] for key in ("model", "rng"))
    first, second = (record.digest.hex[:12] for record in manifest.files[1:])
    assert answer.code == 0
    head, tree = answer.out.split("components\n")
    lines = head.splitlines()
    assert lines[0] == "main@200 (tag: best)  checkpoint-200"
    assert lines[1].endswith(" ago (2026-02-03 04:05:06 UTC) by ckptcoord 0.1.0, torch 2.13.0")
    assert lines[2:] == [
        "  lineage    main@200 <- main@100",
        "  kind       anchor: compression is off",
        "  size       598 B, 1006 B stored in 3 files",
        "  epoch      1.5",
        "  metrics    eval_loss 2.5, loss 2.25",
        "  world      2 ranks on 1 node: 0-1",
        "  group      tp: 0-1",
        f"  writer     {'a' * 32} on host\\x1b[31m7, claim 1",
        f"  attempt    {commit.attempt}, log entry 3",
        f"  manifest   {commit.manifest_digest}",
        "  arguments  0123abcd",
    ]
    assert tree.splitlines() == [
        f"├── model  REPLICATED, ranks 0-1, compared: TENSOR, 576 B in 1 file  {model}",
        '│   ├── metadata {"kind": "gpt\\u001b"}',
        f"│   └── model.safetensors  tensors  984 B  by rank 0  {shard.digest.hex[:12]}",
        f"└── rng  PER_RANK, ranks 0-1, 22 B in 2 files, optional  {rng}",
        f"    ├── rng.rank00000.state.json  state  11 B  by rank 0  {first}",
        f"    └── rng.rank00001.state.json  state  11 B  by rank 1  {second}",
    ]


def test_the_newest_is_meant_where_no_ref_is_given(cli, history) -> None:
    assert cli("inspect", history.root).out.startswith("exp@300 (latest, exp)  checkpoint-300@exp")


def test_all_lines_of_a_message_are_shown(cli, history) -> None:
    out = cli("inspect", history.root, "main@100").out

    assert "  message    first\n             \n             with a body\n" in out


def test_a_long_lineage_is_cut_in_the_middle(cli, build) -> None:
    for step in range(1, 8):
        build.commit(step)

    out = cli("inspect", build.root).out

    assert "main@7 <- main@6 <- main@5 <- ... <- main@1 (7 in all)\n" in out


def test_a_dropped_parent_ends_the_lineage(cli, build) -> None:
    from ckptcoord.core.entries import Retire
    from ckptcoord.core.refs import BranchName, CheckpointId

    for step in (1, 2):
        build.commit(step)
    gone = CheckpointId(BranchName("main"), 1)
    build.repository.log.append(lambda _: Retire(writer="a" * 32, checkpoint_ids=(gone,)))

    document = cli("inspect", build.root, "--json").json["data"]

    assert "lineage    main@2 <- main@1 (dropped)\n" in cli("inspect", build.root).out
    assert document["lineage"] == ["main@2", "main@1"]
    assert document["lineage_is_cut"] is True


def test_a_forged_cycle_of_parents_ends(build) -> None:
    import dataclasses

    from ckptcoord.cli.commits import lineage

    first, second = build.commit(1), build.commit(2)
    state = build.repository.state()
    forged = dataclasses.replace(first, parent=second.checkpoint_id)
    state = dataclasses.replace(state, commits={**state.commits, first.checkpoint_id: forged})

    assert lineage(state, second) == ((second.checkpoint_id, first.checkpoint_id), False)


def test_tensors_come_from_the_shards_headers(cli, history) -> None:
    answer = cli("inspect", history.root, "main@100", "--tensors")

    assert "│       ├── lm_head.bias  I64   64 B  [8]      " in answer.out
    assert "│       └── wte.weight    F32  512 B  [8, 16]  " in answer.out


def test_a_program_gets_the_manifest_and_the_tensors(cli, history) -> None:
    document = cli("inspect", history.root, "main@100", "--tensors", "--json").json["data"]

    commit = history.repository.resolve("main@100")
    manifest = history.repository.manifest(commit)
    assert document["manifest"] == manifest.model_dump(mode="json")
    assert document["ref"] == "main@100"
    assert document["lineage"] == ["main@100"]
    assert document["lineage_is_cut"] is False
    first, second = document["tensors"]
    assert (first["name"], second["name"]) == ("lm_head.bias", "wte.weight")
    assert first["digest"].startswith("blake3:")
    assert {key: second[key] for key in second if key != "digest"} == {
        "file": "model.safetensors",
        "component": "model",
        "scope": "",
        "name": "wte.weight",
        "dtype": "F32",
        "shape": [8, 16],
        "size_bytes": 512,
    }
    assert "tensors" not in cli("inspect", history.root, "main@100", "--json").json["data"]


def test_one_component_can_be_chosen(cli, history) -> None:
    out = cli("inspect", history.root, "--component", "rng", "--tensors").out

    assert "\n└── rng  PER_RANK" in out
    assert "model" not in out.split("components\n")[1]


def test_an_unknown_component_is_refused_with_those_there_are(cli, history) -> None:
    answer = cli("inspect", history.root, "--component", "optim")

    assert answer.code == 2
    assert answer.err == (
        "error[CC002]: --component: 'optim' is not in exp@300, which has: model, rng\n"
    )


def test_an_empty_repository_has_no_latest(cli, build) -> None:
    answer = cli("inspect", build.root)

    assert answer.code == 12
    assert "The repository has none yet" in answer.err


def test_a_terminal_without_lines_gets_ascii(cli, history, monkeypatch) -> None:
    from ckptcoord.cli.output import Output

    monkeypatch.setattr(Output, "can_show", lambda _self, text: text.isascii())

    out = cli("inspect", history.root).out

    assert "\n|-- model  REPLICATED" in out
    assert "\n`-- rng  PER_RANK" in out


@pytest.mark.parametrize("pattern", ["PER_GROUP", "PER_NODE", "NONE"])
def test_copies_and_comparison_are_said(pattern) -> None:
    from types import SimpleNamespace

    from ckptcoord.cli.manifest_tree import _copies
    from ckptcoord.core.sharing import SharingPattern, ValidationLevel

    component = SimpleNamespace(
        sharing_pattern=SharingPattern[pattern] if pattern != "NONE" else SharingPattern.REPLICATED,
        replicated_across=("0-1", "2-3"),
        validation=ValidationLevel.NONE if pattern == "NONE" else ValidationLevel.FULL,
    )

    expected = ["not compared"] if pattern == "NONE" else ["copies 0-1 | 2-3", "compared: FULL"]
    assert list(_copies(component)) == expected
