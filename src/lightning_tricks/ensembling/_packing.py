"""Members of one architecture that are trained at once: one step of stacked weights, mapped over the members.

Each member keeps its own weights, buffers, batches and gradient: the losses are added up, so that a weight's gradient is that of its own
member's loss, and an optimizer that acts on each number by itself treats each member as if it were alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from inspect import signature
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torchmetrics import Metric

from lightning_tricks._core.copies import copy_module
from lightning_tricks._core.epochs import seed_epoch
from lightning_tricks._core.lightning import (
    LightningModule,
    callbacks_of,
    defines,
    extract_batch_size,
    is_bystander,
    isolate_rng,
    overridden,
    override,
)
from lightning_tricks.ensembling._ensemble import _difference, _named_tensors
from lightning_tricks.ensembling._member_files import describe
from lightning_tricks.ensembling._packed_logs import PackedLogs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_tricks._core.lightning import Trainer

__all__ = ["CannotPackError", "PackedLoader", "PackedMembers", "check_packable", "loss_in", "run_step"]

_ELEMENTWISE = (SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, Adadelta, ASGD)
_SINGLE = {"forward", "training_step", "validation_step", "test_step", "predict_step", "configure_optimizers", "configure_model"}
_LOADING = {"train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"}
_MOVING = {"on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"}


class CannotPackError(Exception):
    """Why members must be trained one after another."""


def check_packable(members: Sequence[Any], trainer: Trainer, datamodule: object) -> None:
    """Check, as far as that shows before training, that members trained at once end as those trained one after another.

    Raises:
        CannotPackError: If something stands in the way.
    """
    first = members[0]
    metrics = [name for name, module in first.named_modules() if isinstance(module, Metric)]
    acting = [type(callback).__name__ for callback in callbacks_of(trainer) if not is_bystander(callback)]
    hooks = sorted(overridden(first) - _SINGLE - _LOADING)
    moving = sorted(overridden(datamodule) & _MOVING)
    differing = next((i for i, member in enumerate(members) if describe(member) != describe(first)), None)
    plain = isinstance(first, LightningModule) and type(trainer.strategy).__name__ == "SingleDeviceStrategy"
    reasons = {
        "it trains on one device, by a Trainer of the Lightning that was imported first": not plain,
        f"{type(first).__name__} optimizes by hand": not first.automatic_optimization,
        f"{type(first).__name__} has hooks that act on one model: {hooks}": hooks,
        f"the data module moves batches by itself: {moving}": moving,
        f"{type(first).__name__} keeps metrics, which would add up all members: {metrics}": metrics,
        "its `validation_step` tells data sets apart by `dataloader_idx`": "dataloader_idx" in signature(first.validation_step).parameters,
        f"callbacks would act on all members as on one model: {acting}": acting,
        "gradients are clipped by the norm of all members together": trainer.gradient_clip_val
        and trainer.gradient_clip_algorithm != "value",
        "the gradient scaler would skip the steps of all members together": getattr(trainer.precision_plugin, "scaler", None) is not None,
        f"member {differing} differs from member 0 in its hyperparameters or tensors": differing is not None,
    }
    found = next((reason for reason, holds in reasons.items() if holds), "") or _difference(list(members))
    if found:
        raise CannotPackError(found)


class PackedLoader:
    """Gives the members' batches stacked, each in the order that its member's own run would have.

    Args:
        loaders: One for each member.
        seeds: From which the members' epochs follow.
        epoch: Tells the current one.
    """

    def __init__(self, loaders: Sequence[Any], seeds: Sequence[int], epoch: Callable[[], int]) -> None:
        if not all(hasattr(loader, "__len__") for loader in loaders):
            msg = f"the training data are a {type(loaders[0]).__name__} without a length"
            raise CannotPackError(msg)
        self.loaders, self.seeds, self.epoch = [copy(loader) for loader in loaders], seeds, epoch

    def __len__(self) -> int:
        return min(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        iterators, batches = [], []
        for seed, loader in zip(self.seeds, self.loaders, strict=True):
            with isolate_rng():
                seed_epoch(seed, self.epoch(), 0, [loader])
                iterators.append(iter(loader))
                batches.append(next(iterators[-1]))  # by which the epoch's order is drawn
        yield _stacked(batches)
        for following in zip(*iterators, strict=True):
            yield _stacked(following)


def _stacked(batches: Sequence[Any]) -> Any:
    leaves, structures = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    shapes = [[tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in each] for each in leaves]
    if any(structure != structures[0] for structure in structures) or any(each != shapes[0] for each in shapes) or not shapes[0]:
        msg = f"the members' batches differ in their structure: {shapes[0]} and {next((each for each in shapes if each != shapes[0]), [])}"
        raise CannotPackError(msg)
    if not all(isinstance(leaf, Tensor) for leaf in leaves[0]):
        msg = f"batches hold something other than tensors: {shapes[0]}"
        raise CannotPackError(msg)
    return tree_unflatten([torch.stack(each) for each in zip(*leaves, strict=True)], structures[0])


def run_step(member: LightningModule, step: str, batch: Any, batch_idx: int) -> Any:
    """Run a step as Lightning does, which leaves the number of the batch away where a step does not take it."""
    method = getattr(member, step)
    takes = signature(method).parameters
    numbered = len(takes) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes.values())
    return method(batch, batch_idx) if numbered else method(batch)


class PackedMembers(LightningModule):
    """All members in one module, which any Trainer trains.

    `member` is built as one of them, with the same names, and each parameter and buffer in it is that of all members, stacked.

    Args:
        members: The members.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        self.count = len(members)
        self.alone = list(members)  # until training starts; in a list, to be no submodules
        self.logs = PackedLogs()
        self.member: Any = copy_module(members[0])
        if not defines(self.member, "validation_step"):  # so that the Trainer sees none, and says of it what it says of a member alone
            self.validation_step = MethodType(LightningModule.validation_step, self)  # type: ignore[method-assign]
        stacked: dict[int, Tensor] = {}
        names = [dict(_named_tensors(member)) for member in members]
        for module in self.member.modules():
            if isinstance(module, LightningModule):
                module.log = self.logs.catch  # type: ignore[method-assign]
        for name, tensor in _named_tensors(self.member):
            whole = torch.stack([tensors[name].detach() for tensors in names])
            stacked[id(tensor)] = nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
        for module in self.member.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: stacked[id(tensor)] for name, tensor in held.items() if tensor is not None})

    @override
    def forward(self, step: str, batch: Any, batch_idx: int) -> Any:
        """Run a member's step."""
        return run_step(self.member, step, batch, batch_idx)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, logged = self.losses(batch, batch_idx)
        if logged:
            options = {name: given for name, (_, given) in self.logs.caught.items()}
            size = extract_batch_size(tree_map(lambda leaf: leaf[0], batch))
            for name, mean, given in self.logs.add("train", logged, options, size):
                self.log(name, mean, **given)
        return losses.sum()

    def losses(self, batch: Any, batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each member's loss for its batch, and what each logs."""

        def call(weights: dict[str, Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            given, self.logs.caught = dict(weights), {}
            loss = loss_in(functional_call(self, weights, ("training_step", batch, batch_idx)))
            replaced = [name for name in given if weights[name] is not given[name]]
            if replaced:
                msg = f"the step replaces {replaced[0].removeprefix('member.')!r} instead of changing it in place"
                raise CannotPackError(msg)
            return loss, {name: torch.as_tensor(value).detach().float() for name, (value, _) in self.logs.caught.items()}

        try:
            return vmap(call, randomness="different")(self._weights(), batch)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            msg = f"mapping over the members failed with: {error}"
            raise CannotPackError(msg) from error

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logged: dict[str, Tensor] = {}
        options: dict[str, dict[str, Any]] = {}
        for member in range(self.count):
            self.logs.caught = {}
            functional_call(self, {name: tensor[member] for name, tensor in self._weights().items()}, ("validation_step", batch, batch_idx))
            for name, (value, given) in self.logs.caught.items():
                values = logged.setdefault(name, torch.full((self.count,), float("nan"), device=self.device))
                values[member], options[name] = torch.as_tensor(value), given
        if logged:
            for name, mean, given in self.logs.add("validation", logged, options, extract_batch_size(batch)):
                self.log(name, mean, **given)

    @override
    def on_train_epoch_start(self) -> None:
        self.logs.begin("train")

    @override
    def on_validation_epoch_start(self) -> None:
        self.logs.begin("validation")

    @override
    def on_train_epoch_end(self) -> None:
        self.log_dict(self.logs.of_epoch("train"))

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.logs.of_epoch("validation"))
        if self.trainer.sanity_checking:
            self.logs.begin("validation")

    @override
    def configure_optimizers(self) -> Any:
        for member in self.alone:
            member.trainer = self.trainer
        configured = [member.configure_optimizers() for member in self.alone]
        optimizers = [list(_found(each, Optimizer)) for each in configured]
        _check_optimizers(configured, optimizers)
        own = dict(self.member.named_parameters())
        places = {id(parameter): own[name] for name, parameter in self.alone[0].named_parameters()}
        for group in optimizers[0][0].param_groups:
            group["params"] = [places[id(parameter)] for parameter in group["params"]]
        return configured[0]

    @override
    def on_train_start(self) -> None:
        self.alone = []

    def state_of(self, member: int) -> dict[str, Tensor]:
        """Return one member's state dict."""
        return {name: tensor[member] for name, tensor in self.member.state_dict().items()}

    def _weights(self) -> dict[str, Tensor]:
        return dict(_named_tensors(self))


def loss_in(result: Any) -> Tensor:
    """Return the loss in what a `training_step` has returned."""
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        msg = f"`training_step` returned a {type(loss).__name__} for a loss"
        raise CannotPackError(msg)
    return loss


def _found(value: Any, kind: type) -> Iterator[Any]:
    """Give all objects of a kind in whatever containers `configure_optimizers` returns."""
    if isinstance(value, kind):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from _found(part, kind)


def _check_optimizers(configured: Sequence[Any], optimizers: Sequence[Sequence[Optimizer]]) -> None:
    first = optimizers[0][0] if len(optimizers[0]) == 1 else None
    if first is None:
        msg = f"{len(optimizers[0])} optimizers were configured, and packing needs one"
        raise CannotPackError(msg)
    if type(first) not in _ELEMENTWISE:
        msg = f"{type(first).__name__} is not known to act on each number by itself"
        raise CannotPackError(msg)
    if first.state:
        msg = f"{type(first).__name__} has a state before its first step"
        raise CannotPackError(msg)
    if any(_found(configured[0], ReduceLROnPlateau)):
        msg = "ReduceLROnPlateau follows one member's metric"
        raise CannotPackError(msg)
    options = [
        [repr({name: value for name, value in group.items() if name != "params"}) for group in found[0].param_groups]
        for found in optimizers
    ]
    if any(each != options[0] for each in options):
        msg = "the members' optimizers differ in their settings"
        raise CannotPackError(msg)
