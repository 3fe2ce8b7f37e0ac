"""Functions that mix samples and labels, against their papers and timm."""

from __future__ import annotations

import pytest
import torch

from lightning_tricks import errors
from lightning_tricks.data._mixed_tensors import Marks
from lightning_tricks.data._mixing import mix_targets
from lightning_tricks.functional import cut_mix, cut_mix_box, mix_labels, mix_up, smooth_labels
from reference import mixing as reference

PARTNERS = torch.tensor([2, 0, 1, 3])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, [0.1, 0.9, 0.5, 0.0]])
def test_mix_up_is_that_of_the_paper(share):
    x = torch.randn(4, 6, dtype=torch.float64)
    shares = share if isinstance(share, list) else [share] * 4
    expected = reference.mixed_up(x.tolist(), shares, PARTNERS.tolist())
    given = torch.tensor(share, dtype=torch.float64) if isinstance(share, list) else share
    torch.testing.assert_close(mix_up(x, given, PARTNERS), torch.tensor(expected, dtype=torch.float64))
    folded = mix_up(x.view(4, 2, 3, 1), given, PARTNERS)
    assert torch.equal(folded.view(4, 6), mix_up(x, given, PARTNERS))


def test_boxes_are_those_of_the_paper_wherever_they_are_cut_off():
    for share in (0.0, 0.05, 0.4, 0.75, 0.99, 1.0):
        for row in range(7):
            for column in range(5):
                box, left_over = cut_mix_box(7, 5, share, (row, column))
                area = (box[1] - box[0]) * (box[3] - box[2])
                expected = reference.box_of(7, 5, share, row, column)
                assert area == 0 == (expected[1] - expected[0]) * (expected[3] - expected[2]) or box == expected
                assert left_over == 1 - area / 35


def test_cut_mix_is_that_of_the_paper_with_one_box_or_one_for_each():
    images = torch.arange(4 * 7 * 5).view(4, 7, 5)
    boxes = [cut_mix_box(7, 5, share, center)[0] for share, center in ((0.5, (3, 2)), (0.1, (0, 0)), (0.99, (6, 4)), (0.7, (6, 0)))]
    expected, shares = reference.cut_mixed(images.tolist(), boxes, PARTNERS.tolist())
    assert torch.equal(cut_mix(images, boxes, PARTNERS), torch.tensor(expected))
    assert shares == pytest.approx([1 - (box[1] - box[0]) * (box[3] - box[2]) / 35 for box in boxes])
    channels = images.unsqueeze(1).expand(4, 3, 7, 5)
    assert torch.equal(cut_mix(channels, boxes, PARTNERS)[:, 2], torch.tensor(expected))
    for box in boxes:
        expected, _ = reference.cut_mixed(images.tolist(), [box] * 4, PARTNERS.tolist())
        assert torch.equal(cut_mix(images, box, PARTNERS), torch.tensor(expected))
    assert torch.equal(images, torch.arange(4 * 7 * 5).view(4, 7, 5))  # as it was


def test_labels_are_smoothed_and_mixed_as_in_the_papers():
    labels = torch.tensor([0, 3, 1, 4])
    smooth = torch.tensor([reference.smoothed(label, 5, 0.2) for label in labels.tolist()])
    torch.testing.assert_close(smooth_labels(labels, 5, 0.2), smooth)
    torch.testing.assert_close(smooth_labels(labels.view(2, 2), 5, 0.2), smooth.view(2, 2, 5))
    assert torch.equal(smooth_labels(labels, 5, 0.0), torch.eye(5)[labels])
    expected = torch.tensor(reference.mixed_up(smooth.tolist(), [0.3] * 4, PARTNERS.tolist()))
    torch.testing.assert_close(mix_labels(labels, 0.3, PARTNERS, classes=5, smoothing=0.2), expected)


def test_what_is_seen_of_a_pair_has_the_larger_share():
    labels, partners = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    for share, expected in ((0.7, [0, 1, 2]), (0.3, [1, 2, 0]), (torch.tensor([0.7, 0.3, 0.5]), [0, 2, 2])):
        assert mix_targets(labels, share, partners, Marks()).tolist() == expected
        assert mix_targets(labels.float(), share, partners, Marks()).tolist() == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mix_up(torch.ones(2, 1), 1.5, torch.tensor([1, 0])), "`share` must lie in [0, 1], got 1.5."),
        (lambda: cut_mix_box(8, 8, -0.1, (0, 0)), "`share` must lie in [0, 1], got -0.1."),
        (lambda: cut_mix_box(0, 8, 0.1, (0, 0)), "`height` must be a whole number of at least 1, got 0."),
        (lambda: cut_mix(torch.ones(2, 3), (0, 1, 0, 1), torch.tensor([1, 0])), "got a tensor of shape (2, 3)."),
        (lambda: smooth_labels(torch.tensor([0]), 3, 1.1), "`smoothing` must lie in [0, 1], got 1.1."),
        (lambda: smooth_labels(torch.tensor([0]), 0), "`classes` must be a whole number of at least 1, got 0."),
    ],
)
def test_wrong_arguments_of_functions_are_named(call, words):
    with pytest.raises(errors.ArgumentError) as raised:
        call()
    assert words in str(raised.value)


# timm, whose partners are all rows in reverse


@pytest.mark.full
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_timm_gives_the_same_numbers(mode: str, cut: bool, correct: bool, smoothing: float):
    import numpy as np
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    torch.manual_seed(0)
    images, labels, logits = torch.randn(6, 3, 10, 12), torch.randint(5, (6,)), torch.randn(6, 5, requires_grad=True)
    flipped = torch.arange(5, -1, -1)
    given = {"batch": 0.3, "pair": [0.8, 0.3, 0.55], "elem": [0.8, 0.3, 0.55, 0.1, 0.9, 0.45]}[mode]
    theirs = Mixup(cutmix_alpha=float(cut), mode=mode, label_smoothing=smoothing, num_classes=5, correct_lam=correct)
    theirs._params_per_batch = lambda: (given, cut)
    theirs._params_per_elem = lambda count: (np.array(given, dtype=np.float32), np.full(count, cut))
    np.random.seed(0)  # noqa: NPY002  # timm draws boxes from NumPy's global state
    expected, soft = theirs(images.clone(), labels)

    np.random.seed(0)  # noqa: NPY002
    shares = [given] if mode == "batch" else given
    centers = [tuple(np.random.randint(0, size) for size in (10, 12)) for _ in shares] if cut else []  # noqa: NPY002
    drawn = [cut_mix_box(10, 12, share, center) for share, center in zip(shares, centers, strict=cut)] if cut else []
    corrected = [share for _, share in drawn] if cut and correct else shares
    mirror = [*range(len(shares)), *reversed(range(len(shares)))] if mode == "pair" else range(len(shares))
    share = corrected[0] if mode == "batch" else torch.tensor([corrected[i] for i in mirror])
    if cut:
        ours = cut_mix(images, drawn[0][0] if mode == "batch" else [drawn[i][0] for i in mirror], flipped)
    else:
        ours = mix_up(images, share, flipped)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mix_labels(labels, share, flipped, classes=5, smoothing=smoothing), soft, rtol=1e-6, atol=1e-7)

    target = mix_targets(labels, share, flipped, Marks("ours"))
    target.smoothing = smoothing
    loss = torch.nn.functional.cross_entropy(logits, target)
    reference_loss = SoftTargetCrossEntropy()(logits, soft)
    torch.testing.assert_close(loss.detach(), reference_loss.detach())
    torch.testing.assert_close(*(torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, reference_loss)))
