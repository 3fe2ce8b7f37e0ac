"""Foretell how diabetes goes on within a year, with an interval for each patient, and see whether networks beat simpler means.

    python examples/tabular.py                             # 5 divisions of the data: a table and a picture in runs/tabular
    python examples/tabular.py --strategy ddp              # the same on two processes
    python examples/tabular.py --strategy model_parallel   # the same, each with half of every weight (FSDP2)

The 442 patients come with scikit-learn, ten numbers each in their own units: age, blood pressure, a code for the sex. A network foretells
mean and deviation of what is measured a year later. Inputs and targets are standardized inside of it, so that data and predictions
keep their units. An ensemble is five such networks from different first weights; its deviation is that of the mixture. Ridge
regression and gradient boosting are chosen by cross-validation on the same patients, and their deviation is that of their errors there.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import gaussian_nll_loss, softplus
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import lightning_tricks as lt
from lightning_tricks import optim, schedules
from processes import command_line, counted, make_trainer, one_thread, positive, report, shard, share, spread

Foretold = dict[str, Normal]  # for the patients of a test, by who foretells
COLORS = {"ridge regression": "#999999", "gradient boosting": "#E69F00", "one network": "#56B4E9", "ensemble of networks": "#0072B2"}


class Regressor(LightningModule):
    """Foretells a number and its deviation.

    Args:
        inputs: How many numbers describe a patient.
    """

    def __init__(self, inputs: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    @override
    def configure_model(self) -> None:
        shard(self, self.layers)

    @override
    def forward(self, patients: Tensor) -> tuple[Tensor, Tensor]:
        center, spread = self.layers(patients).chunk(2, dim=1)
        return center, softplus(spread) + 0.05

    @override
    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        patients, measured = batch
        center, deviation = self(patients)
        return gaussian_nll_loss(center, measured, deviation**2)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())  # `OptimizerFactory` takes its place

    @torch.no_grad()
    def foretell(self, patients: Tensor) -> Normal:
        """Foretell in the units of the targets."""
        center, deviation = self.eval()(patients)
        # `TargetStandardization` brings one output back to original units, the mean; the deviation has no offset to add.
        return Normal(center, deviation * self.get_buffer("target_standardization.std"))


def train(data: TensorDataset, options: argparse.Namespace, seed: int) -> Regressor:
    """Train one network."""
    seed_everything(seed, verbose=False)
    network = Regressor()
    callbacks = [
        lt.InputStandardization(),
        lt.TargetStandardization(output=0),
        lt.OptimizerFactory(optim.AdamW(lr=3e-3, weight_decay=0.1), schedule=schedules.Cosine(warmup="5%")),
        lt.Dropout(0.2, after="SiLU"),
        lt.EMA(half_life="5%"),
    ]
    loader = DataLoader(data, share(options, 32), shuffle=True, drop_last=True)
    make_trainer(options, callbacks, epochs=options.epochs).fit(network, loader)
    return network


def mixture(members: Sequence[Normal]) -> Normal:
    """Return the normal distribution with mean and deviation of a mixture."""
    centers = torch.stack([member.mean for member in members])
    variance = torch.stack([member.variance for member in members]).mean(0) + centers.var(0, correction=0)
    return Normal(centers.mean(0), variance.sqrt())


def simpler(data: TensorDataset, patients: Tensor, trees: int) -> Foretold:
    """Foretell by scikit-learn, with the deviation that errors have in cross-validation."""
    grid = {"learning_rate": [0.02, 0.05], "max_depth": [1, 2, 3]}
    boosting = GradientBoostingRegressor(n_estimators=trees, subsample=0.5, random_state=0)
    models = {
        "ridge regression": make_pipeline(StandardScaler(), RidgeCV([0.1, 1, 10, 100])),
        "gradient boosting": GridSearchCV(boosting, grid, cv=3, scoring="neg_mean_squared_error"),
    }
    x, y = data.tensors[0].numpy(), data.tensors[1].squeeze(1).numpy()
    found = {}
    for name, model in models.items():
        model.fit(x, y)
        best = getattr(model, "best_estimator_", model)
        errors = torch.tensor(y - cross_val_predict(best, x, y, cv=5))
        found[name] = Normal(torch.tensor(model.predict(patients.numpy())[:, None]), errors.square().mean().sqrt())
    return found


def coverage(foretold: Normal, measured: Tensor, share_inside: float) -> float:
    """Return how many of what was measured lie in the intervals that are to hold this share."""
    return ((foretold.cdf(measured) - 0.5).abs() <= share_inside / 2).double().mean().item()


def measure(foretold: Normal, measured: Tensor) -> dict[str, float]:
    """Return error, negative log-likelihood, and how many of what was measured lie in the intervals that are to hold 90 %."""
    return {
        "RMSE": (foretold.mean - measured).square().mean().sqrt().item(),
        "NLL": -foretold.log_prob(measured).mean().item(),
        "90 % interval holds": coverage(foretold, measured, 0.9),
        "its width": 2 * 1.645 * foretold.stddev.mean().item(),
    }


def compare(options: argparse.Namespace) -> list[tuple[Foretold, Tensor, list[Normal]]]:
    """Foretell a fifth of the patients by the others, in several divisions."""
    diabetes = load_diabetes(scaled=False)
    patients = torch.tensor(diabetes.data, dtype=torch.float32)
    measured = torch.tensor(diabetes.target, dtype=torch.float32).unsqueeze(1)
    divisions = []
    for division in range(options.first, options.first + options.divisions):
        order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(division))
        test, rest = order[:88], order[88:]
        data = TensorDataset(patients[rest], measured[rest])
        networks = [train(data, options, 100 * division + member) for member in range(options.members)]
        members = [network.foretell(patients[test]) for network in networks]
        found = {**simpler(data, patients[test], options.trees), "one network": members[0], "ensemble of networks": mixture(members)}
        divisions.append((found, measured[test], members))
    return divisions


@rank_zero_only
def plot(divisions: Sequence[tuple[Foretold, Tensor, list[Normal]]], path: Path) -> None:
    """Draw the ensemble's intervals for the patients of one test, and over all tests how much intervals hold."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    found, measured, _ = divisions[0]
    ensemble, order = found["ensemble of networks"], found["ensemble of networks"].mean.squeeze(1).argsort()
    center, half = ensemble.mean[order, 0], 1.645 * ensemble.stddev[order, 0]
    inside = (measured[order, 0] - center).abs() <= half
    ranks = torch.arange(len(order))
    left.vlines(ranks, center - half, center + half, color="#BBD6EA", linewidth=3)
    left.plot(ranks, center, color=COLORS["ensemble of networks"], linewidth=2, label="foretold")
    left.plot(ranks[inside], measured[order, 0][inside], ".", color="#333333", label="measured")
    left.plot(ranks[~inside], measured[order, 0][~inside], ".", color="#D55E00", markersize=9, label="measured, outside")
    left.set_title("A test: 90 % intervals of the ensemble", loc="left", fontweight="bold")
    left.set_xlabel("patients, by what is foretold")
    left.set_ylabel("diabetes after a year")
    left.legend(loc="upper left", frameon=False)
    shares = torch.linspace(0.05, 0.95, 19).tolist()
    right.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=0)
    for name, color in COLORS.items():
        held = [mean(coverage(division[0][name], division[1], share) for division in divisions) for share in shares]
        right.plot(shares, held, color=color, linewidth=1.8, label=name)
    right.set_title("All tests: what intervals hold", loc="left", fontweight="bold")
    right.set_xlabel("what they are to hold")
    right.set_ylabel("patients inside")
    right.set(aspect="equal", xlim=(0, 1), ylim=(0, 1))
    right.legend(loc="lower right", frameon=False, labelcolor="linecolor")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return mean and standard deviation over divisions."""
    return {key: spread([run[key] for run in runs], ".3g", ".2g") for key in runs[0]}


def main() -> None:
    """Train, measure and draw."""
    parser = command_line(__doc__, "runs/tabular")
    parser.add_argument("--divisions", type=positive, default=5, help="into training and test (default: %(default)s)")
    parser.add_argument("--members", type=positive, default=5, help="networks in an ensemble (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=40, help="epochs of each network, 11 steps each (default: %(default)s)")
    parser.add_argument("--trees", type=positive, default=150, help="trees of gradient boosting (default: %(default)s)")
    parser.add_argument("--first", type=int, default=100, help="seed of the first division (default: %(default)s)")
    options = parser.parse_args()
    one_thread()
    divisions = compare(options)
    rows = [{"foretold by": name, **summary([measure(found[name], measured) for found, measured, _ in divisions])} for name in COLORS]
    plot(divisions, options.output / "tabular.png")
    report(f"{counted(options.divisions, 'division')}, mean ± standard deviation", rows, options.output / "tabular.csv")


if __name__ == "__main__":
    main()
