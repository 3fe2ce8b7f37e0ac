"""Time of dropout inserted behind a module, forward and backward, beside torch's own layers of the same kind.

The input has the size of one of ViT-B's activations at 8 images, 8×197×768 in float32. A round runs everything once in turn; the time of
a copy and of its gradient, the least that a layer can do, is given beside. Times are CPU time of the process with one thread.

Run ``python benchmarks/dropout.py``; ``--quick`` shows that it works.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

import lightning_tricks as lt
from reporting import environment, markdown, show, write

RATE = 0.1
HEADER = ("what", "ms", "× torch's layer above")
PEERS = {"element": nn.Dropout, "channel": nn.Dropout1d, "alpha": nn.AlphaDropout, "variational": nn.Dropout}


class Copy(nn.Module):
    """The least that a layer can do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Copy the input."""
        return x.clone()


def inserted(kind: str) -> nn.Module:
    """Make a module with dropout behind it."""
    model = nn.Sequential(nn.Identity())
    lt.functional.apply_dropout(model, RATE, after="Identity", kind=kind)
    return model


def timed(module: nn.Module, x: torch.Tensor) -> float:
    """Return the CPU time of one forward and backward pass, in milliseconds."""
    x.grad, ones = None, torch.ones_like(x)
    begin = time.process_time()
    module(x).backward(ones)
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (2, 17, 64) if options.quick else (8, 197, 768)
    x = torch.randn(shape, requires_grad=True)
    modules: dict[str, nn.Module] = {"copy": Copy()}
    peers: dict[str, str] = {}
    for kind, peer in PEERS.items():
        modules[f"nn.{peer.__name__}"] = peer(RATE)
        modules[f"Dropout, {kind}"] = inserted(kind)
        peers[f"Dropout, {kind}"] = f"nn.{peer.__name__}"
    times: dict[str, list[float]] = {what: [] for what in modules}
    for _ in range(options.warmup + options.repeats):
        for what, module in modules.items():
            times[what].append(timed(module, x))
    times = {what: each[options.warmup :] for what, each in times.items()}
    rows = []
    for what, each in times.items():
        pairs = zip(each, times[peers.get(what, what)], strict=True)
        rows.append([what, f"{median(each):.2f}", f"{median(one / other for one, other in pairs):.2f}" if what in peers else ""])
    show(f"{'×'.join(map(str, shape))}, rate {RATE}, forward and backward", HEADER, rows)
    if options.output is not None or not options.quick:
        command = shlex.join(["python", "benchmarks/dropout.py", *sys.argv[1:]])
        path = options.output or Path(__file__).with_name("results") / "dropout"
        write(path, "Dropout", environment(command, "torch", device="cpu"), {"times": times}, [markdown(HEADER, rows)])


if __name__ == "__main__":
    main()
