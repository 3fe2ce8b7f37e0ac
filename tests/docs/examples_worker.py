"""Runs examples on two processes and then, on the first, on one: ``python examples_worker.py FOLDER``, with the variables of torchrun."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "language_model": ["--epochs=1", "--characters=6000", "--width=16", "--write=8"],
    "tabular": ["--divisions=1", "--members=2", "--epochs=2", "--trees=3"],
    "gan": ["--seeds=1", "--epochs=1"],
    "timm_network": ["--seeds=1", "--epochs=1"],
}


def main() -> None:
    """Run every example under every strategy."""
    warnings.filterwarnings("ignore")
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    sys.path.insert(0, str(EXAMPLES))
    for strategy in ("ddp", "model_parallel", "auto"):
        if strategy == "auto":
            if rank != "0":
                break
            torch.distributed.destroy_process_group()
            for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
                del os.environ[name]
        for name, arguments in TINY.items():
            sys.argv = [name, f"--strategy={strategy}", f"--output={folder / strategy}", *arguments]
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
