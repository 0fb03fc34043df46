"""`ckptcoord tag`."""

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
    " ",
]


def tags(cli, history):
    return {
        one["tag"]: one["ref"] for one in cli("tag", history.root, "--json").json["data"]["tags"]
    }


def test_tags_are_listed_with_what_they_name(cli, history) -> None:
    history.tag("a-first", 100)

    assert cli("tag", history.root).out == "a-first\tmain@100\nbest\tmain@200\n"
    assert tags(cli, history) == {"a-first": "main@100", "best": "main@200"}


def test_a_tag_is_set_at_a_ref_and_by_default_at_latest(cli, history) -> None:
    answer = cli("tag", history.root, "one", "main@100")
    assert (answer.code, answer.out, answer.err) == (0, "", "one is main@100\n")
    assert cli("tag", "-C", history.root, "two", "--json").json["data"] == {
        "repository": str(history.root),
        "tag": "two",
        "ref": "exp@300",
        "before": None,
    }

    assert tags(cli, history) == {"best": "main@200", "one": "main@100", "two": "exp@300"}
    assert cli("inspect", history.root, "one", "--json").json["data"]["ref"] == "main@100"


def test_a_tag_is_moved_only_by_force(cli, history) -> None:
    answer = cli("tag", history.root, "best", "main@100")

    assert answer.code == 1
    assert "CC028" in answer.err
    assert "--force" in answer.err
    assert tags(cli, history) == {"best": "main@200"}
    assert cli("tag", history.root, "best", "main@200").code == 0  # it stays where it is
    assert cli("tag", history.root, "best", "main@100", "--force").err == (
        "best is main@100 (was main@200)\n"
    )
    assert tags(cli, history) == {"best": "main@100"}


def test_a_branch_is_not_hidden_by_a_tag_unless_by_force(cli, history) -> None:
    assert cli("tag", history.root, "exp", "main@100").code == 2
    assert tags(cli, history) == {"best": "main@200"}
    assert cli("tag", history.root, "exp", "main@100", "-f").code == 0


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("words", [[], ["-d", "-y"]])
def test_a_name_that_can_be_none_is_a_usage_error(cli, history, name, words) -> None:
    before = history.repository.state().number
    answer = cli("tag", "-C", history.root, *words, "--", name)

    assert answer.code == (12 if words and name == "checkpoint-5" else 2)
    assert answer.err.startswith("error[")
    assert len(answer.err) < 1000
    assert history.repository.state().number == before


@pytest.mark.parametrize("ref", [*HOSTILE, "no", "main@7", "../x", "/"])
def test_a_ref_that_names_nothing_leaves_no_tag(cli, history, ref) -> None:
    if ref == "latest":
        return
    answer = cli("tag", "-C", history.root, "new", "--", ref)

    assert answer.code in (2, 12)
    assert answer.err.startswith("error[")
    assert tags(cli, history) == {"best": "main@200"}


def test_a_tag_is_deleted_when_somebody_says_so(cli, history) -> None:
    assert cli("tag", history.root, "-d", "best").code == 2  # nobody to ask
    assert cli("tag", history.root, "-d", "best", "--dry-run").err == (
        "best is main@200; nothing was changed\n"
    )
    assert cli("tag", history.root, "-d", "bset", "-y").code == 12
    assert tags(cli, history) == {"best": "main@200"}

    assert cli("tag", history.root, "-d", "best", "-y").err == "best was main@200\n"
    assert tags(cli, history) == {}
    assert cli("tag", history.root).err.startswith("no tags in ")


def test_words_that_mean_nothing_are_a_usage_error(cli, history) -> None:
    assert cli("tag", history.root, "a", "main@100", "b").code == 2
    assert cli("tag", history.root, "-d", "a", "b", "-y").code == 2
    assert cli("tag", history.root, "a", "-y").code == 2
