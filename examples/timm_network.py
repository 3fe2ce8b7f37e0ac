"""Train a network of timm on handwritten digits, put together in YAML, without tricks and with three of them.

    python examples/timm_network.py                             # 3 seeds each: a table and a picture in runs/timm
    python examples/timm_network.py --seeds 5                   # as for the picture in the documentation
    python examples/timm_network.py --strategy ddp              # the same on two processes
    python examples/timm_network.py --strategy model_parallel   # the same, each with half of every weight (FSDP2)
    python examples/timm_network.py fit --config examples/configs/timm_base.yaml --config examples/configs/timm.yaml

The last line is one run by LightningCLI, and the others make such runs. Which network it is, and which tricks go with it, is said by the
two files; the module below only names its parts. It learns from 397 digits: mixed pairs, blocks left out at random and an average of
the weights help a little, from an error of 5.6 % to one of 5.0 % over five seeds; shifted and rotated copies besides cost more than they
gained in so short a training. Needs timm: `python -m pip install -e ".[examples,timm]"`.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from digits import DigitsData
from processes import PROCESSES, command_line, counted, one_thread, positive, quiet, report, shard, share, spread

Batch = Sequence[Tensor]  # images and labels
CONFIGS = Path(__file__).parent / "configs"
FILES = {"without tricks": [CONFIGS / "timm_base.yaml"], "with tricks": [CONFIGS / "timm_base.yaml", CONFIGS / "timm.yaml"]}
COLORS = {"without tricks": "#D55E00", "with tricks": "#0072B2"}
STRATEGIES = {
    "auto": ["--trainer.strategy=auto"],
    "ddp": ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.process_group_backend=gloo"],
    "model_parallel": [
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.strategy.process_group_backend=gloo",
    ],
}


class TimmNetwork(LightningModule):
    """A classifier of timm.

    Args:
        name: Its name there.
        arguments: Further ones of ``timm.create_model``.
        classes: Number of classes.
    """

    def __init__(self, name: str, arguments: dict[str, Any] | None = None, classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = timm.create_model(name, num_classes=classes, **(arguments or {}))

    @override
    def configure_model(self) -> None:
        shard(self, self.network)

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @override
    def training_step(self, batch: Batch) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    @override
    def validation_step(self, batch: Batch) -> None:
        self.measure("val", batch)

    @override
    def test_step(self, batch: Batch) -> None:
        self.measure("test", batch)

    def measure(self, stage: str, batch: Batch) -> None:
        """Log error and loss of a batch."""
        logits = self(batch[0])
        metrics = {f"{stage}_error": (logits.argmax(1) != batch[1]).float().mean(), f"{stage}_loss": cross_entropy(logits, batch[1])}
        self.log_dict(metrics, batch_size=len(batch[1]), sync_dist=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())  # `OptimizerFactory` takes its place


class History(Callback):
    """Remembers what every validation found."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.logged_metrics.items()})


class Run(NamedTuple):
    """The course of a training, the test's metrics, and which of the test's digits were mistaken."""

    history: list[dict[str, float]]
    test: dict[str, float]
    mistaken: Tensor


def train(files: Sequence[Path], options: argparse.Namespace, seed: int) -> Run:
    """Train and test once, as the command line would."""
    history = History()
    configs = [part for file in files for part in ("--config", str(file))]
    changes = [
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={options.output}",
        f"--trainer.devices={PROCESSES[options.strategy]}",
    ]
    changes += [f"--data.batch_size={share(options, 32)}", *STRATEGIES[options.strategy]]
    changes += [] if options.epochs is None else [f"--trainer.max_epochs={options.epochs}"]
    defaults = {"callbacks": history}
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")  # which is what this script does
    cli = LightningCLI(TimmNetwork, DigitsData, run=False, trainer_defaults=defaults, save_config_callback=None, args=[*configs, *changes])
    cli.trainer.fit(cli.model, cli.datamodule)
    tested = dict(cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0])
    images, labels = map(torch.stack, zip(*((image, label) for image, label in cli.datamodule.test_set), strict=True))
    with torch.no_grad():
        mistaken = cli.model.eval()(images).argmax(1) != labels
    return Run(history.metrics, tested, mistaken)


@rank_zero_only
def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the validation error over the epochs, and the digits that are mistaken most often without tricks."""
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    axes = left.subplots()
    for name, several in runs.items():
        for i, run in enumerate(several):
            errors = [100 * metrics["val_error"] for metrics in run.history]
            axes.plot(range(1, len(errors) + 1), errors, color=COLORS[name], linewidth=1.3, label=None if i else name)
    axes.set_title("Validation error", loc="left", fontweight="bold")
    axes.set_xlabel("epochs")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"])
    axes.minorticks_off()
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(frameon=False, labelcolor="linecolor")
    counts = {name: torch.stack([run.mistaken for run in several]).sum(0) for name, several in runs.items()}
    images = DigitsData().test_set
    right.suptitle(f"Hardest digits: mistaken by how many of {len(several)} networks", x=0.02, ha="left", fontweight="bold")
    for panel, index in zip(
        right.subplots(4, 7).flat, counts["without tricks"].argsort(descending=True, stable=True).tolist(), strict=False
    ):
        panel.imshow(images[index][0][0], cmap="gray_r", vmin=0, vmax=1)
        panel.axis("off")
        panel.set_title(f"{counts['without tricks'][index]} → {counts['with tricks'][index]}", fontsize=9, pad=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def summary(runs: Sequence[Run]) -> dict[str, str]:
    """Return mean and standard deviation over seeds."""
    return {name: spread([run.test[name] for run in runs], ".4f", ".4f") for name in ("test_error", "test_loss")}


def main() -> None:
    """Hand over to LightningCLI if the first argument is one of its subcommands, or else compare."""
    one_thread()
    quiet()
    if sys.argv[1:2] and sys.argv[1] in {"fit", "validate", "test", "predict"}:
        LightningCLI(TimmNetwork, DigitsData, save_config_kwargs={"overwrite": True})
        return
    parser = command_line(__doc__, "runs/timm")
    parser.add_argument("--seeds", type=positive, default=3, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, help="epochs of each training (default: what the files say)")
    options = parser.parse_args()
    runs = {name: [train(files, options, seed) for seed in range(options.seeds)] for name, files in FILES.items()}
    plot(runs, options.output / "timm.png")
    rows = [{"network": name, **summary(several)} for name, several in runs.items()]
    report(f"{counted(options.seeds, 'seed')}, mean ± standard deviation", rows, options.output / "timm.csv")


if __name__ == "__main__":
    main()
