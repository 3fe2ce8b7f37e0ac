"""What a user writes, checked by mypy and never run."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from torch import nn

import lightning_tricks as lt
from lightning_tricks import errors, functional, optim, schedules

trainer = L.Trainer(
    callbacks=[
        lt.EMA(),
        lt.EMA(0.99, start="1 epoch", every=10, buffers="average", where=["body.*"], exclude="*.bias", evaluate="both", name="slow"),
        lt.EMA(half_life="500 steps", warmup=100, device="cpu", dtype=torch.float64, evaluate=False),
        lt.BatchNormRefresh(),
        lt.OptimizerFactory(optim.SGD(lr=0.1, momentum=0.9), schedule=schedules.Cosine(warmup="5%"), name="slow"),
        lt.BatchNormRefresh(20, on="validation", where=["body.*"], exclude="*.bn1", name="slow"),
        lt.WeightDecay(0.01),
        lt.StochasticDepth(0.1),
        lt.StochasticDepth(0.1, scaling="evaluation"),
        lt.StochasticDepth(
            schedules.Linear(0.1, final=0.2), where=["layer*.?"], exclude="head", mode="batch", growth="uniform", name="slow"
        ),
        lt.WeightDecay({"*": 0.01, "head": schedules.Linear(0.0, final=0.1)}, mode="l2", skip=["bias", "norm", "embedding"], name="slow"),
        lt.WeightDecay(schedules.Cosine(0.04), where=["body.*"], exclude="*.bias", skip="norm", existing="replace", log_penalty=True),
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
functional.decay_weights_(model.parameters(), 0.01, mode="l2")
share: float = functional.ema_decay(3, 0.9, warmup=10)
used: int = functional.refresh_batch_norm(nn.BatchNorm1d(2), [torch.randn(4, 2)], batches=1)
every_schedule: list[schedules.Schedule] = [
    schedules.Constant(0.5, warmup=100),
    schedules.Linear(0.0, final=0.5, stop="50%"),
    schedules.Polynomial(power=2),
    schedules.CosineRestarts(every="20%", growth=2),
    schedules.Exponential(factor=0.97, every="1 epoch"),
    schedules.Step(at=["50%", 1000], warmup="5 epochs"),
    schedules.OneCycle(1.0, rise="30%"),
    schedules.ReduceOnPlateau("val_acc", mode="max", patience=3),
]
rates: list[float] = [schedule.value(3, steps=100, steps_per_epoch=10) for schedule in every_schedule]
attached: L.LightningModule = optim.AdamW(lr=1e-3).attach(L.LightningModule(), schedule=schedules.Linear())
lt.OptimizerFactory(optim.SGD())

recipe: optim.OptimizerRecipe = optim.SGD(
    0.1, momentum=0.9, nesterov=True, overrides={"head.*": {"lr": 1e-2}, "*.embed*": {"weight_decay": 0}}
)
optimizer: torch.optim.Optimizer = recipe.build(model)
groups: list[optim.ParameterGroup] = optim.AdamW(betas=(0.9, 0.95), layer_decay=0.75, layers=["0", "*"], decayed=("matrix", "bias")).groups(
    model
)
names: tuple[str, ...] = groups[0].names
optim.Named("timm:lamb", lr=1e-3, options={"betas": (0.9, 0.99)}, implementation="foreach")
optim.Muon(0.02, exclude="aux", adjust_lr_fn="match_rms_adamw")
optim.LBFGS(max_iter=10, line_search_fn="strong_wolfe")
wrapped: optim.OptimizerRecipe = optim.ClipNorm(optim.SAM(optim.Lookahead(recipe, k=6, alpha=0.8), rho=0.1, adaptive=True), max_norm=1.0)
optim.ClipValue(recipe, max_value=0.5)
optim.AdaptiveGradientClipping(recipe, max_ratio=0.02, eps=1e-3, exclude=["head"])
optim.GradientCentralization(recipe, where="body.*")
lt.OptimizerFactory(optim.ScheduleFree(optim.AdamW(3e-3), momentum=0.95, r=1.0, weight_lr_power=0.0))
table: str = optim.describe_groups(model, recipe)
sources: dict[str, str] = optim.list_recipes()

try:
    lt.EMA(half_life="soon")
except errors.TrickError as error:
    text: str = str(error)

lt.EMA(buffers="sync")  # type: ignore[arg-type]
lt.EMA(0.9, 5)  # type: ignore[call-arg]
lt.EMA(momentum=0.9)  # type: ignore[call-arg]
lt.OptimizerFactory("adamw")  # type: ignore[arg-type]
lt.OptimizerFactory(optim.SGD(), schedule=0.5)  # type: ignore[arg-type]
lt.OptimizerFactory(optim.SGD(), schedules.Cosine())  # type: ignore[call-arg]
schedules.Cosine(1.0, 0.0)  # type: ignore[call-arg, arg-type]
schedules.ReduceOnPlateau("val_acc", mode="larger")  # type: ignore[arg-type]
lt.BatchNormRefresh("some")  # type: ignore[arg-type]
lt.LatestWeightAveraging(5, "1 epoch")  # type: ignore[call-arg]
posthoc.synthesize(0.1, 1000)  # type: ignore[call-arg]
lt.PostHocEMA(sigma_rel=0.1)  # type: ignore[arg-type]
lt.StochasticDepth(0.1, mode="row")  # type: ignore[arg-type]
lt.StochasticDepth(0.1, scaling="test")  # type: ignore[arg-type]
lt.WeightDecay(0.1, mode="l3")  # type: ignore[arg-type]
lt.WeightDecay(0.1, skip="biases")  # type: ignore[arg-type]
lt.WeightDecay(0.1, "l2")  # type: ignore[call-arg]
optim.SGD(implementation="loop")  # type: ignore[arg-type]
optim.AdamW(0.1, (0.9, 0.99))  # type: ignore[call-arg, arg-type]
optim.AdamW(decayed=["weights"])  # type: ignore[list-item]
optim.SAM("sgd")  # type: ignore[arg-type]
optim.Lookahead(recipe, 5)  # type: ignore[call-arg]
recipe.lr = 0.1  # type: ignore[attr-defined]
