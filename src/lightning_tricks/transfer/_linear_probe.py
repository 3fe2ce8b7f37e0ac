"""Linear classifiers on the features of several stages: what does each layer of a trained network know of the new task?

Features that a network has learned become more special from layer to layer. Where the new task is like the old one, a linear classifier
does best on the last features; where it differs, an earlier stage may serve better. One pass over the data collects the features of all
stages, each averaged over positions, and a classifier is fitted on each.

Source: G. Alain and Y. Bengio, "Understanding intermediate layers using linear classifier probes", ICLR Workshop, 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_tricks._core.checkpoint import read_entry, write_entry
from lightning_tricks._core.checks import check_choice, check_in_interval, check_patterns
from lightning_tricks._core.exhibits import Exhibits, Table
from lightning_tricks._core.lightning import LightningModule, Trainer, defines, override
from lightning_tricks._core.loaders import evaluate_batch, training_pass, untouched, validation_pass
from lightning_tricks._core.selection import select_modules
from lightning_tricks._core.strategies import plain_name, return_to_shards
from lightning_tricks._core.trick import Trick
from lightning_tricks.errors import ArgumentError, NothingMatchedError
from lightning_tricks.transfer._probing import Method, collect_features, score_classifiers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["LinearProbe", "ProbeReport", "linear_probe"]


@dataclass(frozen=True)
class ProbeReport:
    """How well linear classifiers do on the features of several stages.

    Attributes:
        accuracies: Share of the validation samples that each stage's classifier gets right, in the order of the model's modules.

    Example:
        >>> ProbeReport({"layer3": 0.91, "layer4": 0.84}).best
        'layer3'
    """

    accuracies: Mapping[str, float]

    @property
    def best(self) -> str:
        """The stage whose classifier does best; of several, the last."""
        return max(reversed(list(self.accuracies)), key=self.accuracies.__getitem__)


def linear_probe(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    stages: str | Sequence[str],
    method: Method = "logistic",
    l2: float = 1e-3,
    channel_dim: int | None = None,
    target: int | str = 1,
    forward: Callable[[Any], object] | None = None,
) -> ProbeReport:
    """Fit linear classifiers on the features of several stages of a model, in one pass over the training data, and score them.

    Features are averaged over all positions, standardized, and classified: ``"logistic"`` minimizes
    ``−1/n Σ log softmax(W z + b)[y] + l2/2 ‖W‖²``, ``"ridge"`` solves ``1/(2n) Σ ‖W z + b − e_y‖² + l2/2 ‖W‖²``, both in float64.

    Reach for it before fine-tuning, to see from which layer on the network has to learn anew.

    Args:
        model: The model, evaluated without gradients; its mode and weights stay.
        train_loader: Batches to fit on.
        val_loader: Batches to score on.
        stages: Globs over names of the modules whose outputs are the features.
        method: The classifier's loss.
        l2: Penalty on its weights.
        channel_dim: The dimension of features in the modules' outputs; None = the last of three, as in transformers, and else the second.
        target: Index or key of the classes in a batch.
        forward: Runs the model on a batch; None = on the first item of a batch, on the model's device.

    Returns:
        The accuracy of each stage.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: If `stages` matches no module.
        TrickError: If there is no data, a batch has no classes, or a stage gives no features for each sample.

    Note:
        The features of all samples are kept in memory, 8 bytes each.

    References:
        G. Alain and Y. Bengio, "Understanding intermediate layers using linear classifier probes", ICLR Workshop, 2017.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 2)
        >>> data = [(x, (x.prod(1) > 0).long())]  # which no linear classifier of the inputs can tell
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 64), nn.ReLU())
        >>> report = linear_probe(net, data, data, stages=["0", "2"])
        >>> report.best, report.accuracies["0"] < 0.7 < report.accuracies["2"]
        ('2', True)
    """
    settings = _Settings.of(stages, method, l2, channel_dim, target)
    modules = _select(model, settings.stages, trick="linear_probe")

    def run(batch: Any) -> object:
        if forward is not None:
            return forward(batch)
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        tensor = next(model.parameters(), None)
        return model(inputs.to(tensor.device) if isinstance(inputs, Tensor) and tensor is not None else inputs)

    with _evaluating(model):
        found = []
        for loader in (train_loader, val_loader):
            with untouched([loader]):
                found.append(collect_features(modules, loader, run, target=target, channel_dim=channel_dim, trick="linear_probe"))
    return ProbeReport(score_classifiers(*found, method=settings.method, l2=settings.l2))


@dataclass(frozen=True)
class _Settings:
    """What both faces of the probe take, checked."""

    stages: str | Sequence[str]
    method: Method
    l2: float

    @classmethod
    def of(cls, stages: str | Sequence[str], method: Method, l2: float, channel_dim: int | None, target: int | str) -> _Settings:
        if channel_dim is not None and (isinstance(channel_dim, bool) or not isinstance(channel_dim, int) or channel_dim == 0):
            msg = f"`channel_dim` must be a dimension such as 1 or -1, and not 0, which is that of samples, or None, got {channel_dim!r}."
            raise ArgumentError(msg)
        if isinstance(target, bool) or not isinstance(target, int | str):
            msg = f"`target` must be an index or a key in a batch, got {target!r}."
            raise ArgumentError(msg)
        return cls(
            check_patterns("stages", stages, empty=False),
            check_choice("method", method, ("logistic", "ridge")),
            float(check_in_interval("l2", l2, "[0, ∞)")),
        )


def _select(model: nn.Module, stages: str | Sequence[str], *, trick: str) -> dict[str, nn.Module]:
    """Return the modules that each of the globs selects; one may lie within another."""
    globs = [stages] if isinstance(stages, str) else stages
    found = {name for glob in globs for name in select_modules(model, glob, (), trick=trick, argument="stages")}
    named = {plain_name(name): module for name, module in model.named_modules()}
    return {name: module for name, module in named.items() if name in found}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model evaluate, and give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class LinearProbe(Trick):
    """Fit and score linear classifiers on the features of several stages, before or after a fit.

    As `functional.linear_probe`, on the Trainer's training and validation data, over all ranks. Logs
    ``linear_probe/<stage>/accuracy``, and leaves weights, modes and random numbers as they are.

    Reach for it to choose what `FineTuning` thaws, and, with ``on="end"``, to see what the stages have become.

    Args:
        stages: Globs over names of the modules whose outputs are the features.
        on: Whether to probe when training starts or when it ends.
        method: The classifier's loss: ``"logistic"`` or ``"ridge"``, squares against one-hot classes.
        l2: Penalty on its weights.
        channel_dim: The dimension of features in the modules' outputs; None = the last of three, as in transformers, and else the second.
        target: Index or key of the classes in a batch.
        name: Names the trick in logs and checkpoints.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        NothingMatchedError: At setup, if `stages` matches no module.
        TrickError: When it probes, if there is no validation data, a batch has no classes, or a stage gives no features for each sample.

    Note:
        Batches run through `predict_step` if the module defines it, else through `forward` on a batch's first item. The training data
        are those of training, augmentation included. A DistributedSampler repeats some validation samples to fill up the last batch,
        and they count twice. A resumed run keeps what was measured at the start. Works under DDP, FSDP1, FSDP2 and DeepSpeed, and with
        ``torch.compile``, past which it runs the model.

    References:
        G. Alain and Y. Bengio, "Understanding intermediate layers using linear classifier probes", ICLR Workshop, 2017.

    Example:
        >>> LinearProbe(["layer2", "layer3", "layer4"])
        LinearProbe(stages=('layer2', 'layer3', 'layer4'))
    """

    def __init__(
        self,
        stages: str | Sequence[str],
        *,
        on: Literal["start", "end"] = "start",
        method: Method = "logistic",
        l2: float = 1e-3,
        channel_dim: int | None = None,
        target: int | str = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        settings = _Settings.of(stages, method, l2, channel_dim, target)
        self.stages, self.method, self.l2 = settings.stages, settings.method, settings.l2
        self.channel_dim, self.target = channel_dim, target
        self.on = check_choice("on", on, ("start", "end"))
        self.report: ProbeReport | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.report = None
        try:
            _select(pl_module, self.stages, trick=repr(self))
        except NothingMatchedError:
            if not defines(pl_module, "setup", "configure_model"):  # which build layers later; the pass looks again
                raise

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.on == "start" and self.report is None:
            self._probe(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.on == "end":
            self._probe(trainer, pl_module)

    def _probe(self, trainer: Trainer, module: LightningModule) -> None:
        stages, index = _select(module, self.stages, trick=repr(self)), count()
        found = []
        with _evaluating(module):
            for one_pass in (training_pass(trainer, None), validation_pass(trainer)):
                with one_pass as batches:
                    found.append(
                        collect_features(
                            stages,
                            batches,
                            lambda batch: evaluate_batch(trainer, module, batch, next(index)),
                            target=self.target,
                            channel_dim=self.channel_dim,
                            trick=repr(self),
                        )
                    )
        return_to_shards(module)
        self.report = ProbeReport(score_classifiers(*found, method=self.method, l2=self.l2))
        quantities = {f"{self.log_prefix}/{stage}/accuracy": accuracy for stage, accuracy in self.report.accuracies.items()}
        for logger in trainer.loggers:
            logger.log_metrics(quantities, step=trainer.global_step)

    @override
    def _exhibits(self) -> Exhibits:
        rows = tuple(self.report.accuracies.items()) if self.report else ()
        return Exhibits(tables={"stage_table": Table(("stage", "accuracy"), rows)} if rows else {})

    # Checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        write_entry(checkpoint, self.state_key, repr(self), {"accuracies": dict(self.report.accuracies) if self.report else None})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        entry = read_entry(checkpoint, self.state_key)
        if trainer.state.fn == "fit" and entry is not None and entry["accuracies"] is not None:
            self.report = ProbeReport(entry["accuracies"])
