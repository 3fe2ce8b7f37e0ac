"""The latest checkpoints of the tensors that one optimizer moves, and their mean, which exists only while somebody needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_tricks._core.lightning import override
from lightning_tricks._core.weights import lerp_
from lightning_tricks.averaging._tracks import Track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Window", "mean_of"]


def mean_of(checkpoints: Sequence[Mapping[str, Tensor]], form: Callable[[str], tuple[torch.dtype, torch.device]]) -> dict[str, Tensor]:
    """Return the mean of checkpoints by name, each tensor in a dtype and on a device of its own."""
    mean: dict[str, Tensor] = {}
    with torch.inference_mode(mode=False), torch.no_grad():
        for n, checkpoint in enumerate(checkpoints, 1):
            for name, tensor in checkpoint.items() if n == 1 else ():
                dtype, device = form(name)
                mean[name] = torch.empty_like(tensor, dtype=dtype, device=device).copy_(tensor)
            lerp_(list(mean.values()), [checkpoint[name] for name in mean], 1 / n)
    return mean


class Window(Track):
    """A track that keeps the latest checkpoints in `others`, oldest first, each tensor in its own dtype.

    Checkpoints are never written to, so that they may share a tensor. The mean is computed anew from them whenever it is needed:
    nothing drifts, and it depends on nothing else.
    """

    derived: ClassVar[bool] = True

    @override
    def __post_init__(self) -> None:
        self.others = []

    @property
    @override
    def started(self) -> bool:
        return bool(self.others)

    @property
    @override
    def names(self) -> list[str]:
        return list(self.others[-1]) if self.others else []

    @override
    def go_on_from(self, source: Track) -> None:
        super().go_on_from(source)
        self.others = [{} for _ in source.others]

    @override
    def begin(self, epoch: int) -> None:
        self.begun = self.latest = self.steps
        self.epoch = epoch

    @override
    def update(self, *weights: float) -> None:
        """Take a checkpoint, in place of the oldest if there are enough."""
        assert not self.inside
        self._restart_resized()
        first = self.others[0] if self.others else {}
        fixed = {name: first[name] for name, place in self.places.items() if place.kind == "keep" and name in first}
        del self.others[: max(0, len(self.others) - self.storage.count + 1)]
        self.others.append({name: fixed[name] if name in fixed else self._stored(name) for name in self.places})
        self.latest = self.steps
        self.updates += 1

    @override
    def put_average(self) -> None:
        if self.inside or not self.started:
            return
        self._restart_resized()
        self.averages = self._mean()
        super().put_average()

    @override
    def put_raw(self) -> None:
        super().put_raw()
        self.averages = {}

    @override
    def adopt(self, raw: Mapping[str, Tensor]) -> None:
        self.averages = self._mean()
        super().adopt(raw)

    @override
    def averaged(self) -> dict[str, Tensor]:
        return super().averaged() if self.inside else self._mean()

    def _mean(self) -> dict[str, Tensor]:
        return mean_of(self.others, super()._form)

    @override
    def _form(self, name: str) -> tuple[torch.dtype, torch.device]:
        tensor = self.places[name].tensor
        return tensor.dtype, self.storage.device or tensor.device

    @override
    def _store(self, name: str, kept: Sequence[Tensor | None] = ()) -> None:
        """Put a tensor into the checkpoints, the latest last; before the first that is given, it was as it is there."""
        if not self.others:
            self.others = [{} for _ in kept[-self.storage.count :]]
        values = [self._stored(name, value) for value in kept or (None,)]
        for i, checkpoint in enumerate(reversed(self.others)):
            checkpoint[name] = values[max(0, len(values) - 1 - i)]
