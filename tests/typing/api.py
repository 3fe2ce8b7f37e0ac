"""What a user writes, checked by mypy and never run."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from torch import nn

import lightning_tricks as lt
from lightning_tricks import errors, functional, metrics, optim, schedules, transforms
from lightning_tricks import nn as tricks_nn

trainer = L.Trainer(
    callbacks=[
        lt.EMA(),
        lt.EMA(0.99, start="1 epoch", every=10, buffers="average", where=["body.*"], exclude="*.bias", evaluate="both", name="slow"),
        lt.EMA(half_life="500 steps", warmup=100, device="cpu", dtype=torch.float64, evaluate=False),
        lt.BatchNormRefresh(),
        lt.OptimizerFactory(optim.SGD(lr=0.1, momentum=0.9), schedule=schedules.Cosine(warmup="5%"), name="slow"),
        lt.BatchNormRefresh(20, on="validation", where=["body.*"], exclude="*.bn1", name="slow"),
        lt.WeightDecay(0.01),
        lt.NormSwap("batch", "group", where=["body.*"], exclude="stem", groups="16 channels", calibrate=4, name="slow"),
        lt.NormSwap("layer", "ghost", ghost_size=16),
        lt.StochasticDepth(0.1),
        lt.ActivationSwap("relu", "gelu"),
        lt.ActivationSwap(["relu", nn.Tanh], nn.LeakyReLU(0.2), where=["body.*"], exclude="head", name="slow"),
        lt.Initialization("kaiming_normal"),
        lt.Initialization(
            "lsuv",
            where="head",
            exclude=["*.bias"],
            gain=1.0,
            mode="fan_out",
            std=0.01,
            bias="keep",
            residual="zero",
            seed=3,
            batches=2,
            tolerance=0.1,
            pretrained="overwrite",
            name="slow",
        ),
        lt.StochasticDepth(0.1, scaling="evaluation"),
        lt.StochasticDepth(
            schedules.Linear(0.1, final=0.2), where=["layer*.?"], exclude="head", mode="batch", growth="uniform", name="slow"
        ),
        lt.DropConnect(0.5),
        lt.DropConnect(schedules.Linear(0.1, final=0.2), where=["body.*"], exclude="head", kinds=["Linear", nn.LSTM], name="slow"),
        lt.DropConnect(0.5, kinds=nn.Linear, granularity="example", inference="gaussian", draws=10, mask_bias=True),
        lt.WeightDecay({"*": 0.01, "head": schedules.Linear(0.0, final=0.1)}, mode="l2", skip=["bias", "norm", "embedding"], name="slow"),
        lt.SnapshotEnsemble(),
        lt.SnapshotEnsemble(
            4,
            cycles=6,
            restart_lr=0.2,
            combine="vote",
            output="probabilities",
            class_dim=1,
            target="net",
            weights="average",
            refresh_batch_norm="all",
            evaluate="members",
            measure=False,
            item="label",
            memory="disk",
            dirpath="members",
            name="slow",
        ),
        lt.WeightDecay(schedules.Cosine(0.04), where=["body.*"], exclude="*.bias", skip="norm", existing="replace", log_penalty=True),
    ]
)
lt.FastGeometricEnsemble(6, start="80%", cycle="2 epochs", lr=(0.05, 0.01), target="net", weights="average", refresh_batch_norm="all")
lt.FastGeometricEnsemble(schedule=None, combine="vote", class_dim=1, evaluate="members", measure=False, item="labels", memory="disk")
lt.CheckpointEnsemble(3, monitor="val_acc", mode="max", every="500 steps", output="probabilities", dirpath="members", name="best")
latest: nn.Module = lt.CheckpointEnsemble().to_ensemble()[0]
lt.BatchAugmentation(transforms.Flip("vertical", probability=0.3))
lt.BatchAugmentation(
    [
        transforms.Crop(4, size=(28, 32), border="mirror", probability=0.9),
        transforms.ResizedCrop((0.2, 1), ratio=[0.5, 2], size=224),
        transforms.Rotation(15, border="edge"),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        transforms.Noise(0.1),
        transforms.Cutout(8, fill=0.5),
        transforms.Erasing((0.1, 0.2), ratio=(0.5, 2), fill=1),
        nn.Identity(),
        lambda images: images.flip(-1),
    ],
    item="image",
    name="slow",
)
augmented: torch.Tensor = functional.augment(torch.rand(2, 3, 8, 8), [transforms.Flip(), torch.sigmoid], seed=3)
flow = lt.GradientFlow()
lt.GradientFlow(
    every="1 epoch",
    where=["body.*"],
    exclude="head",
    activations=False,
    report="layers",
    heat_map="update_ratio",
    vanishing=0.0,
    name="slow",
)
lt.GradientFlow(every=10, exploding=10.0, dead=0.9, saturated=0.9, heat_map=False)
recorded: tuple[list[str], list[int], torch.Tensor] = flow.layers, flow.steps, flow.table("grad_norm")
guard = lt.LossSpikeGuard()
lt.LossSpikeGuard(8, window=50, watch="loss", patience=5)
lt.LossSpikeGuard(threshold=8.0, watch=["loss", "grad_norm"], name="slow")
left_out: int = guard.skipped
diagnosis: functional.FitVerdict = lt.FitDiagnosis(train="train_loss", val="val/loss", goal=0.1, patience=2, tolerance=0.02).diagnosis
gaps: list[float] = lt.FitDiagnosis(batches=20, name="slow").curves["gap"]
functional.diagnose_fit([1.0, 0.5], (1.0, 0.7), goal=None, patience=1, tolerance=0.0).kind == "fitted"  # noqa: B015
landscape: functional.LossLandscape = functional.loss_landscape(nn.Linear(1, 1), [], dimensions=2, span=0.5, points=11, batches=3, seed=1)
lt.diagnostics.loss_landscape(nn.Linear(1, 1), [], loss=lambda model, batch: model(batch).sum(), directions=landscape.directions)
picture: Path = landscape.plot("landscape.png", label="before", others={"after": landscape})
lt.FeatureNoise(0.1, where="body")
lt.FeatureNoise(schedules.Linear(0.3, final=0.0), where=["body.*"], exclude="head", kind="additive", relative=True, at="input", name="slow")
lt.MixUp(0.4, per="sample", probability=0.5, start="5 epochs", stop="90%", item="image", target=["label", 2], name="slow")
lt.CutMix(per="batch", probability=0.5, start=10, stop=None, item=0, target=1, name="slow")
lt.LabelSmoothing(0.1, target="label", name="slow")
lt.DropBlock(schedules.Linear(0.0, final=0.1), block_size=5, where="layer4", exclude=["*.bn1"], per="sample", name="slow")
lt.FractionalMaxPool()
lt.FractionalMaxPool(1.4, where=["features"], exclude="head", mode="pseudorandom", overlapping=False, samples=4, name="slow")
pools: nn.Module = nn.Sequential(lt.nn.FractionalMaxPool2d(1.4, mode="pseudorandom"), lt.nn.FractionalMaxPool3d(1.4, overlapping=False))
pooled: tuple[str, ...] = functional.apply_fractional_max_pool(pools, samples=2, example=torch.zeros(1)).names
disturbed: tuple[str, ...] = functional.apply_feature_noise(pools, 0.1, where="0", kind="multiplicative", seed=3).names
unchanged: Mapping[str, str] = functional.apply_drop_block(pools, 0.1, block_size=3, where="0").left
functional.remove_feature_noise(pools)
functional.remove_drop_block(pools)
functional.remove_fractional_max_pool(pools)
lt.BatchNormFreeze("80%", affine=True, where=["layer*"], exclude="head", name="late")
lt.InputStandardization(per="feature", batches=10, whitening="zca", eps=1e-2, item="x", argument="pixels", module="net", name="images")
lt.TargetStandardization(item="price", output=0, center=False, dim=-1)
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
lt.Dropout(
    schedules.Linear(0.0, final=0.5), where="encoder", after=["*.act", "GELU"], exclude="head", kind="variational", samples=10, name="a"
)
set_rates: Mapping[str, float] = functional.apply_dropout(model, 0.1, after="Linear", kind="alpha", seed=1).before
functional.remove_dropout(model)
classes: functional.MCClassification = functional.mc_dropout(model, torch.zeros(2), samples=5, dim=1)
information: torch.Tensor = classes.mutual_information
numbers: functional.MCRegression = functional.mc_dropout(model, torch.zeros(2), task="regression", seed=3)
masked: tuple[str, ...] = functional.apply_drop_connect(model, 0.5, kinds=nn.Linear, inference="sample", seed=3).layers[""]
functional.remove_drop_connect(model)
ensemble: nn.Module = tricks_nn.Ensemble([nn.Linear(2, 2)], combine="vote", class_dim=1, mode="loop")[:1]
disagreement: torch.Tensor = (
    tricks_nn.Ensemble.from_checkpoints(["a.ckpt"], lambda: nn.Linear(2, 2)).uncertainty(torch.zeros(1, 2)).epistemic
)
measures = metrics.EnsembleMeasures(combine="vote", output="probabilities", class_dim=1, bins=10, ignore_index=255)
measures.update(torch.zeros(3, 8, 4), torch.zeros(8, dtype=torch.long))
measures_by_name: dict[str, torch.Tensor] = measures.compute()
brier: torch.Tensor = functional.brier_score(torch.zeros(8, 4), torch.zeros(8), output="probabilities")
apart: torch.Tensor = functional.disagreement(torch.zeros(3, 8, 4)) + functional.diversity(torch.zeros(3, 8, 4), class_dim=-1)
trained: functional.TrainedEnsemble = functional.train_ensemble(
    L.LightningModule, L.LightningDataModule(), 3, bootstrap=True, trainer=lambda member: L.Trainer(max_epochs=member), seed=3
)
bags: torch.Tensor | None = None if trained.out_of_bag is None else trained.out_of_bag.predictions
member_metrics: dict[str, float] = functional.train_ensemble(
    lambda member: L.LightningModule(), [torch.zeros(2)], trainer={"max_epochs": 2}, folder=Path("members"), mode="packed"
).metrics[0]
linear: nn.Linear = tricks_nn.DropConnectLinear(4, 2, rate=0.5, granularity="example", inference="gaussian", activation=nn.ReLU())
lstm: nn.LSTM = tricks_nn.DropConnectLSTM(4, 2, batch_first=True, rate=0.5)
share: float = functional.ema_decay(3, 0.9, warmup=10)
used: int = functional.refresh_batch_norm(nn.BatchNorm1d(2), [torch.randn(4, 2)], batches=1)
layers: list[nn.Module] = [
    tricks_nn.GhostBatchNorm1d(8, 16),
    tricks_nn.GhostBatchNorm2d(8, ghost_size=16, eps=1e-3, momentum=None, affine=False, track_running_stats=False),
    tricks_nn.LayerNorm2d(8, eps=1e-5, affine=False, device="cpu", dtype=torch.float64),
    tricks_nn.RMSNorm2d(8),
    tricks_nn.FilterResponseNorm(8, learnable_eps=True),
    tricks_nn.LpBatchNorm3d(8, p=1.5),
    tricks_nn.ScaledWSConv2d(8, 16, 3, padding="same", gamma="relu"),
]
plain_norm: nn.BatchNorm2d = tricks_nn.GhostBatchNorm2d(8, 16)
normalized: torch.Tensor = tricks_nn.ScaledWSConv2d(8, 16, (3, 1), gamma=1.5).effective_weight()
changed: tuple[str, ...] = functional.apply_weight_standardization(model, where=["body.*"], exclude="*.head", eps=1e-6).changed
left: Mapping[str, str] = functional.apply_weight_normalization(model, 2.0, where="0").left
functional.remove_weight_standardization(model, keep="function")
functional.remove_weight_normalization(model)
left = functional.insert_norm(model, "group", position="after", where="*.act", groups=8, inputs=torch.zeros(1, 2)).inserted
notices: Mapping[str, str] = functional.swap_norm(model, "batch", "frozen", calibrate=[torch.zeros(2, 2)], forward=model).notices
loaded: L.LightningModule = lt.load_from_checkpoint(L.LightningModule, Path("run.ckpt"), map_location="cpu")
folding: functional.FoldReport = functional.fold_batch_norm(model, where="body", inplace=False)
reasons: Mapping[str, str] = folding.left
measured: functional.StandardizationStatistics = functional.standardization_statistics([torch.randn(4, 2)], covariance=True)
whitening: torch.Tensor = functional.whitening_matrix(torch.eye(2), mode="pca", eps=0.1)
functional.standardize_inputs(model, measured, whitening="zca", argument="input")
functional.standardize_targets(model, {"mean": torch.zeros(2), "variance": torch.ones(2), "count": 5}, output=None)
functional.remove_standardization(model)
swapped: Mapping[str, str] = functional.swap_activation(model, "relu", nn.GELU, where="body").swapped
alpha: Mapping[str, float] = functional.make_self_normalizing(model, source=["relu"], seed=0).dropouts
between: torch.Tensor = functional.mix_up(torch.ones(2, 3), torch.tensor([0.2, 0.8]), torch.tensor([1, 0]))
soft: torch.Tensor = functional.mix_labels(torch.tensor([0, 2]), 0.7, torch.tensor([1, 0]), classes=3, smoothing=0.1)
pasted: torch.Tensor = functional.cut_mix(torch.ones(2, 8, 8), functional.cut_mix_box(8, 8, 0.5, (3, 4))[0], torch.tensor([1, 0]))
smooth: torch.Tensor = functional.smooth_labels(torch.tensor([0, 2]), classes=3, smoothing=0.1)
drawn = functional.initialize(model, "lsuv", batches=[torch.zeros(2, 2)], forward=model, tolerance=0.1)
spread: float | None = drawn.layers["0"].after
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
optim.GradientNoise(recipe, eta=0.3, gamma=0.55, seed=3)
lt.OptimizerFactory(optim.ScheduleFree(optim.AdamW(3e-3), momentum=0.95, r=1.0, weight_lr_power=0.0))
table: str = optim.describe_groups(model, recipe)
sources: dict[str, str] = optim.list_recipes()


class Digits(L.LightningModule):
    pass


study: lt.search.Ablation = lt.search.ablate(Digits, None, {"EMA": lt.EMA(), "decay": [lt.WeightDecay(0.1)]})
lt.search.ablate(
    Digits,
    L.LightningDataModule,
    {"EMA": [lt.EMA()]},
    [3, 5],
    trainer=lambda: L.Trainer(max_epochs=1),
    metric="val_acc",
    mode="max",
    designs=["add"],
    folder=Path("runs"),
    test=True,
    wandb="project",
    progress=False,
)
means: list[float] = [row.mean for row in study.rows if row.verdict == "helps"]
stopped: dict[str, str] = study.failures

try:
    lt.EMA(half_life="soon")
except errors.TrickError as error:
    text: str = str(error)

lt.search.ablate(Digits, None, {}, mode="less")  # type: ignore[arg-type]
lt.search.ablate(Digits, None, {}, 5, {})  # type: ignore[call-arg]
lt.EMA(buffers="sync")  # type: ignore[arg-type]
lt.EMA(0.9, 5)  # type: ignore[call-arg]
lt.EMA(momentum=0.9)  # type: ignore[call-arg]
lt.OptimizerFactory("adamw")  # type: ignore[arg-type]
lt.OptimizerFactory(optim.SGD(), schedule=0.5)  # type: ignore[arg-type]
lt.OptimizerFactory(optim.SGD(), schedules.Cosine())  # type: ignore[call-arg]
schedules.Cosine(1.0, 0.0)  # type: ignore[call-arg, arg-type]
schedules.ReduceOnPlateau("val_acc", mode="larger")  # type: ignore[arg-type]
lt.BatchNormFreeze()  # type: ignore[call-arg]
lt.InputStandardization("feature")  # type: ignore[call-arg]
lt.InputStandardization(whitening="cholesky")  # type: ignore[arg-type]
lt.TargetStandardization(item=None)  # type: ignore[arg-type]
lt.BatchNormRefresh("some")  # type: ignore[arg-type]
lt.LatestWeightAveraging(5, "1 epoch")  # type: ignore[call-arg]
posthoc.synthesize(0.1, 1000)  # type: ignore[call-arg]
lt.PostHocEMA(sigma_rel=0.1)  # type: ignore[arg-type]
lt.StochasticDepth(0.1, mode="row")  # type: ignore[arg-type]
lt.NormSwap("batch", "grp")  # type: ignore[arg-type]
lt.NormSwap("batch", "group", 16)  # type: ignore[call-arg, arg-type]
lt.BatchAugmentation("flip")  # type: ignore[arg-type]
lt.BatchAugmentation(transforms.Flip(), 0)  # type: ignore[call-arg]
transforms.Flip("left")  # type: ignore[arg-type]
transforms.Flip("vertical", 0.5)  # type: ignore[call-arg]
transforms.ColorJitter(0.4)  # type: ignore[call-arg]
lt.FeatureNoise(0.1)  # type: ignore[call-arg]
lt.FeatureNoise(0.1, where="body", kind="uniform")  # type: ignore[arg-type]
lt.DropBlock(0.1, 7, where="body")  # type: ignore[call-arg]
lt.FractionalMaxPool(schedules.Linear())  # type: ignore[arg-type]
metrics.EnsembleMeasures(combine="median")  # type: ignore[arg-type]
metrics.EnsembleMeasures("vote")  # type: ignore[call-arg]
lt.Dropout(0.1, kind="spatial")  # type: ignore[arg-type]
lt.Dropout(0.1, "GELU")  # type: ignore[call-arg]
functional.mc_dropout(model, torch.zeros(2), task="regression").entropy  # type: ignore[attr-defined]  # noqa: B018
lt.ActivationSwap("relu", 3)  # type: ignore[arg-type]
lt.ActivationSwap("relu", "gelu", "body")  # type: ignore[call-arg]
lt.Initialization("he")  # type: ignore[arg-type]
lt.Initialization("lsuv", residual="one")  # type: ignore[arg-type]
lt.DropConnect(0.1, granularity="row")  # type: ignore[arg-type]
lt.StochasticDepth(0.1, scaling="test")  # type: ignore[arg-type]
lt.LossSpikeGuard(watch="norm")  # type: ignore[arg-type]
lt.LossSpikeGuard(8.0, 50)  # type: ignore[call-arg]
lt.WeightDecay(0.1, mode="l3")  # type: ignore[arg-type]
lt.WeightDecay(0.1, skip="biases")  # type: ignore[arg-type]
lt.WeightDecay(0.1, "l2")  # type: ignore[call-arg]
optim.SGD(implementation="loop")  # type: ignore[arg-type]
optim.AdamW(0.1, (0.9, 0.99))  # type: ignore[call-arg, arg-type]
optim.AdamW(decayed=["weights"])  # type: ignore[list-item]
optim.SAM("sgd")  # type: ignore[arg-type]
optim.Lookahead(recipe, 5)  # type: ignore[call-arg]
recipe.lr = 0.1  # type: ignore[attr-defined]
functional.train_ensemble(L.LightningModule, [], 3, True, trainer={})  # type: ignore[call-arg]
functional.train_ensemble(L.LightningModule, [], mode="vmap", trainer={})  # type: ignore[arg-type]
tricks_nn.GhostBatchNorm2d(8, 16, 1e-3)  # type: ignore[call-arg]
functional.insert_norm(model, "spectral")  # type: ignore[arg-type]
functional.remove_weight_normalization(model, keep="both")  # type: ignore[arg-type]
snapshots: nn.Module = lt.SnapshotEnsemble(schedule=None, combine="mean").to_ensemble()
variance: torch.Tensor = lt.SnapshotEnsemble(refresh_batch_norm=20).uncertainty().total
lt.SnapshotEnsemble(schedule="linear")  # type: ignore[arg-type]
lt.SnapshotEnsemble(5, 6)  # type: ignore[call-arg]

lt.FineTuning({"0%": "head", "20%": ["layer4", "layer3"], "50%": 2, "80%": "100%"})
lt.FineTuning({"0%": 0}, layer_decay=0.7, lr_factors={"body": 0.1}, statistics="train", num_classes=10, head="fc", name="slow")
probe = lt.LinearProbe(["layer3", "layer4"], on="end", method="ridge", l2=0.1, channel_dim=-1, target="label", name="slow")
report: functional.ProbeReport = functional.linear_probe(nn.Linear(2, 2), [], [], stages="*", forward=lambda batch: batch)
best_stage: str = report.best
new_head: functional.Head = functional.replace_head(nn.Linear(2, 2), 3, where="fc")
plan: lt.FineTuning = functional.transfer_plan(100, "different", much=500, num_classes=3, head="fc")
table = lt.search.search("search.yaml", folder=Path("runs/search"), storage="redis://host", launcher="ray", workers=2, progress=False)
table = lt.search.load(Path("runs/search"), storage="journal.log")
round_numbers: list[float] = lt.search.log_grid(0.001, 0.01, 3)

lt.TrackingReport(goals={"val_acc": "max", "val_loss": "min"}, figures=False, artifacts="best", name="slow")
lt.TrackingReport(goals={"val_acc": "most"})  # type: ignore[dict-item]
lt.TrackingReport(artifacts=True)  # type: ignore[arg-type]
