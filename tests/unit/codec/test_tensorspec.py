"""Names, dtypes and shapes."""

import numpy as np
import pytest

from ckptcoord.codec.tensorspec import (
    ITEM_BYTES,
    MAX_DIMS,
    MAX_NAME_CHARS,
    STORED_BYTES,
    TensorSpec,
    check_tensor_name,
)
from ckptcoord.errors import ConfigError, InvalidNameError


@pytest.mark.parametrize(
    "name",
    ["w", "model.layers.0.weight", "a/b", "a..b", "...", "/", "Größe", "x y", "\\", "层"],
)
def test_a_printable_name_is_taken(name):
    assert TensorSpec(name=name, dtype="F32", shape=()).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "__metadata__",
        "a\0b",
        "a\nb",
        "\ud800",
        "\u202e",
        "..",
        "../w",
        "a/../b",
        "a\\..\\b",
        "x" * (MAX_NAME_CHARS + 1),
    ],
)
def test_a_name_that_could_do_harm_is_refused(name):
    with pytest.raises(InvalidNameError):
        check_tensor_name(name)
    with pytest.raises(InvalidNameError):
        TensorSpec(name=name, dtype="F32", shape=())


def test_every_dtype_has_its_size():
    assert {name: size for name, size in ITEM_BYTES.items() if name not in STORED_BYTES} == {
        "C128": 16,
        "C32": 4,
        "F4": 1,
    }
    for name, size in STORED_BYTES.items():
        digits = name.partition("_")[0].lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        assert size == (int(digits) // 8 if digits else 1), name


@pytest.mark.parametrize(("shape", "nbytes"), [((), 4), ((0,), 0), ((2, 3), 24), ((5, 0, 7), 0)])
def test_its_size_is_elements_times_item_size(shape, nbytes):
    assert TensorSpec(name="w", dtype="F32", shape=shape).nbytes == nbytes


@pytest.mark.parametrize(
    ("dtype", "shape", "stored"),
    [
        ("BF16", (2, 3), ("BF16", (2, 3))),
        ("C64", (2, 3), ("C64", (2, 3))),
        ("C128", (2, 3), ("F64", (2, 3, 2))),
        ("C128", (), ("F64", (2,))),
        ("C128", (1,) * MAX_DIMS, ("U8", (16,))),
        ("C32", (2, 3), ("U8", (24,))),
        ("F4", (2, 3), ("U8", (6,))),
        ("F4", (), ("U8", (1,))),
    ],
)
def test_what_safetensors_does_not_know_is_stored_as_what_it_does(dtype, shape, stored):
    spec = TensorSpec(name="w", dtype=dtype, shape=shape)
    assert spec.stored == stored
    assert TensorSpec(name="w", dtype=stored[0], shape=stored[1]).nbytes == spec.nbytes


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F33", ()),
        ("f32", ()),
        ("", ()),
        ("F32", (-1,)),
        ("F32", (True,)),
        ("F32", (1.0,)),
        ("F32", (np.int64(3),)),
        ("F32", ("3",)),
        ("F32", (1,) * (MAX_DIMS + 1)),
        ("F32", (1,) * 10_000),
        ("U8", (2**63,)),
        ("F32", (2**61,)),
        ("U8", (2**32, 2**31)),
        ("U8", (2**62,) * MAX_DIMS),
        ("U8", (0, 2**62, 2**62)),
    ],
)
def test_a_dtype_or_shape_that_cannot_be_is_refused(dtype, shape):
    with pytest.raises(ConfigError, match="'w'"):
        TensorSpec(name="w", dtype=dtype, shape=shape)


def test_the_largest_tensor_is_taken():
    assert TensorSpec(name="w", dtype="U8", shape=(2**63 - 1,)).nbytes == 2**63 - 1
