"""Tensors that stand for several at once, so that a loss is taken at mixed targets whoever computes it, and metrics see one of them.

A training step is handed labels that look like those of one image. Whatever torch function it calls on them is called on the labels of
the other image, too, and the results stay together, until gradients flow: then they are weighed. So a loss of labels becomes
``λ l(ŷ, a) + (1 − λ) l(ŷ, b)`` after one forward pass, with no knowledge of the loss. Where nothing needs gradients, and wherever values
leave torch, only the labels that are seen count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # as torch's own documentation calls it
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_tricks.data._soft_labels import CLASS_LOSSES, arguments_of, class_loss, soft_rows, weighed
from lightning_tricks.errors import TrickError

__all__ = ["Marks", "MixedTensor", "mixed", "seen"]

Share = float | Tensor | None  # λ: of a batch, of each element, or unknown

_CONVERSIONS = frozenset({"bfloat16", "byte", "cpu", "cuda", "double", "float", "half", "int", "long", "to", "type", "type_as"})
_LAYOUTS = frozenset({"__getitem__", "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "flip", "movedim",
                      "permute", "repeat", "repeat_interleave", "reshape", "reshape_as", "split", "squeeze", "transpose", "unbind",
                      "unsqueeze", "view", "view_as"})  # fmt: skip
_ALIKE = frozenset({"expand_as", "reshape_as", "to", "type_as", "view_as"})  # of whose second tensor the values do not matter
_ANEW = frozenset({"new_tensor", "rand_like", "randint_like", "randn_like"})  # of whose only tensor they do not
_ELEMENTWISE = frozenset({"__add__", "__mul__", "__radd__", "__rmul__", "__rsub__", "__sub__", "add", "mul", "rsub", "sub"})
_SCATTERS: tuple[Callable[..., Any], ...] = (Tensor.scatter_, Tensor.scatter, torch.scatter)
_IN_PLACE = frozenset(
    {"__iadd__", "__iand__", "__idiv__", "__ifloordiv__", "__imul__", "__ior__", "__isub__", "__itruediv__", "__setitem__"}
)
_ENDS: tuple[Callable[..., Any], ...] = (Tensor.backward, torch.autograd.grad, Tensor.register_hook, Tensor.retain_grad)


class Marks:
    """What is done to the targets of a batch; shared by all tensors that follow from them."""

    def __init__(self, *tricks: str) -> None:
        self.tricks = [*tricks]
        self.alive = True  # until the training step ends
        self.reached = False  # by a backward pass
        self.smoothed = False  # in a loss, or in what encodes labels


class MixedTensor(Tensor):
    """A tensor that stands for one or two others. To code that knows nothing of it, it is the one that is seen.

    Attributes:
        branches: What counts where gradients flow: the values for the targets of both images, or one that is mixed already.
        share: λ, the weight of the first of two branches.
        visible: What is seen, unless it is the first branch.
        classes: Whether these are indices of classes, which have to be mixed or smoothed yet.
        smoothing: ε of these.
        marks: What is shared by all that follows from the same batch.
    """

    branches: tuple[Tensor, ...]
    share: Share
    visible: Tensor | None
    classes: bool
    smoothing: float
    marks: Marks

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # losses are not compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _evaluate(func, args, kwargs or {})


def mixed(
    branches: Sequence[Tensor],
    share: Share,
    marks: Marks,
    *,
    visible: Tensor | None = None,
    classes: bool = False,
    smoothing: float = 0.0,
) -> MixedTensor:
    """Let one tensor stand for others of its shape."""
    shown = weighed(branches, share) if branches[0].requires_grad else branches[0] if visible is None else visible
    with torch._C.DisableTorchFunctionSubclass():
        tensor = shown.as_subclass(MixedTensor)
    tensor.branches, tensor.share, tensor.visible, tensor.marks = tuple(branches), share, visible, marks
    tensor.classes, tensor.smoothing = classes, smoothing
    return tensor


def seen(tensor: MixedTensor) -> Tensor:
    """Return what code sees that knows nothing of mixing: the labels of one image, or the value of a loss."""
    if tensor.branches[0].requires_grad:
        return weighed(tensor.branches, tensor.share)
    return tensor.branches[0] if tensor.visible is None else tensor.visible


def _evaluate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a torch function among whose arguments are mixed tensors."""
    leaves, structure = tree_flatten((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, MixedTensor)]
    marks = given[0].marks

    def call(pick: Callable[[MixedTensor], Any]) -> Any:
        arguments, options = tree_unflatten([pick(leaf) if isinstance(leaf, MixedTensor) else leaf for leaf in leaves], structure)
        return func(*arguments, **options)

    name, first = func.__name__, next(iter((*args, *kwargs.values())))
    together = all(each.marks is marks for each in given)
    unread = name in _ANEW or (name in _ALIKE and not isinstance(first, MixedTensor))
    if unread or not (together and marks.alive and torch.is_grad_enabled()):
        return call(seen)
    if func in _ENDS:
        marks.reached = True
        return call(seen)
    elsewhere = _writes_elsewhere(func, args, kwargs)
    held = [each.branches[0] if isinstance(each, MixedTensor) else each for each in ([first] if name in _ALIKE else leaves)]
    if any(isinstance(each, Tensor) and each.requires_grad for each in held):
        return _written(func, given, call) if elsewhere else _with_gradients(func, args, kwargs, given, call)
    if func in _SCATTERS or func is F.one_hot:
        encoded = _one_hot(func, args, kwargs)
        if encoded is not None:
            return encoded
    return call(seen) if elsewhere else _without_gradients(func, first, given, call)


def _writes_elsewhere(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function changes a plain tensor in place, such as the state of a metric."""
    name = func.__name__
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return "out" in kwargs or (in_place and not isinstance(args[0], MixedTensor))


def _branch(number: int) -> Callable[[MixedTensor], Tensor]:
    return lambda tensor: tensor.branches[min(number, len(tensor.branches) - 1)]


# Where nothing needs gradients: targets on their way to the loss, and metrics


def _without_gradients(func: Any, first: Any, given: Sequence[MixedTensor], call: Callable[..., Any]) -> Any:
    """Keep the results for all branches together."""
    name, marks = func.__name__, given[0].marks
    count = max(len(each.branches) for each in given)
    apart = any(each.visible is not None for each in given)  # what is seen is then no branch
    shown = call(seen)
    if not apart and name == "__setitem__":
        call(_branch(1)) if count > 1 else None
        return shown
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(shown)):
        for number in range(count) if name == "__setitem__" else ():
            call(_branch(number))
        return shown
    results = [call(_branch(number)) for number in range(count)] if apart else [shown, *(call(_branch(n)) for n in range(1, count))]
    shares = _shares(name, first, given, call, shown)
    looked_up = name == "__getitem__" and not isinstance(first, MixedTensor)  # in a table of weights, or of other classes
    follows = name in _CONVERSIONS | _LAYOUTS | _ELEMENTWISE and not looked_up
    classes, smoothing = any(each.classes for each in given), max(each.smoothing for each in given)

    def join(visible: Any, share: Any, *branches: Any) -> Any:
        if not isinstance(visible, Tensor):
            return visible
        floating = branches[0].is_floating_point()
        if (apart and not floating) or (count == 1 and branches[0].dtype == torch.bool):
            return visible  # what is mixed already is so no longer
        if classes and floating and name in _CONVERSIONS and not smoothing and share is not None:  # numbers, which are mixed
            return mixed([weighed(branches, share)], 1.0, marks, visible=visible)
        kept = follows or not (floating or branches[0].dtype == torch.bool)
        kept = kept and classes
        return mixed(branches, share, marks, visible=visible if apart else None, classes=kept, smoothing=kept * smoothing)

    return _zipped(join, shown, shares, *results)


def _shares(name: str, first: Any, given: Sequence[MixedTensor], call: Callable[..., Any], shown: Any) -> Any:
    """Return the shares of what a function returns, in its structure: those of a batch, or of its elements where they can be followed."""
    leaves, structure = tree_flatten(shown)
    apart = [each.share for each in given if len(each.branches) > 1] or [given[0].share]
    share = apart[0]
    if not isinstance(share, Tensor):
        return tree_unflatten([share] * len(leaves), structure)
    if len(given) == 1 and given[0] is first and name in _LAYOUTS:
        return call(lambda tensor: tensor.share)
    same = name in _CONVERSIONS | _ELEMENTWISE and all(each is share for each in apart)
    shares = [share.to(leaf.device) if same and isinstance(leaf, Tensor) and leaf.shape == share.shape else None for leaf in leaves]
    return tree_unflatten(shares, structure)


def _zipped(join: Callable[..., Any], *trees: Any) -> Any:
    """Map a function over the leaves of trees of one structure."""
    flat = [tree_flatten(tree) for tree in trees]
    return tree_unflatten([join(*leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


def _one_hot(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Encode classes as rows of probabilities, which are smoothed, and mixed if samples differ in their shares.

    None if what is scattered is something else.
    """
    target = None
    if func is F.one_hot:
        labels, classes = args[0], args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        count = classes if classes >= 0 else max(int(branch.max()) for branch in labels.branches) + 1
        rows, dim = [F.one_hot(branch, count) for branch in labels.branches], -1
        share = labels.share.unsqueeze(-1) if isinstance(labels.share, Tensor) else labels.share
    else:
        bound = _arguments(args, kwargs)
        target, dim, labels = bound["self"], bound["dim"], bound["index"]
        if isinstance(target, MixedTensor) or not isinstance(labels, MixedTensor) or isinstance(bound["value"], Tensor):
            return None
        rows = [torch.scatter(target, dim, branch, bound["value"]) for branch in labels.branches]
        share = labels.share if labels.shape[dim] == 1 or not isinstance(labels.share, Tensor) else None
        if func is Tensor.scatter_:
            rows[0] = target.copy_(rows[0]).view_as(target)
    smoothing, marks = labels.smoothing, labels.marks
    marks.smoothed |= smoothing > 0
    if isinstance(share, Tensor):
        encoded = mixed([soft_rows(rows, share, smoothing=smoothing, dim=dim)], 1.0, marks, visible=rows[0])
    elif smoothing:
        encoded = mixed([soft_rows([row], None, smoothing=smoothing, dim=dim) for row in rows], share, marks, visible=rows[0])
    else:
        encoded = mixed(rows, share, marks)
    return _become(target, encoded) if func is Tensor.scatter_ and type(target) is Tensor else encoded


def _become(tensor: Tensor, encoded: MixedTensor) -> Tensor:
    """Let a tensor that was changed in place, by which code may go on, stand for what the encoded one stands for."""
    tensor.__class__ = MixedTensor
    vars(tensor).update(vars(encoded))
    return tensor


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `scatter` by name."""
    names = ("self", "dim", "index", "value")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    named["self"] = named.get("self", named.get("input"))
    return {**named, "value": named.get("value", named.get("src"))}


# Where gradients flow: losses


def _with_gradients(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[MixedTensor], call: Callable[..., Any]
) -> Any:
    """Compute with the branches, and keep the results together."""
    marks = given[0].marks
    if func in CLASS_LOSSES:
        loss = _class_loss(func, args, kwargs)
        if loss is not None:
            return loss
    if any(each.classes and each.smoothing for each in given):
        msg = (
            f"{' and '.join(marks.tricks)} smooths labels in `cross_entropy`, `nll_loss` and `one_hot`, and `training_step` computes its "
            f"loss by handing them to `{func.__name__}`. Use one of these, or smooth there and remove the callback; detach what is no loss."
        )
        raise TrickError(msg)
    count = max(len(each.branches) for each in given)
    if any(len(each.branches) > 1 and not isinstance(each.share, float) for each in given):
        _refuse_shares(func, marks)
    first = call(_branch(0))
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(first)):
        return call(seen)  # numbers, what is detached, and positions of the largest
    share = next((each.share for each in given if len(each.branches) > 1), 1.0)
    results = [first, *(call(_branch(number)) for number in range(1, count))]

    def join(*branches: Any) -> Any:
        differentiable = isinstance(branches[0], Tensor) and branches[0].requires_grad
        return mixed(branches, share, marks) if differentiable else branches[0]

    return _zipped(join, *results)


def _written(func: Any, given: Sequence[MixedTensor], call: Callable[..., Any]) -> Any:
    """Write weighed losses into a plain tensor.

    Raises:
        TrickError: If labels say where, or what, and so would have to be written into two.
    """
    marks = given[0].marks
    if any(len(each.branches) > 1 and not each.branches[0].requires_grad for each in given):
        msg = (
            f"{' and '.join(marks.tricks)} lets labels stand for those of two images, and `training_step` changes a tensor in place by "
            f"them, in `{func.__name__}`. Compute its loss without changing tensors in place, such as by `torch.scatter`."
        )
        raise TrickError(msg)
    marks.reached = True  # since the tensor that is written to carries no marks
    return call(seen)


def _refuse_shares(func: Any, marks: Marks) -> None:
    msg = (
        f"{' and '.join(marks.tricks)} gives each sample a share of its own, and `training_step` computes its loss by handing labels to "
        f"`{func.__name__}`, where samples cannot be told apart. Pass `per='batch'`, or use `cross_entropy`, `nll_loss` or `one_hot`; "
        "detach what is no loss."
    )
    raise TrickError(msg)


def _class_loss(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MixedTensor | None:
    """Compute a loss with the probabilities of classes; None if its target is none of classes, or asked for in a way of old.

    Raises:
        TrickError: If both a trick and the loss itself smooth labels.
    """
    options = arguments_of(func, args, kwargs)
    scores, labels, weight = options.pop("input"), options.pop("target"), options.pop("weight")
    of_old = [options.pop(name) for name in ("size_average", "reduce")] != [None, None]
    if of_old or not isinstance(labels, MixedTensor) or labels.visible is not None or labels.branches[0].is_floating_point():
        return None
    if any(isinstance(each, MixedTensor) and len(each.branches) > len(labels.branches) for each in (scores, weight)):
        return None
    marks, smoothing, own = labels.marks, labels.smoothing, options.get("label_smoothing", 0.0)
    if smoothing and own:
        msg = (
            f"{' and '.join(marks.tricks)} and `cross_entropy(label_smoothing={own})` in `training_step` would both smooth labels. "
            "Remove one."
        )
        raise TrickError(msg)
    if smoothing and func is F.cross_entropy:
        options["label_smoothing"] = smoothing
    if len(labels.branches) > 1 and labels.share is None:
        _refuse_shares(func, marks)
    classes = [branch.long() for branch in labels.branches]
    inputs, weights = (
        [_branch(number)(each) if isinstance(each, MixedTensor) else each for number in range(len(classes))] for each in (scores, weight)
    )
    losses = class_loss(func, inputs, classes, labels.share, smoothing=smoothing, weights=weights, options=options)
    marks.smoothed |= smoothing > 0
    return mixed(losses, labels.share, marks)
