"""A state as one file of torch.save that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ckptcoord.formats.saying import torch_reads_back, torch_writes, weights_only_error

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.formats.spilled import Spilled


def write_torch(spilled: Spilled, path: Path) -> None:
    """Write a new file and read it back.

    Raises:
        ConfigError: something in the state is nothing that weights_only=True reads.
        StorageError: there is no space, for instance.
        CorruptError: what was read back is not what was written.
    """
    with torch_writes(path.name), path.open("xb") as file:
        torch.save(spilled.state, file)
    try:
        # Mapped: what is compared is in memory one tensor at a time.
        with torch_reads_back(path.name):
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # noqa: TID251 (formats/)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise weights_only_error(error, path.name) from error
    spilled.check(found, path.name)
