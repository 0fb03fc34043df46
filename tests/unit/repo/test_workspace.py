"""Workspaces and repositories: found, made once, and read strictly."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptcoord import (
    RepoConfig,
    WorkspaceConfig,
    find_repo,
    find_workspace,
    init_repo,
    init_workspace,
    open_repository,
    resolve_context,
)
from ckptcoord.core.context import Origin
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    FormatVersionError,
    InvalidNameError,
    ManifestError,
    OutputDirError,
    RepositoryNotFoundError,
    WorkspaceNotFoundError,
)
from ckptcoord.plan.retention import Mode, Retention
from ckptcoord.repo.settings import MAX_DESCRIPTION
from ckptcoord.repo.workspace import repositories

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = [
    "",
    "..",
    ".",
    "a/b",
    "a\0b",
    "x" * 10_000,
    "a.lock",
    "latest",
    "checkpoint-5",
    "-x",
    "é",
]


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with two repositories; the process stands in it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder = init_workspace(tmp_path / "space")
    init_repo("a", workspace=folder)
    init_repo("b", workspace=folder, description="the other")
    monkeypatch.chdir(folder)
    return folder


def marker(folder: Path) -> Path:
    return folder / ".ckptcoord/repo.yaml"


# --- made and found ------------------------------------------------------------------------------


def test_a_workspace_and_its_repositories_are_found_from_below(space: Path) -> None:
    deep = space / "a/checkpoint-5/x"
    deep.mkdir(parents=True)
    assert find_workspace(deep) == space
    assert find_repo(deep) == space / "a"
    assert (find_workspace(), find_repo()) == (space, None)
    assert repositories(space) == ("a", "b")
    assert find_workspace(space.parent) is None


def test_what_is_there_is_never_overwritten(space: Path) -> None:
    text = "# mine\nformat_version: 1\ndescription: ours\n"
    marker(space / "a").write_text(text)
    (space / ".ckptcoord/workspace.yaml").write_text(text)

    assert init_repo("a", description="new") == space / "a"
    assert init_workspace(space, description="new") == space

    assert marker(space / "a").read_text() == text
    assert (space / ".ckptcoord/workspace.yaml").read_text() == text


def test_many_that_make_it_at_once_make_one(space: Path) -> None:
    start = threading.Barrier(8)
    made: list[Path] = []

    def make(at: int) -> None:
        start.wait()
        made.append(init_repo("new", description=f"number {at}"))

    threads = [threading.Thread(target=make, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert made == [space / "new"] * 8
    assert open_repository(space / "new").state().number == 0
    assert RepoConfig.parse(marker(space / "new").read_bytes(), path="x").description


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_none_makes_nothing(space: Path, name: str) -> None:
    before = sorted(space.parent.rglob("*"))
    with pytest.raises(InvalidNameError):
        init_repo(name)
    with pytest.raises(CkptError):
        resolve_context(space, name, environ={})
    assert sorted(space.parent.rglob("*")) == before


def test_a_folder_is_a_workspace_or_a_repository(space: Path) -> None:
    with pytest.raises(OutputDirError, match="is a repository"):
        init_workspace(space / "a")
    init_workspace(space / "inner")
    with pytest.raises(OutputDirError, match="is a workspace"):
        init_repo("inner")


def test_without_a_workspace_it_is_said_how_to_make_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkspaceNotFoundError, match="ckptcoord workspace init"):
        init_repo("a")
    with pytest.raises(WorkspaceNotFoundError):
        init_repo("a", workspace=tmp_path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="file"):
        init_workspace(tmp_path / "file")
    with pytest.raises(OutputDirError, match="file"):
        init_workspace(tmp_path / "file/below")


def test_a_linked_marker_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "space").mkdir()
    (tmp_path / "space/.ckptcoord").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CkptError):
        init_workspace(tmp_path / "space")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_current_directory_that_was_deleted_is_no_traceback(tmp_path: Path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for look in (find_repo, find_workspace, lambda: resolve_context(environ={})):
        with pytest.raises(RepositoryNotFoundError):
            look()
    monkeypatch.chdir(tmp_path)


# --- which one is meant --------------------------------------------------------------------------


def test_where_one_stands_says_it(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space / "a")
    found = resolve_context(environ={})
    assert (found.workspace_path, found.repo_name, found.repo_path) == (space, "a", space / "a")
    assert (found.branch, found.resume_ref, found.autocommit, found.resets, found.seed) == (
        "main",
        None,
        0,
        (),
        None,
    )
    assert found.origins["repo_path"] is Origin.FOUND
    assert found.origins["branch"] is Origin.DEFAULT


def test_an_argument_goes_before_the_environment_and_that_before_the_file(space: Path) -> None:
    marker(space / "b").write_text("format_version: 1\nbranch: filed\nautocommit: 10\n")
    told = {"CKPTCOORD_WORKSPACE": str(space), "CKPTCOORD_REPO": "b", "CKPTCOORD_AUTOCOMMIT": "20"}

    heard = resolve_context(environ=told)
    assert (heard.repo_name, heard.branch, heard.autocommit) == ("b", "filed", 20)
    assert heard.origins["repo_name"] is Origin.ENVIRONMENT
    assert heard.origins["branch"] is Origin.REPOSITORY

    asked = resolve_context(repo="a", branch="mine", autocommit=30, environ=told)
    assert (asked.repo_name, asked.branch, asked.autocommit) == ("a", "mine", 30)
    assert set(asked.origins.values()) >= {Origin.ARGUMENT, Origin.ENVIRONMENT, Origin.DEFAULT}


def test_what_code_names_is_made(tmp_path: Path) -> None:
    found = resolve_context(tmp_path / "new", "run", environ={})
    assert find_workspace(found.repo_path) == tmp_path / "new"
    assert resolve_context(repo="more", start=tmp_path / "new", environ={}).repo_name == "more"
    alone = resolve_context(repo=tmp_path / "alone", environ={})
    assert (alone.workspace_path, alone.repo_name) == (None, "alone")
    assert resolve_context(tmp_path / "new", "run", environ={}).repo_path == found.repo_path


def test_what_only_the_environment_names_is_not_made(space: Path) -> None:
    for told in (
        {"CKPTCOORD_REPO": "c"},
        {"CKPTCOORD_REPO": str(space / "c")},
        {"CKPTCOORD_WORKSPACE": str(space / "c"), "CKPTCOORD_REPO": "a"},
    ):
        with pytest.raises((RepositoryNotFoundError, WorkspaceNotFoundError), match="CKPTCOORD_"):
            resolve_context(environ=told)
    assert repositories(space) == ("a", "b")


def test_code_that_names_another_place_than_the_one_to_go_on_in_is_refused_and_makes_nothing(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"CKPTCOORD_REPO": str(space / "a"), "CKPTCOORD_RESUME_REF": "main@5"}
    monkeypatch.chdir(space.parent)
    assert resolve_context(space.name, "a", environ=told).repo_path.resolve() == space / "a"
    with pytest.raises(ConfigError, match=r"the code names .*b"):
        resolve_context(space.name, "b", environ=told)
    monkeypatch.chdir(space / "a")  # where the relative path means something else
    with pytest.raises(ConfigError, match=r"CKPTCOORD_REPO.*go on from main@5 in .*a, and no ckpt"):
        resolve_context(space.name, "a", environ=told)
    assert not (space / "a" / space.name).exists()


def test_nothing_is_made_where_that_was_asked_for(space: Path) -> None:
    with pytest.raises(RepositoryNotFoundError, match="The workspace has: a, b"):
        resolve_context(repo="c", environ={}, create=False)
    with pytest.raises(WorkspaceNotFoundError):
        resolve_context(space / "none", "c", environ={}, create=False)
    assert not (space / "none").exists()


def test_outside_of_a_repository_those_of_the_workspace_are_named(space: Path) -> None:
    with pytest.raises(RepositoryNotFoundError, match="The workspace has: a, b"):
        resolve_context(environ={})


def test_the_repository_around_counts_only_in_the_workspace_that_was_named(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = init_workspace(tmp_path / "other")
    monkeypatch.chdir(space / "a")
    assert resolve_context(space, environ={}).repo_name == "a"
    with pytest.raises(RepositoryNotFoundError):
        resolve_context(other, environ={})


def test_a_path_and_a_workspace_contradict_each_other(space: Path) -> None:
    with pytest.raises(ConfigError, match="repo: '\\./a' is a path"):
        resolve_context(space, "./a", environ={})


@pytest.mark.parametrize(
    "told", [{"CKPTCOORD_BRANCH": "a/b"}, {"CKPTCOORD_SEED": "x"}, {"CKPTCOORD_RESET": "all"}]
)
def test_a_variable_that_makes_no_sense_is_named(space: Path, told: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(told))):
        resolve_context(repo="a", environ=told)


# --- the files -----------------------------------------------------------------------------------

LINES = st.text(st.characters(blacklist_categories=("Cs",)), max_size=40).filter(
    lambda text: text.isprintable()
)
COUNTS = st.none() | st.integers(1, 10**15)
RULES = st.builds(
    Retention,
    keep_last=COUNTS,
    keep_every=COUNTS,
    keep_for_s=st.none() | st.floats(0, 1e15) | st.integers(0, 10**15),
) | st.builds(
    Retention,
    keep_best=st.integers(1, 9),
    metric=LINES.filter(bool),
    mode=st.none() | st.sampled_from(Mode),
)
CONFIGS = st.builds(
    RepoConfig,
    description=LINES,
    branch=st.none() | st.sampled_from(["main", "true", "1e3", "null", "0x10", "12_3"]),
    autocommit=st.none() | st.integers(0, 10**14),
    retention=RULES,
)


@given(CONFIGS)
def test_repo_yaml_is_read_as_it_was_written(config: RepoConfig) -> None:
    assert RepoConfig.parse(config.to_bytes(), path="x") == config


@given(LINES)
def test_workspace_yaml_is_read_as_it_was_written(description: str) -> None:
    config = WorkspaceConfig(description=description)
    assert WorkspaceConfig.parse(config.to_bytes(), path="x") == config


@given(st.binary(max_size=60) | LINES.map(lambda text: f"format_version: 1\n{text}".encode()))
def test_whatever_stands_in_it_is_read_or_refused_by_its_name(data: bytes) -> None:
    said = ""
    try:
        RepoConfig.parse(data, path="the/repo.yaml")
    except (ConfigError, FormatVersionError) as error:
        said = str(error)
    assert said == "" or "the/repo.yaml" in said
    assert len(said) < 600


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "format_version"),
        ("format_version: 1.0", "format_version"),
        ("format_version: 1\nbrnach: x", "unknown setting 'brnach'"),
        ("format_version: 1\n3: x", "unknown setting 3"),
        ("format_version: 1\nbranch: 5", "branch: is 5, not text"),
        ("format_version: 1\nbranch: a/b", "branch 'a/b'"),
        ("format_version: 1\nbranch: [a]", "branch: is"),
        ("format_version: 1\nautocommit: true", "autocommit: is True"),
        ("format_version: 1\nautocommit: -1", "autocommit: is -1"),
        ("format_version: 1\nautocommit: 1.5", "autocommit: is 1.5"),
        ("format_version: 1\ndescription: [x]", "description: is"),
        ('format_version: 1\ndescription: "a\\nb"', "description: .*line break"),
        ("format_version: 1\nbranch: a\nbranch: b", "'branch' twice"),
        ("format_version: 1\nretention: {keep_last: 1, keep_last: 2}", "'keep_last' twice"),
        ("format_version: 1\nretention: {keep_last: 0}", "retention.keep_last"),
        ("format_version: 1\nbranch: &a b", "anchors"),
        ("format_version: 1\nbranch: *a", "anchors"),
        ("format_version: 1\n? [a]\n: b", "no YAML"),
    ],
)
def test_a_mistake_is_named_by_file_and_field(space: Path, text: str, why: str) -> None:
    path = marker(space / "a")
    with pytest.raises(ConfigError, match=f"the/repo.yaml: .*{why}"):
        RepoConfig.parse(text.encode(), path="the/repo.yaml")
    path.write_text(text)
    for read in (
        lambda: open_repository(space / "a"),
        lambda: resolve_context(repo="a", environ={}),
    ):
        with pytest.raises(ManifestError, match=rf"a/\.ckptcoord/repo\.yaml: .*{why}"):
            read()


def test_a_newer_file_asks_for_an_upgrade(space: Path) -> None:
    (space / ".ckptcoord/workspace.yaml").write_text("format_version: 2\nnew: 1\n")
    with pytest.raises(FormatVersionError, match=r"workspace\.yaml"):
        init_workspace(space)


def test_a_huge_file_is_not_read(space: Path) -> None:
    marker(space / "a").write_bytes(b"format_version: 1\n" + b"#" * (1 << 20))
    with pytest.raises(CkptError, match=r"repo\.yaml"):
        open_repository(space / "a")


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[2J", "x" * (MAX_DESCRIPTION + 1), 5, "\ud800"])
def test_a_description_is_one_line(text: object) -> None:
    for cls in (RepoConfig, WorkspaceConfig):
        with pytest.raises(ConfigError, match="description"):
            cls(description=text)  # type: ignore[arg-type]


def test_an_ampersand_is_no_anchor(space: Path) -> None:
    init_repo("c", description="R&D: 50 * 2")
    assert resolve_context(repo="c", environ={}).repo_name == "c"
