"""Shard files as safetensors and transformers read them, with no ckptcoord."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

from ckptcoord.codec.tensorfile import TensorSpec
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.readjobs import read_tensors
from ckptcoord.repo.shards import TensorSource, hf_index, write_file, write_shard
from ckptcoord.store.local import LocalStore

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "C128": torch.complex128,
    "C32": torch.complex32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHAPES = {"full": (3, 5), "scalar": (), "empty": (0,), "hollow": (2, 0, 3)}


def raw_bytes(tensor):
    if not tensor.numel():
        return np.empty(0, np.uint8)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def source(name, tensor):
    spec = TensorSpec(name=name, dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape))
    return TensorSource(spec=spec, read=lambda: raw_bytes(tensor))


def random_tensor(dtype, shape):
    """Any bits at all, so NaN payloads and -0 too."""
    count = int(np.prod(shape))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).to(torch.bool)
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_bit_for_bit_here_and_in_safetensors(name, tmp_path):
    torch.manual_seed(0)
    tensors = {key: random_tensor(DTYPES[name], shape) for key, shape in SHAPES.items()}
    with LocalStore(tmp_path) as store:
        written = write_shard(store, "x", [source(k, t) for k, t in tensors.items()])
        with ShardReader(store, "x", expected=written.digest) as reader:
            for entry in reader.header.entries:
                assert entry.spec.dtype == name
                out = np.empty(entry.spec.nbytes, np.uint8)
                reader.read_into(entry, out.data)
                assert out.tobytes() == raw_bytes(tensors[entry.spec.name]).tobytes()
                assert entry.spec.shape == tuple(tensors[entry.spec.name].shape)
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for key, tensor in loaded.items():
        assert raw_bytes(tensor).tobytes() == raw_bytes(tensors[key]).tobytes()
        if name not in ("C128", "C32", "F4"):
            assert (tensor.dtype, tensor.shape) == (DTYPES[name], tensors[key].shape)
        elif name == "C128":
            assert torch.view_as_complex(tensor).shape == tensors[key].shape


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_mixed_file_opens_lazily_in_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{name}/{key}": random_tensor(dtype, shape)
        for name, dtype in DTYPES.items()
        for key, shape in SHAPES.items()
    }
    with LocalStore(tmp_path) as store:
        write_shard(store, "x", [source(k, t) for k, t in tensors.items()], metadata={"a": "b"})
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata()["a"] == "b"
        assert file.metadata()["format"] == "pt"
        assert torch.equal(file.get_tensor("I64/full"), tensors["I64/full"])
        assert torch.equal(file.get_slice("U8/full")[1:2], tensors["U8/full"][1:2])


def tiny(kind):
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_loads_a_folder_of_ours(kind, files, tmp_path):
    model = tiny(kind)
    state = model.state_dict()
    tied = model.config.tie_word_embeddings
    kept = [name for name in state if not (tied and name == "lm_head.weight")]
    parts = {f"model-{i + 1:05d}-of-{files:05d}.safetensors": kept[i::files] for i in range(files)}
    total = sum(state[name].nbytes for name in kept)
    with LocalStore(tmp_path) as store:
        for file, names in parts.items():
            write_shard(store, file, [source(name, state[name]) for name in names])
        write_file(store, "model.safetensors.index.json", hf_index(parts, total))
        write_file(store, "config.json", json.dumps(model.config.to_diff_dict()).encode())
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    tokens = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_a_file_that_safetensors_wrote_is_read(tmp_path):
    torch.manual_seed(0)
    tensors = {
        name: random_tensor(dtype, (4, 3))
        for name, dtype in DTYPES.items()
        if name not in ("C128", "C32", "F4")
    }
    safetensors.torch.save_file(tensors, tmp_path / "x")
    with LocalStore(tmp_path) as store, ShardReader(store, "x", expected=None) as reader:
        outs = {e.spec.name: np.empty(e.spec.nbytes, np.uint8) for e in reader.header.entries}
        read_tensors(
            [(reader, e, outs[e.spec.name].data) for e in reader.header.entries], threads=2
        )
    for name, tensor in tensors.items():
        assert outs[name].tobytes() == raw_bytes(tensor).tobytes()
