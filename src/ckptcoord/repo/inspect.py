"""What is in a checkpoint, from its manifest and headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.manifest import TENSOR_KINDS, FileKind

if TYPE_CHECKING:
    from ckptcoord.core.entries import Commit
    from ckptcoord.repo.repository import Repository


def content_digests(repository: Repository, commit: Commit) -> dict[str, str]:
    """The digest of every tensor and state document: equal for equal state, however it was sharded.

    Keys are `component[.scope]/tensor`, and `component[.scope]/` for what is no tensor.

    Raises:
        CorruptError: a manifest or header is damaged.
    """
    found = {}
    for record in repository.manifest(commit).files:
        place = f"{record.component}.{record.scope}" if record.scope else record.component
        if record.kind is FileKind.STATE:
            found[f"{place}/"] = str(record.digest)
        elif record.kind in TENSOR_KINDS:
            with repository.open_shard(commit, record) as reader:
                for entry in reader.header.entries:
                    found[f"{place}/{entry.spec.name}"] = str(entry.digest)
    return found
