"""`ckptcoord branch`."""

import pytest

HOSTILE = [
    "..",
    "a..b",
    "x.lock",
    "a/b",
    "",
    "latest",
    "a\0b",
    "x" * 10_000,
    "main@5",
    "checkpoint-5",
]


def branches(cli, history):
    data = cli("branch", history.root, "--json").json["data"]["branches"]
    return {one.pop("branch"): one for one in data}


def refs(cli, history):
    data = cli("log", history.root, "--json").json["data"]["checkpoints"]
    return [one["ref"] for one in data]


def test_each_branch_has_its_head_its_age_and_how_far_it_is(cli, history) -> None:
    history.fork("next", 1000)

    lines = [line.split("\t") for line in cli("branch", history.root).out.splitlines()]
    assert [(line[0], line[1], line[4], line[5]) for line in lines] == [
        ("exp", "exp@300", "2", "main@200"),
        ("main", "main@1000", "3", ""),
        ("next", "main@1000", "0", "main@1000"),
    ]
    found = branches(cli, history)
    assert [found[name]["step"] for name in ("exp", "main", "next")] == [300, 1000, 1000]
    assert [name for name, one in found.items() if one["latest"]] == ["exp"]


def test_a_branch_begins_at_a_ref_and_by_default_at_latest(cli, history) -> None:
    assert cli("branch", history.root, "one", "main@100").err == "one begins at main@100\n"
    assert cli("branch", history.root, "two", "--json").json["data"]["from"] == "exp@300"

    found = branches(cli, history)
    assert (found["one"]["head"], found["two"]["head"]) == ("main@100", "exp@300")
    assert history.commit(150, "one").parent.ref == "main@100"


def test_a_name_that_is_taken_is_refused(cli, history) -> None:
    assert cli("branch", history.root, "exp").code == 1
    assert "CC023" in cli("branch", history.root, "main").err
    assert cli("branch", history.root, "best").code == 2  # a tag, which would hide it


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("words", [[], ["-d", "-y"]])
def test_a_name_that_can_be_none_changes_nothing(cli, history, name, words) -> None:
    before = history.repository.state().number
    answer = cli("branch", "-C", history.root, *words, "--", name)

    assert answer.code == (12 if words and name == "checkpoint-5" else 2)
    assert answer.err.startswith("error[")
    assert len(answer.err) < 1000
    assert history.repository.state().number == before


@pytest.mark.parametrize("ref", ["no", "main@7", "../x", "/", "a\0b", ""])
def test_a_ref_that_names_nothing_begins_no_branch(cli, history, ref) -> None:
    assert cli("branch", "-C", history.root, "new", "--", ref).code in (2, 12)
    assert set(branches(cli, history)) == {"exp", "main"}


def test_what_was_made_on_a_branch_is_retired(cli, history) -> None:
    dry = cli("branch", history.root, "-d", "exp", "--dry-run")
    assert dry.out == (
        "retire\texp@250\tcheckpoint-250@exp\t1006\nretire\texp@300\tcheckpoint-300@exp\t1006\n"
    )
    assert "nothing was changed" in dry.err
    assert cli("branch", history.root, "-d", "exp").code == 2  # nobody to ask
    assert len(refs(cli, history)) == 5

    assert cli("branch", history.root, "-d", "exp", "-y").code == 0
    assert refs(cli, history) == ["main@1000", "main@200", "main@100"]
    assert branches(cli, history)["exp"]["ahead"] == 0
    assert cli("branch", history.root, "exp").code == 1  # the name stays taken


def test_what_others_need_stays(cli, history) -> None:
    answer = cli("branch", history.root, "-d", "main", "-y", "--json").json["data"]

    assert [one["ref"] for one in answer["retire"]] == ["main@100", "main@1000"]
    assert [one["ref"] for one in answer["keep"]] == ["main@200"]  # a tag, and exp begins there
    assert answer["freed_bytes"] == 2012
    assert answer["done"]
    assert refs(cli, history) == ["exp@300", "exp@250", "main@200"]


def test_a_branch_without_checkpoints_has_nothing_to_retire(cli, history) -> None:
    history.fork("next", 1000)

    answer = cli("branch", history.root, "-d", "next", "-y")

    assert answer.code == 0
    assert "0 checkpoints to retire" in answer.err
    assert cli("branch", history.root, "-d", "nxet", "-y").code == 12


def test_words_that_mean_nothing_are_a_usage_error(cli, history) -> None:
    assert cli("branch", history.root, "a", "main@100", "b").code == 2
    assert cli("branch", history.root, "-d", "-y").code == 2
    assert cli("branch", history.root, "a", "--dry-run").code == 2
