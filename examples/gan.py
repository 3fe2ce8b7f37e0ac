"""Train a generative adversarial network (GAN) on handwritten digits, and compare the generator with the average of its weights.

    python examples/gan.py                             # 5 seeds: a table and a picture in runs/gan
    python examples/gan.py --seeds 1                   # one of them
    python examples/gan.py --strategy ddp              # the same on two processes
    python examples/gan.py --strategy model_parallel   # the same, each with half of every weight (FSDP2)

Two networks with an optimizer each play against each other, in manual optimization. Neither settles, so that the generator's weights
circle about what they look for; their average lies in the middle. What is drawn is judged by a classifier of real digits: by the Fréchet
distance between its features of drawn and of unseen digits, by how sure it is, and by whether all ten digits come up.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.nn.functional import pad, softplus
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

import lightning_tricks as lt
from processes import command_line, counted, make_trainer, one_thread, positive, report, shard, share, spread

NOISE = 32  # numbers that a digit is drawn from
MEASURES = ("Fréchet distance", "sureness", "digits that come up")


class Judge:
    """A classifier of real digits, and what it says of others.

    Args:
        images: Digits to learn from.
        labels: Which they are.
        unseen: Digits to compare others with.
    """

    def __init__(self, images: Tensor, labels: Tensor, unseen: Tensor) -> None:
        self.classifier = MLPClassifier((64,), alpha=0.1, learning_rate_init=3e-3, tol=1e-3, random_state=0).fit(images, labels)
        self.center, self.covariance = self.statistics(unseen)

    def features(self, images: Tensor) -> Tensor:
        """Return what the hidden layer makes of images."""
        weight, bias = torch.tensor(self.classifier.coefs_[0]), torch.tensor(self.classifier.intercepts_[0])
        return (images.double() @ weight + bias).relu()

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of their features."""
        features = self.features(images)
        return features.mean(0), features.T.cov()

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Measure how far drawn digits are from unseen ones, how sure of them the classifier is, and how many kinds there seem to be."""
        center, covariance = self.statistics(images)
        cross = torch.linalg.eigvals(covariance @ self.covariance).real.clamp(min=0).sqrt().sum()  # the trace of the product's root
        distance = (center - self.center).square().sum() + covariance.trace() + self.covariance.trace() - 2 * cross
        likely = torch.tensor(self.classifier.predict_proba(images))
        shares = likely.mean(0)
        values = (distance, likely.max(1).values.mean(), torch.special.entr(shares).sum().exp())
        return dict(zip(MEASURES, map(float, values), strict=True))


class GAN(LightningModule):
    """A generator of digits, and a discriminator that tells them from real ones.

    Args:
        judge: Says in validation what the generator's digits are worth.
        lr: Learning rate of both.
    """

    def __init__(self, judge: Judge, lr: float = 1e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge, self.lr = judge, lr
        self.generator = nn.Sequential(*hidden(NOISE, 128), *hidden(128, 128), nn.Linear(128, 64), nn.Sigmoid())
        # With dropout it cannot learn the real digits by heart, of which there are few.
        self.discriminator = nn.Sequential(
            nn.Dropout(0.3), *hidden(64, 128), nn.Dropout(0.3), *hidden(128, 128), nn.Dropout(0.3), nn.Linear(128, 1)
        )

    @override
    def configure_model(self) -> None:
        shard(self, self.generator, self.discriminator)

    @override
    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    @override
    def training_step(self, batch: Sequence[Tensor]) -> None:
        real, noise = batch[0], self.noise(len(batch[0]), seed=self.global_step * self.trainer.world_size + self.global_rank)
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        first, second = optimizers
        drawn = self.generator(noise)
        scores, fakes = self.discriminator(torch.cat([real, drawn.detach()])).chunk(2)
        second.zero_grad()
        self.manual_backward((softplus(-scores) + softplus(fakes)).mean())
        second.step()
        first.zero_grad()
        self.manual_backward(softplus(-self.discriminator(drawn)).mean())
        first.step()

    @override
    def validation_step(self, batch: Sequence[Tensor]) -> None:
        drawn = self(self.noise(2000, seed=-1)).detach()
        self.log_dict(self.judge(drawn), sync_dist=True)

    def noise(self, count: int, seed: int) -> Tensor:
        """Return random numbers to draw digits from, others for each seed."""
        return torch.randn(count, NOISE, generator=torch.Generator().manual_seed(seed % 2**63))

    @override
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=self.lr, betas=(0.5, 0.99)) for part in (self.generator, self.discriminator)]


def hidden(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Return a hidden layer."""
    return nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)


class History(Callback):
    """Remembers what every validation found."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.metrics: list[dict[str, float]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.global_step // 2)  # steps of either optimizer
        self.metrics.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def train(judge: Judge, digits: Tensor, options: argparse.Namespace, seed: int) -> tuple[History, dict[str, Tensor]]:
    """Train once; return the course of it, and digits drawn from the same noise by raw and averaged weights."""
    seed_everything(seed, verbose=False)
    gan, history, ema = GAN(judge), History(), lt.EMA(half_life="200 steps", where="generator.*", evaluate="both")
    loader = DataLoader(TensorDataset(digits), share(options, 64), shuffle=True, drop_last=True)
    # Validation draws digits, and needs none; a loader there must be.
    trainer = make_trainer(options, [ema, history], epochs=options.epochs, validate_every=max(1, options.epochs // 12), losses=2)
    trainer.fit(gan, loader, DataLoader(TensorDataset(torch.zeros(2, 1)), batch_size=2))
    noise = gan.noise(30, seed=0)
    with torch.no_grad():
        averaged = gan(noise)  # the fit leaves the average in the module
        gan.load_state_dict(ema.raw_state_dict())
        raw = gan(noise)
    return history, {"drawn by raw weights": raw, "drawn by averaged weights": averaged}


@rank_zero_only
def plot(runs: Sequence[tuple[History, dict[str, Tensor]]], real: Tensor, floor: float, path: Path) -> None:
    """Draw the distance over the steps for every seed, and digits: real ones, and what the first seed's generator draws."""
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    axes, *panels = figure.subplots(1, 4, width_ratios=[2.4, 1, 1, 1])
    for history, _ in runs:
        for prefix, label, color, width in (("raw/", "raw weights", "#D55E00", 1.2), ("", "averaged weights", "#0072B2", 2)):
            values = [metrics[f"{prefix}{MEASURES[0]}"] for metrics in history.metrics]
            axes.plot(history.steps, values, color=color, linewidth=width, label=label if history is runs[0][0] else None)
    axes.axhline(floor, color="#999999", linestyle=":", label="other real digits")
    axes.set_title("Distance of drawn digits from unseen ones", loc="left", fontweight="bold")
    axes.set_xlabel("steps of either optimizer")
    axes.set_ylabel("Fréchet distance")
    axes.set_yscale("log")
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor="linecolor")
    for panel, (title, images) in zip(panels, {"real": real, **runs[0][1]}.items(), strict=True):
        grid = pad(images[:30].view(6, 5, 8, 8), (1, 1, 1, 1)).transpose(1, 2).reshape(60, 50)
        panel.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.set_title(title.replace("by ", "by\n"), loc="left", fontweight="bold", fontsize=10)
        panel.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return mean and standard deviation over seeds."""
    return {key: spread([run[key] for run in runs], ".3f", ".3f") for key in MEASURES}


def main() -> None:
    """Train, measure and draw."""
    parser = command_line(__doc__, "runs/gan")
    parser.add_argument("--seeds", type=positive, default=5, help="trainings (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=120, help="epochs of each training, 18 steps each (default: %(default)s)")
    options = parser.parse_args()
    one_thread()
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, digits.target[order]
    real, unseen = images[:1200], images[1200:]
    judge = Judge(real, labels[:1200], unseen)
    runs = [train(judge, real, options, seed) for seed in range(options.seeds)]
    rows = [
        {"digits": "real, trained on", **summary([judge(real)])},
        {"digits": "raw weights", **summary([{key: history.metrics[-1][f"raw/{key}"] for key in MEASURES} for history, _ in runs])},
        {"digits": "averaged weights", **summary([history.metrics[-1] for history, _ in runs])},
    ]
    plot(runs, real, judge(real)[MEASURES[0]], options.output / "gan.png")
    report(f"{counted(options.seeds, 'seed')}, mean ± standard deviation", rows, options.output / "gan.csv")


if __name__ == "__main__":
    main()
