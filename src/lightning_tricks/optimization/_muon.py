"""Muon: momentum whose matrices are orthogonalized before the step.

The gradient of a weight matrix is dominated by few directions. Muon replaces the momentum of each hidden matrix by the nearest matrix
with equal singular values, found by a few iterations of Newton and Schulz, so that all directions move alike. Vectors, embeddings and
the layers at input and output are trained by AdamW.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_tricks._core.checks import check_choice, check_count, check_patterns
from lightning_tricks._core.lightning import override
from lightning_tricks._core.owners import Owned, owned_parameters, walk_parameters
from lightning_tricks._core.selection import matches
from lightning_tricks.errors import MissingPackageError, NothingMatchedError, UnsupportedOptimizerError
from lightning_tricks.optimization._groups import ParameterGroup, check_complete, check_globs, group_parameters
from lightning_tricks.optimization._implementation import implementation_options
from lightning_tricks.optimization._recipe import GroupedRecipe

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Muon", "MuonWithAdamW"]

_EPS: Final = 1e-7  # in the norm before the iterations
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)


class MuonWithAdamW(Optimizer):
    """One optimizer that steps some of its groups by Muon and the others by AdamW, as ``group["algorithm"]`` says.

    Args:
        groups: Groups of parameters, each with all options of its algorithm.
        defaults: What schedulers read as the optimizer's defaults.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        _muon_of_torch()
        super().__init__(groups, defaults)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._step_muon if group["algorithm"] == "muon" else self._step_adamw)(group, parameters)
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        changed = [*parameters, *(self.state[parameter]["momentum_buffer"] for parameter in parameters)]
        matrices = [_as_matrix(tensor) for tensor in changed]
        _muon_of_torch()(
            matrices[: len(parameters)],
            [_as_matrix(parameter.grad) for parameter in parameters if parameter.grad is not None],
            matrices[len(parameters) :],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=_COEFFICIENTS,
            ns_steps=group["ns_steps"],
            eps=_EPS,
            adjust_lr_fn=group["adjust_lr_fn"],
            has_complex=False,
        )
        for tensor, matrix in zip(changed, matrices, strict=True):
            if not tensor.is_contiguous():  # a kernel in channels-last order, of which the matrix is a copy
                tensor.copy_(matrix.view(tensor.shape))

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                device = parameter.device if group["fused"] else "cpu"  # where torch's AdamW keeps its count
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor with one row for each output: a view, where the order in memory allows one."""
    return tensor.reshape(tensor.shape[0], -1)


def _muon_of_torch() -> Any:
    if not hasattr(torch.optim, "Muon"):
        msg = f"Muon needs torch 2.9 or newer, found torch {torch.__version__}: `pip install 'torch>=2.9'`."
        raise MissingPackageError(msg)
    return import_module("torch.optim._muon").muon


def _ends(model: nn.Module) -> set[int]:
    """Return the parameters, by identity, of the layers at input and output.

    The input is at the embeddings, which are no matrices, or else at the first matrix. The output is at what models of timm and
    transformers call so, or else at the last matrix.
    """
    weights = [(id(parameter), kind) for _, parameter, kind in walk_parameters(model) if kind in {"matrix", "embedding"}]
    named = [
        getattr(module, ask)() for module in model.modules() for ask in ("get_classifier", "get_output_embeddings") if _answers(module, ask)
    ]
    heads = [head for each in named for head in (each if isinstance(each, tuple | list) else [each]) if isinstance(head, nn.Module)]
    ends = {id(parameter) for head in heads for parameter in head.parameters()}
    if weights and not any(kind == "embedding" for _, kind in weights):
        ends.add(weights[0][0])
    if weights and ends.isdisjoint(parameter for parameter, _ in weights[1:]):
        ends.add(weights[-1][0])
    return ends


def _answers(module: nn.Module, method: str) -> bool:
    return callable(getattr(type(module), method, None))


@dataclass(frozen=True, repr=False)
class Muon(GroupedRecipe):
    """Muon for hidden matrices, AdamW for the rest, in one optimizer.

    ``m ← μm + (1 − μ)g``, ``o = NS(g + μ(m − g))``, ``w ← w(1 − ηλ) − η·s·o``, where NS sets all singular values of a matrix close to 1,
    and s is its size's factor. Kernels of convolutions count as matrices with one row for each output channel.

    AdamW trains what is no matrix to its owner, the layer at the input (the embeddings or, without any, the first matrix), and the
    layer at the output: what the model itself calls its classifier or output embeddings (`get_classifier`, `get_output_embeddings`), or
    else the last matrix. What else it shall train, such as further heads, is named by `exclude`.

    Args:
        lr: Learning rate η of Muon, at least 0.
        momentum: Share μ of the old momentum that is kept, in [0, 1).
        nesterov: Look one step of momentum ahead; without it, o = NS(m).
        weight_decay: Factor λ of Muon, at least 0; a step with rate η takes the share ηλ off the weights.
        ns_steps: Iterations of Newton and Schulz, from 1 to 99.
        adjust_lr_fn: The factor s of a matrix with a rows and b columns: ``"original"``, ``√max(1, a/b)``; ``"match_rms_adamw"``,
            ``0.2·√max(a, b)``, with which learning rate and decay found for AdamW fit.
        adamw_lr: Learning rate of AdamW, at least 0.
        betas: Shares β₁ and β₂ of AdamW, each in [0, 1).
        eps: Term ε of AdamW, at least 0.
        adamw_weight_decay: Factor λ of AdamW, at least 0; as elsewhere, matrices decay and nothing else, here the layers at input
            and output.
        exclude: Globs over qualified names of matrices that AdamW trains.

    Every other argument is one of `GroupedRecipe`; `implementation` is that of AdamW. In `overrides`, ``lr`` and ``weight_decay`` are
    those of the algorithm that trains a parameter, and ``betas`` and ``eps`` those of AdamW.

    Raises:
        ArgumentError: If an argument lies outside its domain.
        MissingPackageError: When building, if torch is older than 2.9.
        NothingMatchedError: When building, if there is no hidden matrix.
        UnsupportedOptimizerError: When building, if a hidden matrix is complex, or was flattened or emptied by FSDP1 or DeepSpeed's
            stage 3.

    References:
        - K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
        - J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982, 2025, for ``"match_rms_adamw"``.

    Example:
        >>> Muon(lr=0.02, exclude="aux_head")
        Muon(exclude=('aux_head',))
    """

    lr: float = 0.02
    _: KW_ONLY
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    ns_steps: int = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    adamw_lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    adamw_weight_decay: float = 0.01
    exclude: str | Sequence[str] = ()

    domains: ClassVar[Mapping[str, str | tuple[str, str]]] = {"momentum": "[0, 1)", "betas": ("[0, 1)", "[0, 1)"), "ns_steps": "[1, 99]"}

    @override
    def __post_init__(self) -> None:
        check_choice("adjust_lr_fn", self.adjust_lr_fn, ("original", "match_rms_adamw"))
        self._set("ns_steps", check_count("ns_steps", self.ns_steps))
        patterns = check_patterns("exclude", self.exclude, empty=True)
        self._set("exclude", (patterns,) if isinstance(patterns, str) else patterns)
        self._check("adamw_lr", "[0, ∞)")
        self._check("adamw_weight_decay", "[0, ∞)")
        super().__post_init__()

    @property
    @override
    def optimizer(self) -> Callable[..., Optimizer]:
        return torch.optim.AdamW  # whose kernels may be chosen

    @property
    @override
    def defaults(self) -> dict[str, Any]:
        own = {"exclude", "adamw_lr", "adamw_weight_decay"}
        return {name: value for name, value in super().defaults.items() if name not in own}

    def _options(self, *, muon: bool) -> dict[str, Any]:
        """Return the options of a group; each has those of both algorithms, as schedulers of momentum expect."""
        adamw = {} if muon else {"lr": self.adamw_lr, "weight_decay": self.adamw_weight_decay}
        return {**self.defaults, **adamw, "algorithm": "muon" if muon else "adamw"}

    @override
    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        everything = owned_parameters(model)
        check_globs("exclude", self.exclude, everything, "Muon")
        hidden = self._hidden(model, everything)
        for owned in everything:
            if id(owned.parameter) in hidden and not is_lazy(owned.parameter) and owned.parameter.ndim < 2:
                msg = f"Muon needs whole matrices, and {owned.names[0]!r} was flattened or emptied. Use DDP, FSDP2 or one device."
                raise UnsupportedOptimizerError(msg)
            if id(owned.parameter) in hidden and owned.parameter.is_complex():
                msg = f"Muon orthogonalizes real matrices, and {owned.names[0]!r} is complex. Name it in `exclude`."
                raise UnsupportedOptimizerError(msg)
        return group_parameters(
            model,
            lambda owned: self._options(muon=id(owned.parameter) in hidden),
            decayed=self.decayed,
            overrides=self.overrides,
            layer_decay=self.layer_decay,
            layers=self.layers,
            who="Muon",
        )

    def _hidden(self, model: nn.Module, everything: Sequence[Owned]) -> set[int]:
        """Return the parameters, by identity, that Muon trains."""
        ends = _ends(model)
        hidden = {
            id(owned.parameter)
            for owned in everything
            if owned.kind == "matrix"
            and owned.parameter.requires_grad
            and id(owned.parameter) not in ends
            and not any(matches(name, self.exclude) for name in owned.names)
        }
        if not hidden:
            msg = f"Muon found no trainable hidden matrix in {type(model).__name__} between the layers at input and output. Use AdamW."
            raise NothingMatchedError(msg)
        return hidden

    @override
    def build(self, model: nn.Module) -> Optimizer:
        kernels = {"foreach": None, "fused": None, **implementation_options(self.optimizer, model, self.implementation)}
        groups = [{**group.as_dict(), **kernels} for group in self.groups(model)]
        optimizer = MuonWithAdamW(groups, {**self._options(muon=True), **kernels})
        check_complete(optimizer, model)
        return optimizer
