"""`ckptcoord tag`: names for checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.cli.asking import agreed, name_and_ref, nonce, only_name
from ckptcoord.cli.locate import find_commit
from ckptcoord.cli.text import Style, ago, aligned, metrics_text, printable
from ckptcoord.core.refs import BranchName, TagName, checked_name
from ckptcoord.errors import ConfigError, RefNotFoundError
from ckptcoord.plan.commit import branches
from ckptcoord.plan.lookup import nearest
from ckptcoord.repo.history import delete_tag, set_tag
from ckptcoord.repo.repository import Repository, open_repository

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ckptcoord.cli.dropping import Consent
    from ckptcoord.cli.output import Output
    from ckptcoord.core.refs import CheckpointId
    from ckptcoord.plan.commit import LogState


def run(out: Output, root: Path, words: Sequence[str], *, force: bool) -> int:
    """List the tags, or set one: `NAME [REF]`.

    Raises:
        InvalidNameError: the name can be none.
        TagExistsError: it names another checkpoint, and `force` is not given.
        ConfigError: it is a branch's name, and `force` is not given; or there are too many words.
        RefNotFoundError: there is no such checkpoint.
        CkptError: the repository cannot be read, or its log not appended to.
    """
    asked = name_and_ref("tag", words)
    repository = open_repository(root)
    state = repository.state()
    if asked is None:
        _list(out, repository, state)
        return 0
    name = TagName(checked_name("tag", asked[0]))
    if BranchName(asked[0]) in branches(state) and not force:
        raise ConfigError(
            field="tag",
            why=f"{asked[0]!r} is a branch, which the tag would hide",
            help="Choose another name, or give --force",
        )
    target = find_commit(state, root, asked[1]).checkpoint_id
    before = set_tag(repository, name, target, writer=nonce(), move=force)
    if out.as_json:
        was = None if before is None else before.ref
        out.data({"repository": repository.url, "tag": str(name), "ref": target.ref, "before": was})
    else:
        moved = "" if before is None or before == target else f" (was {before.ref})"
        out.note(f"{name} is {target.ref}{moved}")
    return 0


def delete(out: Output, root: Path, words: Sequence[str], consent: Consent) -> int:
    """Delete a tag; the checkpoint stays.

    Raises:
        ConfigError: there is not one name, or there is nobody to ask and no `-y`.
        RefNotFoundError: there is no such tag.
        CkptError: the repository cannot be read, or its log not appended to.
    """
    text = only_name("tag", words)
    consent.require(out)
    repository = open_repository(root)
    state = repository.state()
    name = TagName(text)
    if name not in state.tags:
        raise RefNotFoundError(ref=text, nearest=nearest(state, text))
    ref = state.tags[name].ref
    done = not consent.dry_run and (consent.yes or agreed(f"Delete the tag {name} of {ref}?"))
    if done:
        delete_tag(repository, name, writer=nonce())
    if out.as_json:
        said = {"dry_run": consent.dry_run, "done": done, "tag": str(name), "before": ref}
        out.data({"repository": repository.url, **said})
    else:
        out.note(f"{name} was {ref}" if done else f"{name} is {ref}; nothing was changed")
    return 0


def _list(out: Output, repository: Repository, state: LogState) -> None:
    tags = [(str(name), target) for name, target in sorted(state.tags.items())]
    if out.as_json:
        documents = [
            {"tag": name, "ref": target.ref, "checkpoint_id": str(target)} for name, target in tags
        ]
        out.data({"repository": repository.url, "tags": documents})
    elif out.terminal:
        rows: list[tuple[str, ...]] = [
            (name, target.ref, *_facts(out, state, target)) for name, target in tags
        ]
        out.lines(
            f"{out.paint(first, Style.YELLOW)}  {'  '.join(rest)}".rstrip()
            for first, *rest in aligned(rows)
        )
    else:
        out.lines(f"{name}\t{target.ref}" for name, target in tags)
    if not tags and not out.as_json:
        out.note(f"no tags in {printable(repository.url)}")


def _facts(out: Output, state: LogState, target: CheckpointId) -> tuple[str, str]:
    if target not in state.commits:  # only a forged log says so
        return "-", ""
    metrics = metrics_text(state.commits[target].metrics)
    return ago(state.stamps[target].timestamp, out.now), metrics
