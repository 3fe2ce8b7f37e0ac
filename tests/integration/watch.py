"""What moves in a fit, step by step."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback

from contracts.harness import weights


class Watch(Callback):
    """Notes, after each batch, the weights, the optimizer's momentum, its rates and the mode of the BatchNorm."""

    def __init__(self) -> None:
        self.states, self.buffers, self.rates, self.modes = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        optimizer = trainer.optimizers[0]
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.states.append(weights(pl_module))
        self.buffers.append(
            {names[id(p)]: s["momentum_buffer"].clone() for p, s in optimizer.state.items() if s.get("momentum_buffer") is not None}
        )
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.modes.append(pl_module.body[1].training)

    def moves(self, prefix: str) -> list[bool]:
        """Tell for each step but the first whether something under a name has changed."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [any(not torch.equal(one[name], other[name]) for name in one if name.startswith(prefix)) for one, other in pairs]
