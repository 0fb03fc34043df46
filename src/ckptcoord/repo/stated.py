"""What a manifest says its components have is the most that a load allocates for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.errors import CorruptError

if TYPE_CHECKING:
    from ckptcoord.core.manifest import CheckpointManifest, FileRecord
    from ckptcoord.repo.readers import TensorReader


class StatedSizes:
    """Holds the headers of a checkpoint's files to the manifest.

    A few bytes of frames can claim to be any tensor; who believes the header alone allocates it.

    Args:
        manifest: of the checkpoint.
    """

    def __init__(self, manifest: CheckpointManifest) -> None:
        self._stated = {key: one.size_bytes for key, one in manifest.components.items()}
        self._found: dict[str, dict[str, int]] = {key: {} for key in self._stated}

    def check(self, record: FileRecord, reader: TensorReader) -> None:
        """Take note of a file's tensors; together with those of its component seen before.

        Raises:
            CorruptError: they have more bytes than the manifest says; names the largest.
        """
        specs = [entry.spec for entry in reader.header.entries]
        found = self._found[record.component]
        found[record.path] = sum(spec.nbytes for spec in specs)
        stated = self._stated[record.component]
        if sum(found.values()) <= stated:
            return
        largest = max(specs, key=lambda spec: spec.nbytes)
        raise CorruptError(
            path=reader.path,
            why=f"its tensors have {found[record.path]:,} bytes (tensor {largest.name!r:.80} alone "
            f"{largest.nbytes:,}), and its manifest says that all of {record.component!r} has "
            f"{stated:,}",
            tensor=largest.name,
        )
