"""Several models as one: their predictions together, one after another or in one batched computation.

Models of one architecture differ in their weights alone. Stacked along a new dimension, these can be mapped over: one kernel computes
what M kernels would. That pays where starting kernels costs more than what they compute, and not where a stacked kernel is slower, as
grouped convolutions are on some devices; so both ways are timed, and the faster one is taken.

Source: L. K. Hansen and P. Salamon, "Neural network ensembles", TPAMI, 1990.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_tricks._core.checks import check_choice
from lightning_tricks._core.copies import copy_module
from lightning_tricks._core.files import check_paths, read_state_dict
from lightning_tricks._core.lightning import override
from lightning_tricks._core.strategies import plain_name
from lightning_tricks.ensembling._combining import (
    Combine,
    Output,
    Uncertainty,
    check_combination,
    combine_predictions,
    decompose_uncertainty,
)
from lightning_tricks.errors import ArgumentError, CheckpointError, TrickError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

__all__ = ["Ensemble"]

_ROUNDS = 5


class Ensemble(nn.Module):
    """Predict by several models together: ``log(1/M Σ_m softmax(z_m))`` of their logits, or as `combine` says.

    Reach for it with models that were trained independently, or at several moments of one run: together they are more accurate, better
    calibrated, and their disagreement tells what they do not know.

    Args:
        members: Models that take the same inputs and return a tensor each, at least one.
        combine: ``"probabilities"`` gives the logarithm of the mean probabilities, whose argmax and cross-entropy are the ensemble's;
            ``"logits"`` the mean logits; ``"vote"`` the majority vote, in which the mean probability decides between equals; ``"mean"``
            the mean, for regression.
        output: What members return, and the ensemble, too: ``"logits"`` or ``"probabilities"``.
        class_dim: Dimension of the classes in what a member returns. If it has size 1, or there is none, the logit is that of a sigmoid.
        mode: ``"loop"`` runs one member after another, ``"vmap"`` all at once, for which they must be of one architecture. ``"auto"``
            times both at the first prediction, and keeps to the faster.

    Raises:
        ArgumentError: If an argument lies outside its domain, or the members cannot be mapped over with ``mode="vmap"``.
        TrickError: In a prediction, if a member returns no tensor, or mapping over the members gives other results than the loop.

    Shape:
        - Input: whatever the members take
        - Output: (N, ...), as one member returns it

    Note:
        Members are mapped over in evaluation mode without gradients for their weights; while they train, and in compiled and exported
        code, the loop runs. For mapping, weights of the members become views of stacked ones, which take no further memory and follow
        whatever changes the weights in place; `state_dict` gives them memory of their own again, until the next prediction, so that they
        can be saved by any library. Parameters have the keys ``members.0.…``, ``members.1.…``

    References:
        L. K. Hansen and P. Salamon, "Neural network ensembles", TPAMI, 1990.

    Example:
        >>> ensemble = Ensemble([nn.Linear(4, 3) for _ in range(5)]).eval()
        >>> ensemble(torch.randn(8, 4)).shape, ensemble.member_predictions(torch.randn(8, 4)).shape
        (torch.Size([8, 3]), torch.Size([5, 8, 3]))
        >>> ensemble[:2].uncertainty(torch.randn(8, 4)).epistemic.shape
        torch.Size([8])
    """

    def __init__(
        self,
        members: Iterable[nn.Module],
        *,
        combine: Combine = "probabilities",
        output: Output = "logits",
        class_dim: int = -1,
        mode: Literal["auto", "vmap", "loop"] = "auto",
    ) -> None:
        super().__init__()
        given = list(members) if isinstance(members, Iterable) else []
        if not given or not all(isinstance(member, nn.Module) for member in given):
            msg = f"`members` must be modules, at least one, got {members!r}."
            raise ArgumentError(msg)
        check_combination(combine, output)
        self.members = nn.ModuleList(given)
        self.combine, self.output, self.class_dim = combine, output, class_dim
        self.mode = check_choice("mode", mode, ("auto", "vmap", "loop"))
        self._faster: Literal["vmap", "loop"] | None = None
        self._stack: dict[str, Tensor] | None = None
        if mode == "vmap" and (difference := _difference(given)):
            msg = f"`mode='vmap'` must have members of one architecture, and {difference}. Pass mode='loop'."
            raise ArgumentError(msg)

    @classmethod
    def from_checkpoints(
        cls,
        paths: Iterable[str | os.PathLike[str]],
        make_module: Callable[[], nn.Module],
        *,
        combine: Combine = "probabilities",
        output: Output = "logits",
        class_dim: int = -1,
        mode: Literal["auto", "vmap", "loop"] = "auto",
    ) -> Ensemble:
        """Make an ensemble, in evaluation mode, from files of weights.

        Args:
            paths: Lightning checkpoints, whose ``state_dict`` is used, state dicts saved by ``torch.save``, or safetensors files, such as
                those of members that a callback has stored; of those of several ranks, name one.
            make_module: Makes a module that the weights fit; those of a LightningModule also fit its only submodule that holds them.
            combine: As for the class.
            output: As for the class.
            class_dim: As for the class.
            mode: As for the class.

        Returns:
            The ensemble.

        Raises:
            ArgumentError: If `paths` holds no path.
            CheckpointError: If a file cannot be read, or its weights do not fit the module.
        """
        members = []
        for path in check_paths(paths):
            member, stored = make_module(), read_state_dict(path)
            state = {plain_name(name, compiled=False): value for name, value in stored.items()}
            names = {plain_name(name, compiled=False): name for name in member.state_dict()}
            own = names.keys()
            prefixes = ["", *sorted({name.partition(".")[0] + "." for name in state})]
            fitting = (prefix for prefix in prefixes if {f"{prefix}{name}" for name in own} == {n for n in state if n.startswith(prefix)})
            prefix = next(fitting, None)
            if prefix is None:
                missing, unknown = sorted(own - state.keys()), sorted(state.keys() - own)
                msg = (
                    f"The weights in '{path}' must fit {type(member).__name__}: missing are {missing[:3]} ({len(missing)}), and "
                    f"unknown {unknown[:3]} ({len(unknown)}). Let `make_module` make the model that was saved."
                )
                raise CheckpointError(msg)
            try:
                member.load_state_dict({names[name]: state[f"{prefix}{name}"] for name in own})
            except RuntimeError as error:
                msg = f"The weights in '{path}' must fit {type(member).__name__}. Let `make_module` make the model that was saved. {error}"
                raise CheckpointError(msg) from error
            members.append(member)
        return cls(members, combine=combine, output=output, class_dim=class_dim, mode=mode).eval()

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.members)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return a member, or an ensemble of some."""
        if not isinstance(index, slice):
            return self.members[index]
        chosen = list(self.members)[index]
        part = Ensemble(chosen, combine=self.combine, output=self.output, class_dim=self.class_dim, mode=self.mode)
        part.training = self.training
        return part

    @override
    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Return the members' combined prediction."""
        predictions = self.member_predictions(*inputs, **options)
        return combine_predictions(predictions, combine=self.combine, output=self.output, class_dim=self.class_dim)

    def uncertainty(self, *inputs: Any, **options: Any) -> Uncertainty:
        """Tell how uncertain the prediction for each sample is, and how much of it is disagreement: `Uncertainty`."""
        predictions = self.member_predictions(*inputs, **options)
        return decompose_uncertainty(predictions, combine=self.combine, output=self.output, class_dim=self.class_dim)

    def member_predictions(self, *inputs: Any, **options: Any) -> Tensor:
        """Return what each member predicts, stacked along a first dimension: (M, N, ...)."""
        if not self._may_map():
            return self._loop(inputs, options)
        if self._faster is None:
            self._faster = self._choose(inputs, options)
        return self._map(inputs, options) if self._faster == "vmap" else self._loop(inputs, options)

    def to_soup(self) -> nn.Module:
        """Return one model with the mean of the members' weights; integer and boolean tensors are the first member's.

        It predicts well where the members lie in one basin of the loss, as those fine-tuned from one start often do. BatchNorm's
        statistics are those of no model after averaging: compute them anew by `refresh_batch_norm`.

        Raises:
            ArgumentError: If the members differ in their architecture.
        """
        if difference := _difference(list(self.members)):
            msg = f"A soup must have members of one architecture, and {difference}."
            raise ArgumentError(msg)
        soup, states = copy_module(self.members[0]), [member.state_dict() for member in self.members]
        means = {
            name: torch.stack([state[name].double() for state in states]).mean(0) if value.is_floating_point() else value
            for name, value in states[0].items()
        }
        soup.load_state_dict(means)
        return soup

    @override
    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        if self._stack is not None:
            with torch.inference_mode(mode=False), torch.no_grad():
                for member in self.members:
                    for name, tensor in _named_tensors(member):
                        if tensor.untyped_storage().data_ptr() == self._stack[name].untyped_storage().data_ptr():
                            tensor.data = tensor.data.clone()
            self._stack = None
        return super().state_dict(*arguments, **options)

    @override
    def extra_repr(self) -> str:
        return f"combine={self.combine!r}, output={self.output!r}, class_dim={self.class_dim}, mode={self.mode!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stack": None}  # which is made again when it is needed

    def _may_map(self) -> bool:
        if self.mode == "loop" or self._faster == "loop" or len(self.members) == 1 or torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.members.parameters()):
            return False
        return not any(module.training for module in self.members.modules() if module is not self.members)

    def _loop(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        predictions = [member(*inputs, **options) for member in self.members]
        for prediction in predictions:
            if not isinstance(prediction, Tensor):
                msg = f"Members of an Ensemble must return one tensor each, and one returned a {type(prediction).__name__}."
                raise TrickError(msg)
        shapes = {tuple(prediction.shape) for prediction in predictions}
        if len(shapes) > 1:
            msg = f"Members of an Ensemble must return tensors of one shape, and theirs are {sorted(shapes)}. Let all predict the same."
            raise TrickError(msg)
        return torch.stack(predictions)

    def _map(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        def call(weights: dict[str, Tensor]) -> Any:
            return functional_call(self.members[0], weights, inputs, options)

        predictions: Tensor = vmap(call, randomness="different")(self._stacked())
        return predictions

    def _stacked(self) -> dict[str, Tensor]:
        """Return the members' weights stacked, of which their own are views."""
        names = [dict(_named_tensors(member)) for member in self.members]
        if self._stack is None or not _are_views(self._stack, names):
            with torch.inference_mode(mode=False), torch.no_grad():
                self._stack = {name: torch.stack([tensors[name].detach() for tensors in names]) for name in names[0]}
                for name, stacked in self._stack.items():
                    for tensors, part in zip(names, stacked, strict=True):
                        tensors[name].data = part
        return self._stack

    def _choose(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Literal["vmap", "loop"]:
        """Compare the results of both ways and, unless the user chose, their times."""
        loop = self._loop(inputs, options)
        problem = _difference(list(self.members))
        if not problem:
            try:
                mapped = self._map(inputs, options)
            except RuntimeError as error:  # of an operation that cannot be mapped over
                problem = f"mapping over them failed with: {error}"
            else:
                if (mapped - loop).abs().max() > _tolerance(loop) * loop.abs().max():
                    problem = "mapping over them gives other results: they differ in more than their weights"
        if problem and self.mode == "vmap":
            msg = f"`mode='vmap'` must have members of one architecture, and {problem}. Pass mode='loop'."
            raise TrickError(msg)
        if problem or self.mode == "vmap":
            return "loop" if problem else "vmap"
        times: dict[Literal["vmap", "loop"], float] = {"vmap": float("inf"), "loop": float("inf")}
        for _ in range(_ROUNDS):
            times["loop"] = min(times["loop"], _time(lambda: self._loop(inputs, options)))
            times["vmap"] = min(times["vmap"], _time(lambda: self._map(inputs, options)))
        return "vmap" if times["vmap"] < times["loop"] else "loop"


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _are_views(stack: dict[str, Tensor], names: list[dict[str, Tensor]]) -> bool:
    """Tell whether the members' tensors still lie where the stack has them; who moves or replaces them puts them elsewhere."""
    return all(
        stack[name][i].data_ptr() == tensor.data_ptr() and stack[name].dtype == tensor.dtype
        for i, tensors in enumerate(names)
        for name, tensor in tensors.items()
    )


def _tolerance(predictions: Tensor) -> float:
    """Return how far apart, as a part of the largest, numbers may lie that differ by rounding."""
    kind = predictions.device.type
    coarse = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else predictions.dtype
    return math.sqrt(max(torch.finfo(coarse).eps, torch.finfo(predictions.dtype).eps))


def _difference(members: list[nn.Module]) -> str:
    """Tell in which way members differ in more than their weights; nothing if they do not, as far as modules show."""
    first = members[0]
    if any(module._forward_hooks or module._forward_pre_hooks for member in members for module in member.modules()):
        return "some have hooks, which mapping would not call"
    for i, member in enumerate(members[1:], 1):
        if repr(member) != repr(first):
            return f"member {i} is built differently from member 0"
        for (name, one), (_, other) in zip(_named_tensors(first), _named_tensors(member), strict=True):
            if one is other:
                return f"members 0 and {i} share {name!r}"
            if one.shape != other.shape or one.dtype != other.dtype:
                return f"{name!r} is {_kind(one)} in member 0 and {_kind(other)} in member {i}"
    return ""


def _kind(tensor: Tensor) -> str:
    return f"of {str(tensor.dtype).removeprefix('torch.')} and shape {tuple(tensor.shape)}"


def _time(compute: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    result = compute()
    if result.device.type != "cpu":
        result.flatten()[0].item()  # waits for the device
    return time.perf_counter() - start
