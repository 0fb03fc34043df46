"""A state as a folder that torch.distributed.checkpoint loads, on any number of ranks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ckptcoord.errors import ConfigError
from ckptcoord.formats.saying import torch_reads_back, torch_writes

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.formats.spilled import Spilled


def write_dcp(spilled: Spilled, folder: Path) -> None:
    """Write into a folder and read it back.

    Raises:
        ConfigError: the state is no dict with text for keys.
        StorageError: there is no space, for instance.
        CorruptError: what was read back is not what was written.
    """
    state = spilled.state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ConfigError(field="--to", why="dcp holds a dict whose keys are text; this is none")
    with warnings.catch_warnings():
        # What is asked for, one process, it takes for a mistake.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        with torch_writes(folder.name):
            save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
        # Into the very same tensors, zeros by then: no room for another state is needed.
        spilled.clear()
        with torch_reads_back(folder.name):
            load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    spilled.check(state, folder.name)
