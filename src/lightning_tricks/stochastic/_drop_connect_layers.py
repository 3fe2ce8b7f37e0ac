"""Layers whose weights are dropped at random while they train, to be built into a model like torch's own.

They have the keys, the parameters and the ancestry of torch's layers. Each forward pass draws anew, by one number of torch's generator,
as ``nn.Dropout`` does: seeds, checkpoints of the random state and activation checkpointing hold for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tricks._core.checks import check_choice, check_count, check_in_interval
from lightning_tricks.errors import ArgumentError
from lightning_tricks.stochastic._weight_dropping import Granularity, Inference, WeightDropping, activated, masked_names
from lightning_tricks.stochastic._weight_masks import Rate

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DropConnectConv1d",
    "DropConnectConv2d",
    "DropConnectConv3d",
    "DropConnectEmbedding",
    "DropConnectGRU",
    "DropConnectLSTM",
    "DropConnectLinear",
    "DropConnectMultiheadAttention",
    "DropsWeights",
]

_Size = int | tuple[int, ...]


class DropsWeights:
    """What these layers share, beside the layer of torch's own from which each inherits."""

    base: ClassVar[type[nn.Module]]
    activation: Callable[[Tensor], Tensor] | None

    def _begin(
        self,
        rate: float,
        granularity: Granularity,
        inference: Inference,
        *,
        mask_bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        draws: int = 1,
    ) -> None:
        assert isinstance(self, nn.Module)
        product = issubclass(self.base, nn.Linear | nn.modules.conv._ConvNd)
        check_in_interval("rate", rate, "[0, 1)")
        check_choice("granularity", granularity, ("batch", "example"))
        check_choice("inference", inference, ("mean", "gaussian", "sample") if product else ("mean", "sample"))
        if inference == "gaussian" and activation is None:
            kind = type(self).__name__
            msg = (
                f"`inference='gaussian'` averages after the activation, and {kind} was given none. Pass `activation=nn.ReLU()`, or another."
            )
            raise ArgumentError(msg)
        weights, biases = masked_names(self)
        self.activation = activation
        self._dropping = WeightDropping(
            self,
            type(self).__name__,
            {name: i for i, name in enumerate((*weights, *(biases if mask_bias else ())))},
            Rate(rate),
            clock=None,
            owner=type(self).__name__,
            granularity=granularity,
            inference=inference,
            draws=check_count("draws", draws),
            base=self.base,
        )

    @property
    def rate(self) -> float:
        """The probability of dropping, which may be set at any time: compiled code follows."""
        return float(self._dropping.rate.now)

    @rate.setter
    def rate(self, value: float) -> None:
        self._dropping.rate.set(check_in_interval("rate", value, "[0, 1)"))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute what the layer of torch's own computes, with masked weights."""
        output = self._dropping(*arguments, **options)
        return output if self.activation is None else activated(self.activation, output)

    def extra_repr(self) -> str:
        """Return what stands in the layer's `repr`."""
        text: str = super().extra_repr()  # type: ignore[misc]
        return ", ".join(filter(None, (text, f"rate={self.rate:g}")))


class DropConnectLinear(DropsWeights, nn.Linear):
    """A linear layer whose weights are dropped at random in training: ``y = a((W∘M/(1 − p))x + b)``, where M is 0 with probability p.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether a bias is added.
        rate: Probability p of dropping a weight, in [0, 1).
        granularity: ``"batch"`` draws one mask for the batch, ``"example"`` one for each element of the input's first dimension.
        inference: What evaluation computes: ``"mean"`` with W; ``"gaussian"`` the mean of ``a(u)`` over draws of
            ``u ~ N(Wx + b, p/(1 − p) · (W∘W)(x∘x))``; ``"sample"`` with masks, as in training.
        mask_bias: Whether the bias is masked, too, as in the paper.
        activation: The activation a, applied to the output; None = none. ``"gaussian"`` needs it.
        draws: Number of draws of ``"gaussian"``.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: ``(N, *, in_features)``
        - Output: ``(N, *, out_features)``

    Raises:
        ArgumentError: If an argument lies outside its domain, or ``"gaussian"`` has no activation.

    References:
        L. Wan, M. Zeiler, S. Zhang, Y. LeCun and R. Fergus, "Regularization of Neural Networks using DropConnect", ICML, 2013. Differs
        from it in scaling by ``1/(1 − p)`` in training rather than by ``1 − p`` in evaluation.

    Example:
        >>> layer = DropConnectLinear(3, 2, rate=0.5)
        >>> layer
        DropConnectLinear(in_features=3, out_features=2, bias=True, rate=0.5)
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """

    base = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rate: float = 0.5,
        granularity: Granularity = "batch",
        inference: Inference = "mean",
        mask_bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        draws: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._begin(rate, granularity, inference, mask_bias=mask_bias, activation=activation, draws=draws)


class _DropConnectConv(DropsWeights):
    def __init__(  # noqa: PLR0917, positions are those of torch
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size | str = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        rate: float = 0.5,
        granularity: Granularity = "batch",
        inference: Inference = "mean",
        mask_bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        draws: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer: Any = self.base
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        layer.__init__(self, *sizes, bias=bias, padding_mode=padding_mode, device=device, dtype=dtype)
        self._begin(rate, granularity, inference, mask_bias=mask_bias, activation=activation, draws=draws)


class DropConnectConv1d(_DropConnectConv, nn.Conv1d):
    """A convolution over one dimension whose weights are dropped at random in training.

    Arguments up to `padding_mode` are those of ``nn.Conv1d``, the others those of `DropConnectLinear`.

    Example:
        >>> DropConnectConv1d(3, 2, 5, rate=0.1)
        DropConnectConv1d(3, 2, kernel_size=(5,), stride=(1,), rate=0.1)
    """

    base = nn.Conv1d


class DropConnectConv2d(_DropConnectConv, nn.Conv2d):
    """A convolution over two dimensions whose weights are dropped at random in training.

    Arguments up to `padding_mode` are those of ``nn.Conv2d``, the others those of `DropConnectLinear`.

    Example:
        >>> DropConnectConv2d(3, 2, 5, rate=0.1)
        DropConnectConv2d(3, 2, kernel_size=(5, 5), stride=(1, 1), rate=0.1)
    """

    base = nn.Conv2d


class DropConnectConv3d(_DropConnectConv, nn.Conv3d):
    """A convolution over three dimensions whose weights are dropped at random in training.

    Arguments up to `padding_mode` are those of ``nn.Conv3d``, the others those of `DropConnectLinear`.

    Example:
        >>> DropConnectConv3d(3, 2, 5, rate=0.1)
        DropConnectConv3d(3, 2, kernel_size=(5, 5, 5), stride=(1, 1, 1), rate=0.1)
    """

    base = nn.Conv3d


class DropConnectLSTM(DropsWeights, nn.LSTM):
    """An LSTM whose recurrent weights are dropped at random in training, one mask for all steps: the weight-dropped LSTM.

    Arguments up to `proj_size` are those of ``nn.LSTM``.

    Args:
        input_size: Size of each input.
        hidden_size: Size of the state.
        num_layers: Number of layers.
        bias: Whether biases are added.
        batch_first: Whether the batch comes first.
        dropout: Rate of dropout between layers.
        bidirectional: Whether it runs both ways.
        proj_size: Size of a projection of the state; 0 = none.
        rate: Probability p of dropping a recurrent weight, in [0, 1).
        granularity: ``"batch"`` draws one mask for the batch, ``"example"`` one for each example, which then run one after another.
        inference: What evaluation computes: ``"mean"`` with W, ``"sample"`` with masks.
        device: Where the parameters are made.
        dtype: Their dtype.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        S. Merity, N. S. Keskar and R. Socher, "Regularizing and Optimizing LSTM Language Models", ICLR, 2018.

    Example:
        >>> DropConnectLSTM(3, 2, batch_first=True, rate=0.5)
        DropConnectLSTM(3, 2, batch_first=True, rate=0.5)
    """

    base = nn.LSTM

    def __init__(  # noqa: PLR0917, positions are those of torch
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        rate: float = 0.5,
        granularity: Granularity = "batch",
        inference: Inference = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        nn.LSTM.__init__(self, *sizes, device=device, dtype=dtype)
        self._begin(rate, granularity, inference)


class DropConnectGRU(DropsWeights, nn.GRU):
    """A GRU whose recurrent weights are dropped at random in training, one mask for all steps.

    Arguments up to `bidirectional` are those of ``nn.GRU``, the others those of `DropConnectLSTM`.

    Example:
        >>> DropConnectGRU(3, 2, batch_first=True, rate=0.5)
        DropConnectGRU(3, 2, batch_first=True, rate=0.5)
    """

    base = nn.GRU

    def __init__(  # noqa: PLR0917, positions are those of torch
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rate: float = 0.5,
        granularity: Granularity = "batch",
        inference: Inference = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        nn.GRU.__init__(self, *sizes, device=device, dtype=dtype)
        self._begin(rate, granularity, inference)


class DropConnectMultiheadAttention(DropsWeights, nn.MultiheadAttention):
    """Attention whose projections, those into it and that out of it, have weights dropped at random in training.

    Arguments up to `batch_first` are those of ``nn.MultiheadAttention``, the others those of `DropConnectLSTM`.

    Example:
        >>> attention = DropConnectMultiheadAttention(4, 2, batch_first=True, rate=0.1)
        >>> attention.rate
        0.1
    """

    base = nn.MultiheadAttention

    def __init__(  # noqa: PLR0917, positions are those of torch
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        rate: float = 0.5,
        granularity: Granularity = "batch",
        inference: Inference = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first)
        nn.MultiheadAttention.__init__(self, *sizes, device=device, dtype=dtype)
        self._begin(rate, granularity, inference)


class DropConnectEmbedding(DropsWeights, nn.Embedding):
    """An embedding whose single numbers, not whole rows, are dropped at random in training; a word that recurs is masked alike.

    Arguments up to `sparse` are those of ``nn.Embedding``, the others those of `DropConnectLSTM`.

    Example:
        >>> DropConnectEmbedding(10, 3, rate=0.1)
        DropConnectEmbedding(10, 3, rate=0.1)
    """

    base = nn.Embedding

    def __init__(  # noqa: PLR0917, positions are those of torch
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        rate: float = 0.5,
        granularity: Granularity = "batch",
        inference: Inference = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        nn.Embedding.__init__(self, *sizes, device=device, dtype=dtype)
        self._begin(rate, granularity, inference)
