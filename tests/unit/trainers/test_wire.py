"""Batches travel as state trees and bytes, and come back exactly; nothing is pickled."""

from __future__ import annotations

import ast
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptcoord
from ckptcoord.errors import UnsupportedStateError
from ckptcoord.trainers.wire import pack, plain, unpack


def test_a_batch_comes_back_with_its_types_shapes_and_bits():
    batch = {
        "ids": torch.arange(12).view(3, 4),
        "half": torch.tensor([1.5, float("nan")]).bfloat16(),
        "none": torch.zeros(0, 5),
        "names": ["a", ("b", None)],
        "array": np.arange(3, dtype=np.int16),
        "scale": 0.1,
    }
    back = unpack(pack(batch))
    assert back.keys() == batch.keys()
    for name in ("ids", "half", "none"):
        assert back[name].dtype == batch[name].dtype
        assert back[name].shape == batch[name].shape
        left, right = (t.contiguous().view(-1).view(torch.uint8) for t in (back[name], batch[name]))
        assert torch.equal(left, right)
    assert (back["names"], back["scale"]) == (batch["names"], 0.1)
    assert back["array"].dtype == np.int16
    assert back["array"].tolist() == [0, 1, 2]


def test_a_collator_s_own_mapping_becomes_a_dict_and_what_is_no_data_is_refused():
    assert unpack(pack(plain(UserDict(x=1)))) == {"x": 1}
    assert plain([1]) == [1]
    with pytest.raises(UnsupportedStateError):
        pack({"x": object()})


def test_nothing_in_the_package_pickles():
    """Neither by name nor through torch's object collectives, which do."""
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    calls = {"broadcast_object_list", "scatter_object_list", "all_gather_object", "gather_object"}
    for path in Path(ckptcoord.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names}
                names |= {(getattr(node, "module", "") or "").partition(".")[0]}
                assert not names & banned, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in calls, path
