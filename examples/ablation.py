"""Find out which of eight tricks help a small network on handwritten digits: each alone, and each taken out of all together.

    python examples/ablation.py                # 54 trainings; a table, a plot and a report in runs/digits_ablation
    python examples/ablation.py --seeds 5      # later: trains the other two seeds only

An interrupted study goes on where it stopped. The images come with scikit-learn; neither a download nor an account is needed.
"""

import argparse
import warnings

import torch

import lightning_tricks as lt
from digits import DigitsData, DigitsNet
from lightning_tricks import optim, schedules

LR = 0.02
TRICKS = {
    "EMA": [lt.EMA(half_life="1 epoch", warmup="2 epochs", buffers="average")],
    "cosine schedule": [lt.OptimizerFactory(optim.SGD(lr=LR, momentum=0.9), schedule=schedules.Cosine(warmup="5%"))],
    "weight decay": [lt.WeightDecay(1e-3)],
    "dropout": [lt.Dropout(0.1, after="ReLU")],
    "feature noise": [lt.FeatureNoise(0.1, where="layers.0", at="input")],
    "standardized inputs": [lt.InputStandardization(module="layers")],
    "GELU": [lt.ActivationSwap("relu", "gelu")],
    "initialization": [lt.Initialization("kaiming_normal")],
}


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="epochs of 24 steps in each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--tricks", nargs="+", choices=TRICKS, default=list(TRICKS), metavar="TRICK", help="which (default: all eight)")
    parser.add_argument("--folder", default="runs/digits_ablation", help="folder for the results (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on images this small, threads wait for each other longer than they compute
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec.* is deprecated).*")
    study = lt.search.ablate(
        lambda: DigitsNet(LR),
        DigitsData,
        {name: TRICKS[name] for name in options.tricks},
        options.seeds,
        trainer={"max_epochs": options.epochs, "accelerator": "cpu"},
        metric="val_loss",
        folder=options.folder,
    )
    print(study)
    print(f"Report: {options.folder}/ablation.html")


if __name__ == "__main__":
    main()
