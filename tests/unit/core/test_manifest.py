"""The manifest: what is written is read back, and whatever breaks a law is refused by field."""

from __future__ import annotations

import json
import re
from typing import Any

import blake3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ckptcoord.core import manifest as module
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
from ckptcoord.core.plainmanifest import PlainManifest
from ckptcoord.core.ranks import format_ranks, parse_ranks, parse_runs
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.core.sharing import SharingPattern, ValidationLevel
from ckptcoord.core.topology import GroupLayout, Topology
from ckptcoord.errors import CkptError, FormatVersionError, ManifestError

TOPOLOGY = Topology(
    nodes=((1, 0), (2, 3)), groups=(GroupLayout(name="tp", instances=((0, 1), (2, 3))),)
)


def digest(seed: object) -> Digest:
    return Digest(blake3.blake3(str(seed).encode()).digest())


def record(
    path: str, component: str, scope: str = "", writer_rank: int = 0, **more: Any
) -> FileRecord:
    return FileRecord(
        path=path,
        size_bytes=more.get("size_bytes", len(path)),
        digest=digest(path),
        component=component,
        scope=scope,
        writer_rank=writer_rank,
        kind=FileKind.TENSORS,
    )


def component(
    pattern: SharingPattern, files: list[FileRecord], group_name: str | None = None, **more: Any
) -> ComponentManifest:
    ordered = sorted(files, key=lambda f: f.path)
    values: dict[str, Any] = {
        "sharing_pattern": pattern,
        "ranks": "0-3",
        "replicated_across": ["0-3"] if pattern is SharingPattern.REPLICATED else [],
        "group_name": group_name,
        "required": True,
        "metadata": {},
        "size_bytes": 100,
        "stored_bytes": sum(f.size_bytes for f in files),
        "checksum": checksum_of(f.digest for f in ordered),
        "validation": ValidationLevel.TENSOR,
        "given_up_tensors": 0,
        "given_up": 0.0,
        "files": [f.path for f in files],
    }
    return ComponentManifest(**{**values, **more})


def lineage(**more: Any) -> LineageRecord:
    values: dict[str, Any] = {
        "base_path": None,
        "base_digest": None,
        "needs": [],
        "stored_bytes": [],
        "reason": "compression is off",
    }
    return LineageRecord(**{**values, **more})


def delta(base: str = "main@100", **more: Any) -> CheckpointManifest:
    """One that stands on checkpoint-100."""
    own: dict[str, Any] = {
        "base_path": "checkpoint-100",
        "base_digest": digest("base"),
        "needs": ["checkpoint-100"],
        "stored_bytes": [5000, 4000],
        "reason": "the first after an anchor",
    }
    return build(kind=CheckpointKind.DELTA, base=base, lineage=lineage(**{**own, **more}))


def build(**more: Any) -> CheckpointManifest:
    model = [record("model-00002-of-00002.safetensors", "model", "", 3)]
    model.append(record("model-00001-of-00002.safetensors", "model"))
    rng = [record(f"rng.rank{r:05d}.state.json", "rng", f"rank{r:05d}", r) for r in range(4)]
    stages = [record(f"stages.tp{i:05d}.safetensors", "stages", f"tp{i:05d}") for i in range(2)]
    cache = [record(f"cache.node{i:05d}.safetensors", "cache", f"node{i:05d}") for i in range(2)]
    values: dict[str, Any] = {
        "checkpoint_id": "checkpoint-500",
        "step": 500,
        "branch": "main",
        "parent": "main@400",
        "kind": CheckpointKind.ANCHOR,
        "base": None,
        "attempt": "0f" * 16,
        "epoch": 1.25,
        "world_size": 4,
        "topology": TopologyRecord.of(TOPOLOGY),
        "timestamp": "2026-02-03T04:05:06.789Z",
        "message": "vor dem Umbau",
        "metrics": {"loss": 0.1, "eval_loss": 0.30000000000000004},
        "training_args_hash": None,
        "ckptcoord_version": "0.1.0",
        "pytorch_version": "2.13.0",
        "components": {
            "rng": component(SharingPattern.PER_RANK, rng),
            "model": component(SharingPattern.REPLICATED, model),
            "stages": component(
                SharingPattern.PER_GROUP, stages, "tp", replicated_across=["0-1", "2-3"]
            ),
            "cache": component(SharingPattern.PER_NODE, cache, replicated_across=["0-1", "2-3"]),
        },
        "files": [*rng, *model, *stages, *cache],
    }
    return CheckpointManifest(**{"lineage": lineage(), **values, **more})


def document(**more: Any) -> dict[str, Any]:
    return {**json.loads(build().to_bytes()), **more}


def read(data: bytes, path: str) -> CheckpointManifest:
    """By the models; the plain form has the same to say of whatever is read in this module."""
    try:
        manifest = CheckpointManifest.parse(data, path=path)
    except CkptError as error:
        with pytest.raises(type(error)) as caught:
            PlainManifest.parse(data, path=path)
        assert str(caught.value).startswith(path)
        raise
    plain = PlainManifest.parse(data, path=path)
    assert json.dumps(plain.to_json()) == json.dumps(manifest.model_dump(mode="json"))
    assert PlainManifest.parse(manifest.to_bytes(), path=path) == plain
    for name in ("id", "parent_id", "base_id", "size_bytes", "stored_bytes"):
        assert getattr(plain, name) == getattr(manifest, name)
    return manifest


def parse(value: Any) -> CheckpointManifest:
    return read(json.dumps(value).encode(), "checkpoint-500/m.json")


def refusal(value: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        parse(value)
    assert caught.value.path == "checkpoint-500/m.json"
    return caught.value.why


def test_what_is_written_is_read_back_to_the_bit() -> None:
    manifest = build()
    again = read(manifest.to_bytes(), "m")
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert again.digest == Digest(blake3.blake3(manifest.to_bytes()).digest())
    assert again.topology.to_topology() == TOPOLOGY
    assert (again.id, again.parent_id, again.base_id) == (
        CheckpointId(BranchName(), 500),
        CheckpointId(BranchName(), 400),
        None,
    )
    assert again.metrics["eval_loss"] == 0.30000000000000004
    assert again.size_bytes == 400
    assert again.stored_bytes == sum(f.size_bytes for f in again.files)


def test_the_text_is_indented_in_the_order_of_the_fields_and_ends_in_a_newline() -> None:
    text = build().to_bytes().decode()
    assert text.startswith('{\n  "format_version": 1,\n  "checkpoint_id": "checkpoint-500",\n')
    assert text.endswith("}\n")
    assert list(json.loads(text)) == list(CheckpointManifest.model_fields)


def test_the_bytes_do_not_depend_on_the_order_in_which_things_were_given() -> None:
    manifest = build()
    metadata = {"b": {"y": 1, "x": [{"d": 1, "c": 2}]}, "a": None}
    swapped = {"a": None, "b": {"x": [{"c": 2, "d": 1}], "y": 1}}
    files = manifest.files

    def with_metadata(value: dict[str, Any], reverse: bool) -> bytes:
        model = component(
            SharingPattern.REPLICATED,
            [f for f in files if f.component == "model"][:: -1 if reverse else 1],
            metadata=value,
        )
        components = {**manifest.components, "model": model}
        return build(
            files=files[:: -1 if reverse else 1],
            components=dict(sorted(components.items(), reverse=reverse)),
            metrics=dict(sorted(manifest.metrics.items(), reverse=reverse)),
        ).to_bytes()

    assert with_metadata(metadata, reverse=False) == with_metadata(swapped, reverse=True)


def test_a_newer_format_is_refused_as_such_before_anything_else_is_looked_at() -> None:
    with pytest.raises(FormatVersionError) as caught:
        parse({"format_version": 2, "nothing": "else fits"})
    assert (caught.value.found, caught.value.supported) == (2, 1)


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None, 10**40 * -1])
def test_a_format_version_that_never_was_is_refused(version: Any) -> None:
    assert refusal(document(format_version=version)).startswith("format_version: ")


@pytest.mark.parametrize("value", [None, [], "x", 3, {}])
def test_a_document_that_is_no_manifest_is_refused(value: Any) -> None:
    assert refusal(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint_id", "checkpoint-501"),
        ("checkpoint_id", "checkpoint-500@exp"),
        ("step", -1),
        ("step", 10**15),
        ("step", True),
        ("step", "500"),
        ("branch", "../x"),
        ("branch", ""),
        ("parent", "main"),
        ("parent", "main@latest"),
        ("parent", "checkpoint-400"),
        ("parent", "../../etc"),
        ("parent", "main@500"),
        ("kind", "whole"),
        ("kind", "delta"),
        ("base", "main@400"),
        ("attempt", "0F" * 16),
        ("attempt", "0f" * 16 + "\n"),
        ("epoch", -0.5),
        ("epoch", "1"),
        ("world_size", 0),
        ("world_size", 10**9),
        ("topology", {"nodes": ["0-3"]}),
        ("timestamp", "2026-02-03 04:05:06"),
        ("timestamp", "2026-02-30T04:05:06Z"),
        ("timestamp", "2026-02-03T04:05:06+02:00"),
        ("message", None),
        ("metrics", {"loss": "low"}),
        ("metrics", {"loss": True}),
        ("training_args_hash", ""),
        ("ckptcoord_version", "x" * 300),
        ("pytorch_version", None),
        ("components", []),
        ("files", {}),
    ],
)
def test_a_field_that_breaks_its_law_is_named(field: str, value: Any) -> None:
    assert field in refusal(document(**{field: value}))


@pytest.mark.parametrize("field", sorted(set(CheckpointManifest.model_fields) - {"format_version"}))
def test_every_field_is_needed(field: str) -> None:
    value = document()
    del value[field]
    assert refusal(value) == f"{field}: Field required"


def test_unknown_fields_are_refused_by_name_at_every_level() -> None:
    value = document(extra=1)
    assert refusal(value) == "extra: unknown field"
    value = document()
    value["components"]["model"]["more"] = 1
    assert refusal(value) == "components.model.more: unknown field"
    value = document()
    value["files"][3]["more"] = 1
    assert refusal(value) == "files[3].more: unknown field"
    value = document()
    value["topology"]["more"] = 1
    assert refusal(value) == "topology.more: unknown field"


def test_what_an_attacker_names_a_field_is_shown_short_and_escaped() -> None:
    why = refusal(document(**{"x" * 10_000: 1, "\x1b[2J": 2, "y": 3, "z": 4}))
    assert len(why) < 400
    assert "\x1b" not in why
    assert why.endswith("; and 1 breaches more")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/..",
        ".",
        "..",
        "./a",
        "a//b",
        "a/",
        "",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\n",
        "~/x",
        "C:x",
        ".ckptcoord/repo.yaml",
        "mödel",
        "a b",
        "-rf",
        "x" * 256,
    ],
)
def test_a_path_that_could_lead_elsewhere_is_refused(path: str) -> None:
    value = document()
    value["files"][0]["path"] = path
    assert refusal(value).startswith("files[0].path: ")
    value = document()
    value["components"]["model"]["files"][0] = path
    assert refusal(value).startswith("components.model.files: ")


def rename(value: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return json.loads(json.dumps(value).replace(f'"{old}"', f'"{new}"'))


def test_two_files_of_one_path_are_refused_and_so_is_a_file_that_is_a_folder() -> None:
    value = document()
    value["files"].append(value["files"][0])
    assert "there twice" in refusal(value)
    first, second = value["files"][0]["path"], value["files"][1]["path"]
    for folder, inside in (("a", "a/b"), ("a", "a/b/c"), ("a", "a/b-c")):
        odd = rename(rename(document(), first, folder), second, inside)
        assert "'a' is a file and a folder" in refusal(odd)
    assert "reserved" in refusal(rename(document(), first, "checkpoint_manifest.json"))
    assert "folder" in refusal(rename(document(), first, "checkpoint_manifest.json/x"))


def test_subfolders_are_fine() -> None:
    value = document()
    names = [f["path"] for f in value["files"] if f["component"] == "model"]
    for name in names:
        value = rename(value, name, f"model/{name}")
    assert {f.path for f in parse(value).files} >= {f"model/{name}" for name in names}


def test_files_and_components_must_name_each_other() -> None:
    value = document()
    dropped = value["components"]["model"]["files"].pop()
    assert repr(dropped) in refusal(value)
    value = document()
    gone = value["files"].pop()
    assert repr(gone["path"]) in refusal(value)
    value = document()
    value["components"]["model"]["files"].append(value["components"]["model"]["files"][0])
    assert "names a file twice" in refusal(value)
    value = document()
    value["components"]["model"]["files"].append(value["components"]["rng"]["files"][0])
    assert refusal(value).startswith("components.model.files: ")
    value = document()
    value["files"][0]["component"] = "nobody"
    assert "files[0].component" in refusal(value)


@pytest.mark.parametrize("size", [-1, 2**60 + 1, 1.0, True, "5", None, 10**30])
def test_a_size_out_of_range_is_refused(size: Any) -> None:
    value = document()
    value["files"][0]["size_bytes"] = size
    assert refusal(value).startswith("files[0].size_bytes: ")
    for field in ("size_bytes", "stored_bytes"):
        value = document()
        value["components"]["model"][field] = size
        assert refusal(value).startswith(f"components.model.{field}: ")


def test_sizes_and_checksums_must_add_up() -> None:
    value = document()
    value["components"]["model"]["stored_bytes"] += 1
    assert "components.model.stored_bytes" in refusal(value)
    value = document()
    value["files"][0]["size_bytes"] += 1
    assert "stored_bytes" in refusal(value)
    value = document()
    value["files"][0]["digest"] = str(digest("else"))
    assert "components.cache.checksum" in refusal(value)


@pytest.mark.parametrize(
    "text",
    ["", "blake3:", "sha256:" + "0" * 64, "blake3:" + "0" * 63, "blake3:" + "A" * 64, 5, None],
)
def test_a_malformed_digest_is_refused(text: Any) -> None:
    value = document()
    value["files"][0]["digest"] = text
    assert refusal(value).startswith("files[0].digest: ")
    value = document()
    value["components"]["model"]["checksum"] = text
    assert refusal(value).startswith("components.model.checksum: ")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("model-00001-of-00002.safetensors", "rank00000"),
        ("rng.rank00000.state.json", ""),
        ("rng.rank00000.state.json", "rank00004"),
        ("rng.rank00000.state.json", "rank0"),
        ("rng.rank00000.state.json", "rank000001"),
        ("rng.rank00000.state.json", "node00001"),
        ("rng.rank00000.state.json", "rank-0001"),
        ("rng.rank00000.state.json", "rank\u0660\u0660\u0660\u0660\u0660"),
        ("rng.rank00002.state.json", "rank00004"),
        ("rng.rank00003.state.json", ""),
        ("cache.node00000.safetensors", "node00002"),
        ("stages.tp00000.safetensors", "tp00002"),
        ("stages.tp00000.safetensors", "pp00000"),
        ("stages.tp00000.safetensors", "x" * 60),
    ],
)
def test_a_file_of_a_copy_that_does_not_exist_is_refused(path: str, scope: str) -> None:
    value = document()
    at = next(i for i, f in enumerate(value["files"]) if f["path"] == path)
    value["files"][at]["scope"] = scope
    assert refusal(value).startswith(f"files[{at}].scope: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", ""),
        ("ranks", "0-4"),
        ("ranks", "0-999999999999"),
        ("ranks", "3,0-2"),
        ("ranks", "0,0"),
        ("replicated_across", ["0-1", "1-2"]),
        ("replicated_across", ["0-9"]),
        ("replicated_across", [1]),
        ("group_name", "tp"),
        ("sharing_pattern", "per_group"),
        ("sharing_pattern", "SHARED"),
        ("required", 1),
        ("validation", "some"),
    ],
)
def test_a_component_that_does_not_fit_the_topology_is_named(field: str, value: Any) -> None:
    whole = document()
    whole["components"]["model"][field] = value
    assert refusal(whole).startswith("components.model.")


def test_a_component_of_an_unknown_group_or_with_no_file_name_is_refused() -> None:
    value = document()
    value["components"]["stages"]["group_name"] = "dp"
    assert refusal(value).startswith("components.stages.group_name: ")
    value = rename(document(), "model", "../model")
    assert "component key" in refusal(value)


@pytest.mark.parametrize(
    "topology",
    [
        {"nodes": [], "groups": {}},
        {"nodes": ["0-2"], "groups": {}},
        {"nodes": ["0-3", "3"], "groups": {}},
        {"nodes": ["0-2", "4"], "groups": {}},
        {"nodes": ["0-3"], "groups": {"tp": ["3-9"]}},
        {"nodes": ["0-3"], "groups": {"tp": ["three"]}},
        {"nodes": ["0-3"], "groups": {"rank": []}},
        {"nodes": ["0-3"], "groups": {"tp1": []}},
        {"nodes": ["0-3"], "groups": {"tp": ["2-3", "0-1"]}},
        {"nodes": ["0-3"], "groups": {"tp": ["1,0"]}},
        {"nodes": ["0-3"], "groups": {"tp": ["0-1", "1-2"]}},
        {"nodes": ["0-3"], "groups": {"tp": ["0-999999"]}},
        {"nodes": ["0-3"], "groups": {f"g{'a' * n}": [] for n in range(65)}},
    ],
)
def test_a_topology_that_cannot_be_is_refused(topology: Any) -> None:
    assert refusal(document(topology=topology)).startswith(("topology.", "process_groups: "))


def test_a_few_bytes_that_claim_many_ranks_cost_nothing() -> None:
    wide = {"nodes": ["0-999999"], "groups": {"g" + "a" * n: ["0-999999"] for n in range(30)}}
    assert "components" in refusal(document(topology=wide, world_size=1_000_000))


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": float("nan")},
        {"a": [float("inf")]},
        {1: 2},
        {"a": {2: 3}},
        {"a": b"x"},
        {"a": {1, 2}},
        {"a": 10**64},
        {"a": "\ud800"},
        {"a": {"\udfff": 1}},
    ],
)
def test_metadata_that_json_cannot_hold_is_refused_when_the_manifest_is_made(metadata: Any) -> None:
    with pytest.raises(ValidationError):
        component(SharingPattern.GLOBAL, [], metadata=metadata)


def test_metadata_nested_too_deeply_is_refused() -> None:
    value = document()
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    value["components"]["model"]["metadata"] = {"a": deep}
    assert "nested too deeply" in refusal(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        build(metrics={"loss": value})
    with pytest.raises(ValidationError):
        build(epoch=value)


def test_a_text_that_utf_8_cannot_hold_is_refused() -> None:
    for more in (
        {"message": "\ud800"},
        {"metrics": {"\ud800": 1.0}},
        {"pytorch_version": "\ud800"},
    ):
        with pytest.raises(ValidationError):
            build(**more)


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        build().step = 3  # type: ignore[misc]


def test_a_delta_needs_a_base_other_than_itself() -> None:
    assert delta().base_id == CheckpointId(BranchName(), 100)
    with pytest.raises(ValidationError, match="base: is the checkpoint itself"):
        delta("main@500")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"base_path": None}, "lineage.base_path"),
        ({"base_digest": None}, "lineage.base_digest"),
        ({"needs": []}, "lineage.needs: a delta needs its base"),
        ({"needs": ["checkpoint-9"]}, "lineage.needs: a delta needs its base"),
        ({"needs": ["checkpoint-100", "checkpoint-1"]}, "lineage.needs: is not sorted"),
        ({"needs": ["checkpoint-100", "checkpoint-100"]}, "lineage.needs: is not sorted"),
        ({"needs": ["..", "checkpoint-100"]}, "is no checkpoint's folder"),
        ({"needs": ["checkpoint-100", "checkpoint-7/x"]}, "is no checkpoint's folder"),
        ({"stored_bytes": []}, "lineage.stored_bytes"),
        ({"stored_bytes": [5000, -1]}, "stored_bytes"),
    ],
)
def test_a_delta_says_what_it_stands_on(more: dict[str, Any], field: str) -> None:
    assert delta().lineage.needs == ("checkpoint-100",)
    with pytest.raises(ValidationError, match=re.escape(field)):
        delta(**more)


def test_an_anchor_stands_alone() -> None:
    own = delta().lineage
    for odd in (own, own.model_copy(update={"base_path": None, "base_digest": None})):
        with pytest.raises(ValidationError, match="lineage"):
            build(lineage=odd)


def test_an_anchors_files_may_be_coded() -> None:
    files = [one.model_copy(update={"kind": FileKind.DELTA}) for one in build().files]
    assert build(files=files).kind is CheckpointKind.ANCHOR


def test_a_writer_outside_the_world_is_refused() -> None:
    value = document()
    value["files"][2]["writer_rank"] = 4
    assert refusal(value).startswith("files[2].writer_rank: ")


def test_a_component_without_files_has_the_checksum_of_nothing() -> None:
    empty = component(SharingPattern.GLOBAL, [])
    manifest = build()
    again = build(components={**manifest.components, "empty": empty})
    assert read(again.to_bytes(), "m") == again


def test_a_manifest_too_large_to_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(ManifestError, match="max_shard_size"):
        build().to_bytes()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b'{"a": 1, "a": 2}', b'{"epoch": NaN}', b"[" * 1000, b'{"a": 1e999}'],
)
def test_what_is_no_strict_json_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        read(data, "m")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [at] if at else []
    for key, item in inner:
        here = (*at, key)
        found += places(item, here) if isinstance(item, dict | list) else [here]
    return found


WHOLES = [json.loads(one.to_bytes()) for one in (build(), delta())]
PLACES = places(WHOLES[0])
# What stands in other places, and what is just within bounds or just out of them.
NEAR: list[Any] = [
    "",
    "0",
    "0-2",
    "1,0",
    "delta",
    "none",
    "global",
    "rank00000",
    "tp",
    *[
        *(size * "x" for size in (48, 49, 200, 201, 255, 256)),
        *(10**n for n in (6, 15, 63, 64)),
        1 << 60,
        (1 << 60) + 1,
        -1,
        0,
        1,
        3,
        4,
        1.0,
        -0.0,
        -0.5,
        True,
        None,
        [],
        {},
        ["0-3"],
        ["3"],
        [7],
        {"tp": ["0-1"]},
        {"tp": []},
        {"tp": "0"},
        {"tp": [0]},
        {"lr": 1},
        "checkpoint-100",
        ["checkpoint-100"],
        "main@100",
        "2026-02-03T04:05:06Z",
        "2026-02-03T04:05:06Z\n",
        "a/b",
        "a\n",
    ],
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    whole=st.sampled_from(WHOLES), place=st.sampled_from(PLACES), value=JSON | st.sampled_from(NEAR)
)
def test_any_value_in_any_place_gives_a_manifest_or_a_typed_error(
    whole: dict[str, Any], place: tuple[Any, ...], value: Any
) -> None:
    whole = json.loads(json.dumps(whole))
    target = whole
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    try:
        manifest = parse(whole)
    except CkptError as error:
        assert isinstance(error, ManifestError | FormatVersionError)  # noqa: PT017 (either will do)
    else:
        assert read(manifest.to_bytes(), "m") == manifest


@settings(max_examples=100, deadline=None)
@given(
    metrics=st.dictionaries(
        st.text(max_size=10), st.floats(allow_nan=False, allow_infinity=False), max_size=5
    ),
    message=st.text(max_size=40),
    metadata=st.dictionaries(st.text(max_size=8), JSON, max_size=3),
    epoch=st.none() | st.floats(min_value=0, allow_infinity=False),
)
def test_free_values_come_back_bit_for_bit(
    metrics: dict[str, float], message: str, metadata: dict[str, Any], epoch: float | None
) -> None:
    extra = component(SharingPattern.GLOBAL, [], metadata=metadata)
    manifest = build(
        metrics=metrics,
        message=message,
        epoch=epoch,
        components={**build().components, "extra": extra},
    )
    again = read(manifest.to_bytes(), "m")
    assert again == manifest
    assert {k: v.hex() for k, v in again.metrics.items()} == {
        k: v.hex() for k, v in metrics.items()
    }
    assert repr(again.components["extra"].metadata) == repr(manifest.components["extra"].metadata)


@settings(max_examples=200, deadline=None)
@given(ranks=st.lists(st.integers(0, 999_999), min_size=1, max_size=20))
def test_runs_of_ranks_are_a_bijection(ranks: list[int]) -> None:
    assert parse_ranks(format_ranks(ranks)) == tuple(ranks)


@pytest.mark.parametrize(
    "text", ["", ",", "0,", "1-1", "3-1", "0,1", "01", "0-01", "-1", "0--1", " 0", "0\n", "1000000"]
)
def test_no_two_texts_name_the_same_ranks(text: str) -> None:
    with pytest.raises(ValueError, match=r"has|runs of ranks"):
        parse_runs(text)


def test_a_text_of_more_ranks_than_any_world_is_not_expanded() -> None:
    with pytest.raises(ValueError, match="names more than"):
        parse_ranks(",".join(["0-999999"] * 50))


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("step",), "x", "step: is not an integer"),
        (("files", 2, "writer_rank"), -1, "files[2].writer_rank: "),
        (("files", 2, "path"), "../x", "files[2].path: "),
        (("files", 2, "more"), 1, "files[2].'more': unknown field"),
        (("files", 1), 7, "files[1] is not a JSON object"),
        (("components", "rng", "size_bytes"), True, "components.rng.size_bytes: "),
        (("components", "rng", "checksum"), "blake3:0", "components.rng: digest 'blake3:0' is not"),
        (("components", "rng", "validation"), "some", "components.rng.validation: is not one of"),
        (("topology", "groups", "tp"), ["0", 1], "topology.groups.tp: "),
        (("lineage", "stored_bytes"), [0.5], "lineage.stored_bytes: "),
        (("timestamp",), "now", "timestamp: is not UTC"),
    ],
)
def test_the_plain_form_names_the_place_of_a_breach(
    place: tuple[Any, ...], value: Any, named: str
) -> None:
    whole = document()
    target: Any = whole
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value

    with pytest.raises(ManifestError) as caught:
        PlainManifest.parse(json.dumps(whole).encode(), path="m")
    assert caught.value.path == "m"
    assert caught.value.why.startswith(named)
