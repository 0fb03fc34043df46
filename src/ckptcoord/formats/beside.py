"""The small files beside a model: those of an import, also for what was trained from it since.

An import of a Hugging Face folder keeps the tokenizer's files, each one's bytes, as the component
`files`. Later checkpoints do not have them again: theirs are those of the nearest one before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptcoord.core.manifest import FileKind
from ckptcoord.core.manifest_fields import MANIFEST_NAME, MAX_MANIFEST_BYTES
from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.dist.restore import build
from ckptcoord.errors import CorruptError, StorageError, UnsafePathError
from ckptcoord.formats.components import MODEL
from ckptcoord.formats.hf import CONFIG
from ckptcoord.formats.model import FILES, is_small_file
from ckptcoord.formats.spill import scratch
from ckptcoord.formats.whole import WholeCheckpoint, WholeTensor
from ckptcoord.plan.ancestry import Ancestry
from ckptcoord.store.checks import check_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptcoord.core.entries import Commit
    from ckptcoord.formats.whole import WholeState

IMPORTED = "imported"
"""In the metadata of a model that was imported: what from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a checkpoint has beside a model's tensors.

    Attributes:
        config: the config.json; empty where there is none.
        names: of the other files, sorted.
        origin: whose these are, if not the checkpoint's own.
        notes: what is not its own, and what is left out.
    """

    config: bytes = b""
    names: tuple[str, ...] = ()
    origin: Commit | None = None
    notes: tuple[str, ...] = ()


def find_beside(source: WholeCheckpoint, component: str, whole: WholeState) -> Beside:
    """What is beside a component's tensors: its own, or for a model that of the import before it.

    An import's config.json goes only with tensors of the same names and shapes.

    Args:
        source: the checkpoint.
        component: its key.
        whole: its state.

    Raises:
        UnsafePathError: a file has a name that no import gives.
        CorruptError, StorageError: the checkpoint cannot be read.
    """
    own = Beside(config=_config(source, component))
    if component != MODEL:
        return own
    if _is_import(source):
        return replace(own, names=tuple(sorted(_files(source))))
    try:
        origin = _import_before(source)
        if origin is None:
            return own
        with WholeCheckpoint(source.repository, origin) as there:
            fits = not own.config and _shapes(there.state(MODEL)) == _shapes(whole)
            config = _config(there, MODEL) if fits else own.config
            names = tuple(sorted(_files(there))) if FILES in there.manifest.components else ()
    except (CorruptError, StorageError) as error:  # what is exported is whole all the same
        why = f"left out what was beside the model that was imported: {error.what}"
        return replace(own, notes=(why,))
    taken = (*((CONFIG,) if config and fits else ()), *names)
    notes = (f"{', '.join(taken)} as of {origin.checkpoint_id.ref}, the import",) if taken else ()
    return Beside(config=config, names=names, origin=origin, notes=notes)


def read_beside(source: WholeCheckpoint, beside: Beside) -> Iterator[tuple[str, bytes]]:
    """The files that `names` says, one in memory at a time.

    Raises:
        CorruptError, StorageError: one cannot be read.
    """
    if not beside.names:
        return
    if beside.origin is None:
        yield from _read(source)
        return
    with WholeCheckpoint(source.repository, beside.origin) as there:
        yield from _read(there)


def _read(there: WholeCheckpoint) -> Iterator[tuple[str, bytes]]:
    for name, tensor in sorted(_files(there).items()):
        out = scratch(tensor.spec)
        there.read(tensor, out)
        yield name, tensor_bytes(out).tobytes()


def _files(there: WholeCheckpoint) -> dict[str, WholeTensor]:
    """The small files of an import, by name.

    Raises:
        UnsafePathError: one has a name that no import gives.
    """
    if FILES not in there.manifest.components:
        return {}
    whole = there.state(FILES)
    found = build(whole.state.tree, whole.tensors, whole.state.path)
    if not isinstance(found, dict):
        raise CorruptError(path=whole.state.path, why="holds no files by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, WholeTensor):
            raise CorruptError(path=whole.state.path, why="holds no files by name")
        if tensor.spec.dtype != "U8" or len(tensor.spec.shape) != 1:
            raise CorruptError(path=whole.state.path, why=f"{name!r:.80} is no file's bytes")
        if len(check_path(name)) > 1 or not name.isprintable():
            why = "it is no name of a file beside a model"
            raise UnsafePathError(path=ascii(name)[:200], why=why)
    return {name: tensor for name, tensor in found.items() if is_small_file(name)}


def _import_before(source: WholeCheckpoint) -> Commit | None:
    """The nearest import among the checkpoints that this one came of; None: there is none."""
    repository = source.repository
    state = repository.state()
    ancestry, seen = Ancestry(state), {source.commit.checkpoint_id}
    above = ancestry.above(source.commit)
    while above is not None and above not in seen:
        seen.add(above)
        commit = state.commits[above]
        path = f"{commit.path}/{MANIFEST_NAME}"
        # Most of a long run's are none, and to check a manifest takes a while.
        if f'"{IMPORTED}"'.encode() in repository.store.read(path, limit_bytes=MAX_MANIFEST_BYTES):
            with WholeCheckpoint(repository, commit) as there:
                if _is_import(there):
                    return commit
        above = ancestry.above(commit)
    return None


def _is_import(there: WholeCheckpoint) -> bool:
    model = there.manifest.components.get(MODEL)
    return model is not None and IMPORTED in model.metadata


def _config(there: WholeCheckpoint, component: str) -> bytes:
    for record in there.manifest.files:
        if record.kind is FileKind.CONFIG and record.component == component:
            return there.repository.read_document(there.commit, record)
    return b""


def _shapes(whole: WholeState) -> dict[str, tuple[int, ...]]:
    return {name: one.spec.shape for name, one in whole.tensors.items()}
