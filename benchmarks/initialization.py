"""Deep plain networks on handwritten digits: what their first weights do to signals, and to what they learn in a few epochs.

Networks of 40 linear layers of width 64 without norms and shortcuts are trained for some epochs of Adam with each initialization, over
several seeds. Of each, the variance of the outputs of the first and of the last hidden layer before training is noted, on training
data, and the accuracy on held-out digits afterwards.

Run ``python benchmarks/initialization.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

import lightning_tricks as lt
from reporting import environment, markdown, show, write

SCHEMES = ("torch's", "xavier_normal", "kaiming_normal", "lsuv")
HEADER = ("network", "variance, first layer", "variance, last layer", "accuracy, %", "± over seeds")


def make(layers: int, activation: str) -> nn.Sequential:
    """Make a network of ReLUs, and swap them."""
    hidden = (part for _ in range(layers - 1) for part in (nn.Linear(64, 64), nn.ReLU()))
    model = nn.Sequential(*hidden, nn.Linear(64, 10))
    lt.functional.swap_activation(model, "relu", activation)
    return model


def initialize(model: nn.Module, scheme: str, x: Tensor, seed: int) -> None:
    """Give a network its first weights."""
    if scheme == "self-normalizing":
        lt.functional.make_self_normalizing(model, seed=seed)
    elif scheme != "torch's":
        lt.functional.initialize(model, scheme, seed=seed, batches=[x])  # type: ignore[arg-type]


def variances(model: nn.Sequential, x: Tensor) -> list[float]:
    """Return the variance of the output of each linear layer."""
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                found.append(x.var().item())
    return found


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """Train by Adam in batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    layers, epochs, seeds = (10, 1, 2) if quick else (40, 10, 5)
    data = import_module("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = (x - x[:1200].mean(0)) / (x[:1200].std(0) + 1e-3)
    relu, gelu = ([(name, name.lower(), scheme) for scheme in SCHEMES] for name in ("ReLU", "GELU"))
    rows, results = [], {}
    for title, activation, scheme in [*relu, *gelu, ("SELU", "relu", "self-normalizing")]:
        firsts, lasts, accuracies = [], [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = make(layers, activation)
            initialize(model, scheme, x[:256], seed)
            first, *_, last, _ = variances(model, x[:256])
            firsts.append(first)
            lasts.append(last)
            train(model, x[:1200], y[:1200], epochs, seed)
            with torch.no_grad():
                accuracies.append(100 * (model.eval()(x[1200:]).argmax(1) == y[1200:]).double().mean().item())
        name = f"{title}, {scheme}"
        results[name] = {"first": firsts, "last": lasts, "accuracy": accuracies}
        rows.append([name, f"{mean(firsts):.2g}", f"{mean(lasts):.2g}", f"{mean(accuracies):.1f}", f"{stdev(accuracies):.1f}"])
    show(f"{layers} layers, {epochs} epochs, {seeds} seeds", HEADER, rows)
    if not quick:
        command = shlex.join(["python", "benchmarks/initialization.py"])
        path = Path(__file__).with_name("results") / "initialization"
        write(
            path, "Initialization", environment(command, "torch", "scikit-learn", device="cpu"), {"runs": results}, [markdown(HEADER, rows)]
        )


if __name__ == "__main__":
    main()
