"""Can a checkpoint be a base: asked before anything is coded against it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ckptcoord.codec.recipe import SourceFile
from ckptcoord.core.manifest import TENSOR_KINDS
from ckptcoord.errors import BaseUnreadableError, CkptError, ThreadLimitError
from ckptcoord.repo.deltas import DeltaReader, open_tensors
from ckptcoord.repo.threads import Threads

if TYPE_CHECKING:
    from ckptcoord.core.manifest import CheckpointManifest
    from ckptcoord.repo.repository import Repository


def check_files(
    repository: Repository, folder: str, manifest: CheckpointManifest, *, threads: int
) -> None:
    """The files of a checkpoint's tensors, and all that these are made out of, have sound headers.

    They are there with their sizes, and the digests of their headers are those that their manifest,
    or the delta that names them, says. The bytes of tensors are not read.

    Args:
        repository: where they are.
        folder: of the checkpoint.
        manifest: its.
        threads: that read.

    Raises:
        BaseUnreadableError: one of them is not; names the file.
        ThreadLimitError: the system starts no more threads.
    """
    files = {
        path: SourceFile(path=path, size_bytes=record.size_bytes, digest=record.digest)
        for record in manifest.files
        if record.kind in TENSOR_KINDS
        for path in (f"{folder}/{record.path}",)
    }
    seen = set(files)
    with Threads(threads, "ckptcoord-base") as pool:
        while files:
            try:
                found = list(pool.map(partial(_named_by, repository), files.values()))
            except ThreadLimitError:
                raise
            except CkptError as error:
                raise BaseUnreadableError(folder=folder, why=error.what) from error
            files = {file.path: file for some in found for file in some if file.path not in seen}
            seen |= files.keys()


def _named_by(repository: Repository, file: SourceFile) -> list[SourceFile]:
    """The files that a file's tensors are made out of; its header is read and checked.

    Raises:
        CkptError: it cannot be read.
    """
    with open_tensors(
        repository.store, file.path, expected=file.digest, size_bytes=file.size_bytes or None
    ) as reader:
        if not isinstance(reader, DeltaReader):
            return []
        sources = {one.source[0] for one in reader.recipes.values() if one.source is not None}
    folder = file.folder
    named = {one.path: one for one in sources if one.folder}
    for one in sources:
        if not one.folder:
            path = f"{folder}/{one.path.removeprefix('./')}"
            named.setdefault(path, SourceFile(path=path))
    return [named[path] for path in sorted(named)]
