"""A training loop of one's own: run it, kill it, run it again, fork it."""

import torch

from ckptcoord import CheckpointEngine

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
place = {"workspace": "ml-experiments", "repo": "first"}

with CheckpointEngine.attach(model, optimizer, scheduler, **place) as engine:
    engine.autocommit(every=20)
    engine.resume_latest()
    for step in range(engine.current_step + 1, 201):
        x = torch.randn(16, 32)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        engine.maybe_commit(step, metrics={"loss": loss.item()})
        print(step, loss.item(), flush=True)
