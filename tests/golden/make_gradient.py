"""Make tests/golden/gradient with gradient-desc itself.

    pip install --no-deps --target /tmp/gradient-desc gradient-desc==0.1.17
    PYTHONPATH=/tmp/gradient-desc python tests/golden/make_gradient.py

A model with every dtype that gradient-desc does not crash on, three commits on `main` of which the
last two are differences, a fork `exp` at step 20 with one more; with compression and without.
Beside each repository, `<name>.loaded.pt` has what gradient-desc itself loads of each checkpoint.
"""

import shutil
from pathlib import Path

import torch
from gradient.api.config import GradientConfig
from gradient.api.engine import GradientEngine
from torch import nn

GOLDEN = Path(__file__).parent / "gradient"
# It writes absolute paths into its files, so they are made where nobody's name is in the path.
HERE = Path("/tmp/golden/gradient")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def make(name, compression):
    def attach(parts):
        config = GradientConfig(compression=compression, checkpoint_mode="local")
        return GradientEngine.attach(*parts, workspace=str(HERE), repo=name, config=config)

    parts = build()
    engine = attach(parts)
    for step in (10, 20, 30):
        train(*parts, 10)
        engine.commit(step, message=f"after {step}")
    engine.fork(from_ref="main@20", new_branch="exp", message="another try")
    engine._config.branch = "exp"  # fork does not switch it
    train(*parts, 10)
    engine.commit(30, message="on exp")
    loaded = {}
    for ref in ("main@10", "main@20", "main@30", "exp@20", "exp@30"):
        parts = build()
        engine = attach(parts)
        engine._engine.resume(str(HERE / name / f"ckpt_{ref.replace('@', '_s')}.pt"))
        loaded[ref] = {
            "model": {k: v.clone() for k, v in parts[0].state_dict().items()},
            "optimizer": parts[1].state_dict(),
            "scheduler": parts[2].state_dict(),
        }
    torch.save(loaded, HERE / f"{name}.loaded.pt")


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for name, compression in (("off", "off"), ("auto", "auto"), ("sparse", "aggressive")):
        make(name, compression)
    shutil.rmtree(HERE / ".gradient")
    shutil.rmtree(GOLDEN, ignore_errors=True)
    shutil.copytree(HERE, GOLDEN)
