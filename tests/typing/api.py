"""What a user writes, checked by mypy and never run."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from torch import nn

import lightning_tricks as lt
from lightning_tricks import errors, functional

trainer = L.Trainer(
    callbacks=[
        lt.EMA(),
        lt.EMA(0.99, start="1 epoch", every=10, buffers="average", where=["body.*"], exclude="*.bias", evaluate="both", name="slow"),
        lt.EMA(half_life="500 steps", warmup=100, device="cpu", dtype=torch.float64, evaluate=False),
        lt.BatchNormRefresh(),
        lt.BatchNormRefresh(20, on="validation", where=["body.*"], exclude="*.bn1", name="slow"),
    ]
)
lt.PolyakAveraging(start="50%", stop=1000, every="1 epoch")
lt.LatestWeightAveraging(6, every="500 steps", start="1 epoch", device="cpu", evaluate="both")
posthoc = lt.PostHocEMA((0.05, 0.1), every=10, snapshot_every="5%", dirpath=Path("averages"), evaluate="both", name="late")
synthesized: dict[str, torch.Tensor] = posthoc.synthesize(sigma_rel=0.08, step=1000)
folders: dict[int, Path] = posthoc.snapshots
synthesized = functional.synthesize_ema(folders[1000], sigma_rel=0.08)
width: float = functional.power_ema_sigma_rel(functional.power_ema_gamma(0.1))
kept: float = functional.power_ema_decay(10, 6.9, steps=2)
ema = lt.EMA(decay=0.9)
raw: dict[str, torch.Tensor] = ema.raw_state_dict()
average: Mapping[str, torch.Tensor] = ema.averaged_state_dict()
model = nn.Linear(2, 2)
with functional.using_weights(model, average):
    model(torch.zeros(2))
functional.ema_update_([torch.zeros(2)], list(model.parameters())[1:], decay=0.9)
uniform: dict[str, torch.Tensor] = functional.uniform_soup(["a.ckpt", Path("b.ckpt")])
soup: functional.Soup = functional.greedy_soup(Path("runs").glob("*.ckpt"), lambda state_dict: -state_dict["weight"].sum().item())
model.load_state_dict(soup.state_dict)
best: Path = soup.members[0]
share: float = functional.ema_decay(3, 0.9, warmup=10)
used: int = functional.refresh_batch_norm(nn.BatchNorm1d(2), [torch.randn(4, 2)], batches=1)

try:
    lt.EMA(half_life="soon")
except errors.TrickError as error:
    text: str = str(error)

lt.EMA(buffers="sync")  # type: ignore[arg-type]
lt.EMA(0.9, 5)  # type: ignore[call-arg]
lt.EMA(momentum=0.9)  # type: ignore[call-arg]
lt.BatchNormRefresh("some")  # type: ignore[arg-type]
lt.LatestWeightAveraging(5, "1 epoch")  # type: ignore[call-arg]
posthoc.synthesize(0.1, 1000)  # type: ignore[call-arg]
lt.PostHocEMA(sigma_rel=0.1)  # type: ignore[arg-type]
