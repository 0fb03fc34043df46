"""`ckptcoord ls`: checkpoints, or the files of one, one a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.commits import Naming, commit_document
from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.text import Style, aligned, bytes_text, printable, short, when
from ckptcoord.repo.repository import Repository, open_repository

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.cli.output import Output
    from ckptcoord.core.entries import Commit


def run(out: Output, root: Path, ref: str | None) -> int:
    """List the checkpoints by branch and step, or the files of the one that `ref` names.

    Raises:
        RefNotFoundError: there is none.
        CkptError: the repository or the manifest cannot be read.
    """
    repository = open_repository(root)
    if ref is None:
        _checkpoints(out, repository)
    else:
        _files(out, repository, find_commit(repository.state(), root, ref))
    return 0


def _checkpoints(out: Output, repository: Repository) -> None:
    state = repository.state()
    commits = [commit for _, commit in sorted(state.commits.items())]
    if out.as_json:
        naming = Naming(state)
        checkpoints = [commit_document(state, c, naming.of(c.checkpoint_id)) for c in commits]
        out.data({"repository": repository.url, "checkpoints": checkpoints})
    elif out.terminal:
        rows: list[tuple[str, ...]] = [
            (
                c.checkpoint_id.ref,
                bytes_text(c.stored_bytes),
                c.path,
                when(state.stamps[c.checkpoint_id].timestamp, out.now),
            )
            for c in commits
        ]
        _table(out, rows)
    else:
        out.lines(
            f"{c.checkpoint_id.ref}\t{c.stored_bytes}\t{c.path}\t"
            f"{printable(state.stamps[c.checkpoint_id].timestamp)}"
            for c in commits
        )


def _files(out: Output, repository: Repository, commit: Commit) -> None:
    records = repository.manifest(commit).files
    if out.as_json:
        out.data(
            {
                "repository": repository.url,
                "ref": commit.checkpoint_id.ref,
                "path": commit.path,
                "files": [record.model_dump(mode="json") for record in records],
            }
        )
    elif out.terminal:
        rows: list[tuple[str, ...]] = [
            (r.path, bytes_text(r.size_bytes), r.component, r.kind.value, short(r.digest))
            for r in records
        ]
        _table(out, rows)
    else:
        out.lines(
            f"{r.path}\t{r.size_bytes}\t{r.component}\t{r.kind.value}\t{r.digest}" for r in records
        )


def _table(out: Output, rows: list[tuple[str, ...]]) -> None:
    out.lines(
        f"{out.paint(first, Style.YELLOW)}  {'  '.join(rest)}"
        for first, *rest in aligned(rows, right=frozenset({1}))
    )
