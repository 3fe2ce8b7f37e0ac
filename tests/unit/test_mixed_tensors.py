"""Losses of every kind at mixed and smoothed targets, and metrics that see hard ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_tricks import errors
from lightning_tricks.data._mixed_tensors import Marks, MixedTensor, mixed, seen
from lightning_tricks.data._mixing import mix_targets
from lightning_tricks.functional import mix_labels, smooth_labels
from reference import mixing as reference

CLASSES = 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25])
OWN, PARTNERS = torch.tensor([0, 3, 2, 1, 3, 0]), torch.tensor([1, 0, 3, 4, 2, 5])
OTHER = OWN[PARTNERS]
SHARES = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.0, 1.0])


def logits() -> Tensor:
    return torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0)).requires_grad_()


def smoothed(target: MixedTensor, smoothing: float) -> MixedTensor:
    target.smoothing = smoothing
    return target


def focal(x: Tensor, y: Tensor) -> Tensor:
    p = F.softmax(x, 1).gather(1, y.unsqueeze(1)).squeeze(1)
    return (-((1 - p) ** 2) * p.log()).mean()


def smoothing_by_gather(x: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(x, dim=-1)
    return (-0.9 * log_p.gather(-1, y.unsqueeze(1)).squeeze(1) - 0.1 * log_p.mean(-1)).mean()


def margin(x: Tensor, y: Tensor) -> Tensor:
    rows = torch.arange(len(y))
    return F.relu(1 - x[rows, y] + x.logsumexp(1)).pow(2).sum()


def accumulated(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(())
    for row in (0, 3):
        total += F.multi_margin_loss(x[row : row + 3], y[row : row + 3])
    loss = F.multi_margin_loss(x, y)
    loss *= 2
    return loss + total


def relabelled(x: Tensor, y: Tensor) -> Tensor:
    y = y.clone()
    y[y == 3] = -100
    return F.multi_margin_loss(x, (y - 1).abs().clamp(max=2) % 3)


def by_written_encodings(x: Tensor, y: Tensor) -> Tensor:
    """A margin as reference implementations of ArcFace have it: what `scatter_` returns is thrown away."""
    encoded = torch.zeros(x.shape)
    encoded.scatter_(1, y.view(-1, 1), 1)
    return F.cross_entropy(encoded * (x - 0.5) + (1 - encoded) * x, y)


def asymmetric(x: Tensor, y: Tensor) -> Tensor:
    own = (F.one_hot(y, CLASSES).expand_as(x) * x.softmax(1)).sum(1)
    return -((1 - own) ** 3 * own.log()).mean()


# Losses of labels, each at once for any share of the batch: λ l(ŷ, a) + (1 − λ) l(ŷ, b).
ANY = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "sum": lambda x, y: F.cross_entropy(x, y.long().view(-1), reduction="sum"),
    "none": lambda x, y: F.cross_entropy(x, y, reduction="none").mean(),
    "smoothed by itself": lambda x, y: F.cross_entropy(x, y, label_smoothing=0.2),
    "nll": lambda x, y: nn.NLLLoss()(F.log_softmax(x, 1), y.reshape(6).to(torch.int64)),
    "old arguments": lambda x, y: torch.nn.functional.cross_entropy(x, y, None, None, -100, None, "mean"),
    "weights of samples": lambda x, y: (F.cross_entropy(x, y, reduction="none") * WEIGHT[y]).sum(),
    "binary of one-hot": lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, CLASSES).float()),
    "binary of scattered": lambda x, y: F.binary_cross_entropy_with_logits(x, torch.zeros(6, CLASSES).scatter_(1, y.unsqueeze(1), 1)),
    "soft cross-entropy": lambda x, y: F.cross_entropy(x, F.one_hot(y, CLASSES).to(x.dtype)),
    "product with one-hot": lambda x, y: -(F.one_hot(y, CLASSES) * F.log_softmax(x, 1)).sum(1).mean(),
    "rows of the identity": lambda x, y: F.binary_cross_entropy_with_logits(x, torch.eye(CLASSES)[y]),
    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x[:, 0], (y % 2).float()),
    "binary as scores": lambda x, y: F.binary_cross_entropy_with_logits(x[:, :1], (y % 2).type_as(x).view_as(x[:, :1])),
    "weights of the batch": lambda x, y: F.cross_entropy(x, y, weight=1 / torch.bincount(y, minlength=CLASSES).float()),
    "bytes": lambda x, y: F.cross_entropy(x, y.byte(), weight=WEIGHT),
    "written encodings": by_written_encodings,
    "not linear in encodings": asymmetric,
    "multi-margin": F.multi_margin_loss,
    "focal": focal,
    "gathered": smoothing_by_gather,
    "margin by index": margin,
    "in place": accumulated,
    "relabelled in place": relabelled,
    "masked": lambda x, y: F.multi_margin_loss(x[y != 2], y[y != 2]),
    "of embeddings": lambda x, y: (x * F.embedding(y, x.detach().T @ x)).tanh().mean(),
    "largest": lambda x, y: (x - F.embedding(y, x)).max(1).values.mean() + 0 * (x - F.embedding(y, x)).argmax(1).sum(),
}
EACH = ["cross-entropy", "sum", "none", "smoothed by itself", "nll", "old arguments", "binary of one-hot", "binary of scattered",
        "soft cross-entropy", "product with one-hot"]  # fmt: skip
FOLLOWED = {"weights of samples", "weights of the batch", "binary", "bytes", "written encodings", "not linear in encodings"}


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("loss", ANY.values(), ids=ANY)
def test_any_loss_of_labels_is_interpolated(loss, share: float):
    x = logits()
    target = mix_targets(OWN, share, PARTNERS, Marks("MixUp()"))
    given, expected = loss(x, target), share * loss(x, OWN) + (1 - share) * loss(x, OTHER)
    assert isinstance(given, MixedTensor)
    assert type(seen(given)) is Tensor
    torch.testing.assert_close(seen(given), expected)
    assert given.item() == pytest.approx(expected.item())
    torch.testing.assert_close(gradient(given, x), gradient(expected, x))


@pytest.mark.parametrize("loss", [ANY[name] for name in EACH], ids=EACH)
def test_losses_of_known_labels_take_a_share_of_each_sample(loss):
    x = logits()
    given = loss(x, mix_targets(OWN, SHARES, PARTNERS, Marks("MixUp()")))
    alone = [mix_targets(OWN, float(share), PARTNERS, Marks("MixUp()")) for share in SHARES]
    rows = torch.stack([gradient(loss(x, each), x)[i] for i, each in enumerate(alone)])
    torch.testing.assert_close(gradient(given, x), rows)
    numbers = mix_targets(OWN % 2, SHARES, PARTNERS, Marks("MixUp()"))
    expected = F.binary_cross_entropy(x[:, 0].sigmoid(), SHARES * (OWN % 2) + (1 - SHARES) * (OTHER % 2))
    torch.testing.assert_close(seen(F.binary_cross_entropy(x[:, 0].sigmoid(), numbers.flip(0).flip(0).float())), expected)


@pytest.mark.parametrize("loss", [name for name in ANY if name not in {*EACH, *FOLLOWED}])
def test_losses_that_cannot_tell_samples_apart_are_refused(loss):
    with pytest.raises(errors.TrickError, match=r"gives each sample a share of its own.*Pass `per='batch'`"):
        ANY[loss](logits(), mix_targets(OWN, SHARES, PARTNERS, Marks("MixUp(per='sample')")))


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("share", [1.0, 0.7, SHARES])
@pytest.mark.parametrize("kind", ["cross_entropy", "nll_loss"])
def test_class_weights_and_ignored_labels_count_as_in_the_formula(kind: str, share, smoothing: float, weight):
    x, ignored = logits(), torch.tensor([0, 3, -1, 1, 3, -1])
    target = smoothed(mix_targets(ignored, share, PARTNERS, Marks("both")), smoothing)
    scores = x if kind == "cross_entropy" else F.log_softmax(x, 1)
    loss = getattr(F, kind)(scores, target, weight=weight, ignore_index=-1)
    shares = share.tolist() if isinstance(share, Tensor) else [share] * 6
    rows = []
    for own, partner, part in zip(ignored.tolist(), PARTNERS.tolist(), shares, strict=True):
        other = int(ignored[partner])
        pair = [(reference.smoothed(each, CLASSES, e) if each >= 0 else [0] * CLASSES) for each in (own, other) for e in (smoothing, 0)]
        rows.append([[part * p + (1 - part) * q for p, q in zip(pair[i], pair[i + 2], strict=True)] for i in (0, 1)])
    expected = reference.cross_entropy(x.tolist(), rows, None if weight is None else weight.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_maps_of_labels_are_mixed_pixel_by_pixel():
    x = torch.randn(6, CLASSES, 2, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.randint(CLASSES, (6, 2, 3), generator=torch.Generator().manual_seed(2))
    for share in (0.7, SHARES):
        loss = F.cross_entropy(x, mix_targets(labels, share, PARTNERS, Marks("MixUp()")))
        soft = mix_labels(labels, share, PARTNERS, classes=CLASSES).permute(0, 3, 1, 2)
        torch.testing.assert_close(seen(loss), F.cross_entropy(x, soft))


SMOOTHED = ["cross-entropy", "sum", "none", "nll", "old arguments", "binary of one-hot", "binary of scattered", "soft cross-entropy",
            "product with one-hot"]  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.6, SHARES])
@pytest.mark.parametrize("loss", SMOOTHED)
def test_labels_are_smoothed_in_losses_that_take_probabilities(loss: str, share):
    x = logits()
    given = ANY[loss](x, smoothed(mix_targets(OWN, share, PARTNERS, Marks("both")), 0.2))
    soft = mix_labels(OWN, share, PARTNERS, classes=CLASSES, smoothing=0.2)
    expected = F.binary_cross_entropy_with_logits(x, soft) if "binary" in loss else F.cross_entropy(x, soft)
    torch.testing.assert_close(seen(given), expected * (6 if loss == "sum" else 1))


def test_smoothing_alone_is_that_of_torch_to_the_bit():
    x, target = logits(), smoothed(mixed([OWN], 1.0, Marks("LabelSmoothing()"), classes=True), 0.1)
    for options in ({}, {"weight": WEIGHT, "ignore_index": 0}, {"reduction": "none"}):
        assert torch.equal(seen(F.cross_entropy(x, target, **options)), F.cross_entropy(x, OWN, label_smoothing=0.1, **options))
    assert torch.equal(
        seen(F.cross_entropy(x[target > 0], target[target > 0])), F.cross_entropy(x[OWN > 0], OWN[OWN > 0], label_smoothing=0.1)
    )
    weighed = (F.cross_entropy(x, target, reduction="none") * WEIGHT[target]).mean()
    torch.testing.assert_close(seen(weighed), (F.cross_entropy(x, OWN, reduction="none", label_smoothing=0.1) * WEIGHT[OWN]).mean())


@pytest.mark.parametrize("loss", ["gathered", "focal", "multi-margin", "binary", "margin by index", "of embeddings"])
def test_losses_whose_labels_cannot_be_smoothed_are_refused(loss: str):
    for target in (smoothed(mixed([OWN], 1.0, Marks("LabelSmoothing()"), classes=True), 0.1),
                   smoothed(mix_targets(OWN, 0.6, PARTNERS, Marks("MixUp()", "LabelSmoothing()")), 0.1)):  # fmt: skip
        with pytest.raises(errors.TrickError, match=r"LabelSmoothing\(\) smooths labels in `cross_entropy`, `nll_loss` and `one_hot`"):
            ANY[loss](logits(), target)


def test_labels_are_never_smoothed_twice():
    target = smoothed(mixed([OWN], 1.0, Marks("LabelSmoothing()"), classes=True), 0.1)
    with pytest.raises(errors.TrickError, match=r"LabelSmoothing\(\) and `cross_entropy\(label_smoothing=0.2\)`.*Remove one"):
        nn.CrossEntropyLoss(label_smoothing=0.2)(logits(), target)


def test_targets_that_are_numbers_are_mixed_themselves():
    x, y = logits(), torch.randn(6, CLASSES)
    for share in (0.7, 0.2, SHARES):
        part = share.view(6, 1) if isinstance(share, Tensor) else share
        target = mix_targets(y, share, PARTNERS, Marks("MixUp()"))
        soft = part * y + (1 - part) * y[PARTNERS]
        for loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits):
            torch.testing.assert_close(seen(loss(x, target)), loss(x, soft))
        torch.testing.assert_close(seen(F.mse_loss(x, (target - 1.5) / 2)), F.mse_loss(x, (soft - 1.5) / 2))
        larger = torch.where(torch.as_tensor(part) >= 0.5, y, y[PARTNERS])
        assert torch.equal(torch.argmax(target, 1), larger.argmax(1))  # which is plain, as a mixture has no one class
        assert type(torch.argmax(target, 1)) is Tensor


def test_a_share_is_that_of_the_labels_wherever_else_other_targets_stand():
    x, marks = logits()[:, 0], Marks("MixUp()")
    weights, positions = mix_targets(WEIGHT[OWN], 0.7, PARTNERS, marks), mix_targets(torch.arange(6), 0.7, PARTNERS, marks)
    soft = 0.7 * WEIGHT[OWN] + 0.3 * WEIGHT[OTHER]
    expected = 0.7 * (soft * (torch.arange(6) > 2) * x).sum() + 0.3 * (soft * (PARTNERS > 2) * x).sum()
    torch.testing.assert_close(seen((weights * (positions > 2) * x).sum()), expected)


# Metrics


def test_metrics_see_the_labels_of_the_larger_share():
    x, target = logits(), mix_targets(OWN, 0.3, PARTNERS, Marks("MixUp()"))
    share_of_right = (x.argmax(1) == OTHER).float().mean()
    assert (x.argmax(1) == target).float().mean().item() == share_of_right.item()
    assert target.tolist() == OTHER.tolist()
    assert [int(label) for label in target] == OTHER.tolist()
    assert (target.shape, target.dtype, len(target), str(target.device)) == ((6,), torch.int64, 6, "cpu")
    accuracy = torchmetrics.functional.accuracy(x, target, task="multiclass", num_classes=CLASSES, average="micro")
    assert accuracy.item() == share_of_right.item()
    with torch.no_grad():
        assert type(target + 1) is Tensor
        assert F.cross_entropy(x, target).item() == F.cross_entropy(x, OTHER).item()
    assert F.cross_entropy(x.detach(), target).item() == pytest.approx(F.cross_entropy(x, OTHER).item())
    each = mix_targets(OWN, SHARES, PARTNERS, Marks("MixUp(per='sample')"))
    for mixture in (target, each):
        best = torchmetrics.functional.accuracy(x, mixture, task="multiclass", num_classes=CLASSES, top_k=2, average="micro")
        assert best.item() == (x.topk(2).indices == seen(mixture).view(-1, 1)).any(1).float().mean().item()
        assert torch.unsqueeze(input=mixture, dim=1).tolist() == seen(mixture).view(-1, 1).tolist()
    counts = torch.zeros(CLASSES, dtype=torch.int64)
    counts.scatter_add_(0, target, torch.ones_like(target))
    assert counts.tolist() == torch.bincount(OTHER, minlength=CLASSES).tolist()
    assert type(counts) is Tensor


def test_what_is_kept_after_the_step_is_plain():
    first, second = Marks("MixUp()"), Marks("MixUp()")
    kept = [mix_targets(OWN, 0.9, PARTNERS, marks) for marks in (first, second)]
    assert type(torch.cat(kept)) is Tensor  # of different batches
    first.alive = False
    assert type(kept[0].view(-1)) is Tensor
    for copied in (copy.deepcopy(kept[0]), pickle.loads(pickle.dumps(kept[0]))):  # noqa: S301
        assert type(copied) is Tensor
        assert torch.equal(copied, OWN)


def test_labels_may_not_say_where_a_tensor_with_gradients_is_changed():
    x, target = logits() * 1, mix_targets(OWN, 0.9, PARTNERS, Marks("MixUp()"))
    with pytest.raises(errors.TrickError, match="changes a tensor in place by them, in `__setitem__`"):
        x[torch.arange(6), target] = x[torch.arange(6), target] - 1


def test_backward_is_that_of_the_weighed_loss():
    x, marks = logits(), Marks("MixUp()")
    loss = F.multi_margin_loss(x, mix_targets(OWN, 0.7, PARTNERS, marks))
    assert loss.requires_grad
    assert not loss.detach().requires_grad
    assert type(loss.detach()) is Tensor
    assert not marks.reached
    loss.backward()
    assert marks.reached
    torch.testing.assert_close(x.grad, gradient(0.7 * F.multi_margin_loss(x, OWN) + 0.3 * F.multi_margin_loss(x, OTHER), x))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which torch.compile looks at
def test_compiled_code_gives_the_same_loss_and_compiles_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x, y: F.cross_entropy(x.tanh(), y) + x.square().mean(), backend="aot_eager")
    x, frames = logits(), []
    for share in (0.7, 0.6, 0.9, 0.55):
        target = mix_targets(OWN, share, PARTNERS, Marks("MixUp()"))
        expected = F.cross_entropy(x.tanh(), smooth_labels(OWN, CLASSES, 0.0) * share + smooth_labels(OTHER, CLASSES, 0.0) * (1 - share))
        torch.testing.assert_close(seen(compiled(x, target)), expected + x.square().mean())
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[0] == frames[-1] > 0
