"""Make tests/golden/hf with transformers: models one-file and sharded, tied, and a Trainer's run.

    python tests/golden/make_hf.py

`bin` and `bin_sharded` are as transformers wrote them before version 5, which writes safetensors
only: the same names and index, each file by torch.save. `whole.pt` has the model's state.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

GOLDEN = Path(__file__).parent / "hf"
# Paths stand in what the Trainer writes, so it runs where nobody's name is in the path.
HERE = Path("/tmp/golden/hf")


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, n_inner=8)
    )


def as_bin() -> None:
    state = model().state_dict()
    (HERE / "bin").mkdir()
    torch.save(state, HERE / "bin/pytorch_model.bin")
    shutil.copy(HERE / "one/config.json", HERE / "bin")
    (HERE / "bin_sharded").mkdir()
    names = list(state)
    half = len(names) // 2
    parts = {"1": names[:half], "2": names[half:]}
    weight_map = {}
    for number, part in parts.items():
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, HERE / "bin_sharded" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (HERE / "bin_sharded/pytorch_model.bin.index.json").write_text(text)
    shutil.copy(HERE / "one/config.json", HERE / "bin_sharded")


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(8) + index) % 16
        return {"input_ids": words, "labels": words}


def train() -> None:
    args = TrainingArguments(
        output_dir=str(HERE / "trainer"),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=3,
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
    )
    Trainer(model(), args, train_dataset=Words(), eval_dataset=Words()).train()


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    model().save_pretrained(HERE / "one")
    model().save_pretrained(HERE / "sharded", max_shard_size="4KB")
    torch.save(model().state_dict(), HERE / "whole.pt")
    as_bin()
    train()
    shutil.rmtree(GOLDEN, ignore_errors=True)
    shutil.copytree(HERE, GOLDEN)
    shutil.rmtree(HERE)
