"""Linear classifiers on fixed features, fitted exactly and over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.optim import LBFGS

from lightning_tricks.errors import TrickError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["Features", "Method", "collect_features", "fit_classifier", "score_classifiers"]

Method: TypeAlias = Literal["logistic", "ridge"]
Features: TypeAlias = tuple[dict[str, Tensor], Tensor]  # by stage, and the labels


def collect_features(
    stages: Mapping[str, nn.Module],
    batches: Iterable[Any],
    run: Callable[[Any], object],
    *,
    target: int | str,
    channel_dim: int | None,
    trick: str,
) -> Features:
    """Run a model over batches once, and return what each stage makes of them, with the labels.

    Args:
        stages: The modules by name.
        batches: The batches.
        run: Runs the model on a batch.
        target: Where labels stand in a batch.
        channel_dim: The dimension of features in what modules return; None = the last of three, and else the second.
        trick: How errors name who asks.

    Raises:
        TrickError: If there are no batches, labels are none, or a stage is not reached or returns no features, or none that are finite.
    """
    seen: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {name: [] for name in stages}
    labels: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
            seen[name] = _pooled(output, channel_dim, f"{trick}: stage {name!r}")

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in stages.items()]
    try:
        # A compiled module that has run before knows nothing of the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                seen.clear()
                run(batch)
                labels.append(_labels(batch, target, trick))
                for name, part in parts.items():
                    if name not in seen or len(seen[name]) != len(labels[-1]):
                        found = f"has {len(seen[name])} rows for {len(labels[-1])} labels" if name in seen else "is not called"
                        msg = f"{trick}: stage {name!r} must give features for each sample when the model runs, and {found}. Name another."
                        raise TrickError(msg)
                    part.append(seen[name])
    finally:
        for handle in handles:
            handle.remove()
    if not labels:
        msg = f"{trick} needs batches to fit and to score classifiers on, and there are none. Give it training and validation data."
        raise TrickError(msg)
    features = {name: torch.cat(part) for name, part in parts.items()}
    broken = [name for name, values in features.items() if not values.isfinite().all()]
    if broken:
        msg = f"{trick}: features must be finite, and those of stage {broken[0]!r} are not for some samples. Look at weights and data."
        raise TrickError(msg)
    return features, torch.cat(labels)


def _pooled(output: Any, channel_dim: int | None, what: str) -> Tensor:
    """Return the mean of an output over all dimensions but samples and channels."""
    while isinstance(output, tuple | list) or (isinstance(output, dict) and output):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        msg = f"{what} must return a tensor of samples and features, and returns {type(output).__name__}. Name another."
        raise TrickError(msg)
    channels = (output.ndim - 1 if output.ndim == 3 else 1) if channel_dim is None else channel_dim % output.ndim
    rest = [dim for dim in range(1, output.ndim) if dim != channels]
    values = output.detach().double()
    return (values.mean(rest) if rest else values).cpu()


def _labels(batch: Any, target: int | str, trick: str) -> Tensor:
    try:
        labels = batch[target]
    except (KeyError, IndexError, TypeError):
        labels = None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        found = f"shape {tuple(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        msg = f"{trick} needs the class of each sample, whole numbers of shape (N,), and `target={target!r}` of a batch has {found}."
        raise TrickError(msg)
    if len(labels) and labels.min() < 0:
        msg = (
            f"{trick} needs classes that count from 0, and `target={target!r}` of a batch has {int(labels.min())}. Leave such samples out."
        )
        raise TrickError(msg)
    return labels.detach().long().cpu()


def fit_classifier(x: Tensor, y: Tensor, classes: int, *, method: Method, l2: float) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier, exactly and in float64, on the samples of all ranks.

    On standardized features z = (x − m)/s, and with n samples: ``"logistic"`` minimizes
    ``−1/n Σ log softmax(W z + b)[y] + l2/2 ‖W‖²`` by L-BFGS; ``"ridge"`` solves ``1/(2n) Σ ‖W z + b − e_y‖² + l2/2 ‖W‖²``.

    Args:
        x: Features of this rank's samples, (N, D).
        y: Their classes, (N,).
        classes: Number of classes.
        method: The loss.
        l2: Penalty on the weights.

    Returns:
        Weights (K, D) and biases (K,) for the features as they are.
    """
    x = x.double()
    n = _summed(torch.tensor(float(len(x)), dtype=torch.float64))
    mean = _summed(x.sum(0)) / n
    std = (_summed((x - mean).square().sum(0)) / n).sqrt()
    std = torch.where(std > 1e-12 * mean.abs().clamp(min=1.0), std, torch.ones_like(std))  # features that are constant carry nothing
    z, one_hot = (x - mean) / std, nn.functional.one_hot(y, classes).double()
    if method == "ridge":
        bias = _summed(one_hot.sum(0)) / n
        gram = _summed(z.T @ z) / n + l2 * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.lstsq(gram, _summed(z.T @ (one_hot - bias)) / n, driver="gelsd").solution.T
    else:
        weight, bias = _fit_logistic(z, y, classes, n, l2)
    return weight / std, bias - (weight / std) @ mean


def _fit_logistic(z: Tensor, y: Tensor, classes: int, n: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer: Any = LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(z @ weight.T + bias, y, reduction="sum") / n
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in (weight, bias):
            assert parameter.grad is not None
            parameter.grad.copy_(_summed(parameter.grad))
        assert weight.grad is not None
        with torch.no_grad():
            weight.grad.add_(weight, alpha=l2)
            return _summed(loss.detach()) + l2 / 2 * weight.square().sum()

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def score_classifiers(train: Features, validation: Features, *, method: Method, l2: float) -> dict[str, float]:
    """Fit a classifier on each stage's features, and return the share of validation samples that each gets right, over all ranks."""
    classes = int(_most(torch.stack([labels.max() for _, labels in (train, validation)]).max())) + 1
    accuracies = {}
    for name, features in train[0].items():
        weight, bias = fit_classifier(features, train[1], classes, method=method, l2=l2)
        right = (validation[0][name] @ weight.T + bias).argmax(1) == validation[1]
        counts = _summed(torch.tensor([float(right.sum()), float(len(right))], dtype=torch.float64))
        accuracies[name] = float(counts[0] / counts[1])
    return accuracies


def _ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _summed(tensor: Tensor) -> Tensor:
    return _reduced(tensor, distributed.ReduceOp.SUM) if _ranks() else tensor


def _most(tensor: Tensor) -> Tensor:
    return _reduced(tensor, distributed.ReduceOp.MAX) if _ranks() else tensor


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    """Reduce over all ranks, on the device that the ranks' backend needs."""
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else tensor.device
    moved = tensor.detach().to(device, copy=True)
    distributed.all_reduce(moved, op=operation)
    return moved.to(tensor.device)
