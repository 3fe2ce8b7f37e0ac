"""Measures of several members' predictions over a data set."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassCalibrationError

from lightning_tricks.ensembling._combining import combine_predictions
from lightning_tricks.ensembling._measures import EnsembleMeasures, brier_score, disagreement, diversity
from lightning_tricks.errors import ArgumentError
from reference import ensembles as reference

MEMBERS, SAMPLES, CLASSES = 5, 40, 4
LOGITS = torch.randn(MEMBERS, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
TARGET = torch.randint(CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(1))
COLUMNS = [LOGITS[:, i].tolist() for i in range(SAMPLES)]
PROBABILITIES = [reference.mean_probabilities(column) for column in COLUMNS]


def measured(*batches, **options):
    measures = EnsembleMeasures(**options)
    for batch in batches:
        measures.update(*batch)
    return {name: value.item() for name, value in measures.compute().items()}


def expected():
    """Return what the formulas say of the logits above."""
    parts = [reference.uncertainty(column) for column in COLUMNS]
    targets = TARGET.tolist()
    sums = {
        "disagreement": sum(map(reference.disagreement, COLUMNS)),
        "diversity": sum(map(reference.diversity, COLUMNS)),
        "predictive_entropy": sum(total for total, _, _ in parts),
        "mutual_information": sum(epistemic for _, _, epistemic in parts),
        "nll": sum(-math.log(p[t]) for p, t in zip(PROBABILITIES, targets, strict=True)),
        "brier": sum(reference.brier_score(p, t) for p, t in zip(PROBABILITIES, targets, strict=True)),
    }
    error = reference.calibration_error(PROBABILITIES, targets, 15)
    return {**{name: total / SAMPLES for name, total in sums.items()}, "calibration_error": error}


def test_functions_equal_their_formulas():
    found = {"disagreement": disagreement(LOGITS), "diversity": diversity(LOGITS)}
    for name, values in found.items():
        exact = [getattr(reference, name)(column) for column in COLUMNS]
        torch.testing.assert_close(values, torch.tensor(exact, dtype=torch.float64))
    scores = brier_score(combine_predictions(LOGITS), TARGET)
    exact = [reference.brier_score(p, t) for p, t in zip(PROBABILITIES, TARGET.tolist(), strict=True)]
    torch.testing.assert_close(scores, torch.tensor(exact, dtype=torch.float64))


def test_measures_equal_their_formulas_however_the_batches_are_cut():
    cut = [(LOGITS[:, rows], TARGET[rows]) for rows in (slice(0, 3), slice(3, 3), slice(3, 30), slice(30, None))]
    for found in (measured((LOGITS, TARGET)), measured(*cut)):
        assert found == pytest.approx(expected(), rel=1e-5)


def test_probabilities_and_maps_give_what_logits_give():
    maps = LOGITS.unflatten(1, (2, 4, 5)).movedim(-1, 2)
    assert measured((LOGITS.softmax(-1), TARGET), output="probabilities") == pytest.approx(expected(), rel=1e-5)
    assert measured((maps, TARGET.reshape(2, 4, 5)), class_dim=1) == pytest.approx(expected(), rel=1e-5)
    assert disagreement(maps, class_dim=1).shape == diversity(maps, class_dim=-3).shape == (2, 4, 5)


@pytest.mark.parametrize("shape", [(40,), (40, 1), (8, 1, 5)])
@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_one_logit_is_that_of_two_classes(shape, output):
    ones, target = LOGITS[..., 0], TARGET % 2
    pairs = torch.stack([torch.zeros_like(ones), ones], -1)
    given = (ones if output == "logits" else ones.sigmoid()).reshape(MEMBERS, *shape)
    options = {"output": output, "class_dim": 1 if len(shape) == 3 else -1}
    for classes in (target.reshape(shape), target.reshape(shape).float(), target.reshape([size for size in shape if size != 1])):
        assert measured((given, classes), **options) == pytest.approx(measured((pairs, target)), rel=1e-5)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "vote"])
def test_the_combined_prediction_is_measured(combine):
    together = combine_predictions(LOGITS, combine=combine)
    found = measured((LOGITS, TARGET), combine=combine)
    assert found["nll"] == pytest.approx(cross_entropy(together, TARGET).item(), rel=1e-5)
    assert found["brier"] == pytest.approx(brier_score(together, TARGET).mean().item(), rel=1e-5)
    theirs = MulticlassCalibrationError(CLASSES, n_bins=15)(together.softmax(-1).float(), TARGET)
    assert found["calibration_error"] == pytest.approx(theirs.item(), rel=1e-4)


def test_calibration_is_that_of_the_epoch_also_of_full_confidence():
    """The mean over batches is biased, and logits of a batch that lie in [0, 1] are no probabilities."""
    mixed = torch.cat([LOGITS, 90 * LOGITS, 0.1 * LOGITS.sigmoid()], 1).float()
    target = TARGET.repeat(3)
    measures, apart = EnsembleMeasures(bins=7), []
    for i in range(0, 120, 8):
        batch = (mixed[:, i : i + 8], target[i : i + 8])
        measures.update(*batch)
        apart.append(measured(batch, bins=7)["calibration_error"])
    probabilities = combine_predictions(mixed).softmax(-1).tolist()
    exact = reference.calibration_error(probabilities, target.tolist(), 7)  # no multiple of a fifth is a border
    assert measures.compute()["calibration_error"].item() == pytest.approx(exact, rel=1e-5)
    assert sum(apart) / len(apart) > 1.3 * exact


def test_diversity_is_what_the_ensemble_gains():
    numbers = LOGITS[..., :2] - TARGET[:, None]
    found = measured((numbers, LOGITS[0, :, 2:]), combine="mean")
    apart = (numbers - LOGITS[0, :, 2:]).square().mean().item()
    assert found == pytest.approx({"variance": numbers.var(0, unbiased=False).mean().item(), "mse": apart - found["variance"]}, rel=1e-5)
    scores = torch.stack([brier_score(member, TARGET) for member in LOGITS]).mean(0)
    torch.testing.assert_close(brier_score(combine_predictions(LOGITS), TARGET), scores - diversity(LOGITS))


def test_targets_that_are_ignored_or_absent_count_nothing():
    masked = torch.where(torch.arange(SAMPLES) < 30, TARGET, 255)
    part = (LOGITS[:, :30], TARGET[:30])
    assert measured((LOGITS, masked), ignore_index=255) == pytest.approx(measured(part))
    assert measured((LOGITS, torch.where(masked == 255, -100, masked))) == pytest.approx(measured(part))
    names = ["disagreement", "diversity", "predictive_entropy", "mutual_information"]
    assert list(measured((LOGITS,))) == names
    mixed = measured(part, (LOGITS[:, 30:],))
    assert mixed["nll"] == pytest.approx(measured(part)["nll"])
    assert mixed["diversity"] == pytest.approx(expected()["diversity"], rel=1e-5)


def test_one_member_neither_disagrees_nor_differs():
    found = measured((LOGITS[:1], TARGET))
    assert found["disagreement"] == found["diversity"] == 0
    assert found["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert found["nll"] == pytest.approx(cross_entropy(LOGITS[0], TARGET).item(), rel=1e-5)


def test_certain_and_impossible_classes_stay_finite():
    certain = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    for given, output in ((certain, "probabilities"), (certain.log(), "logits")):
        found = measured((given, torch.tensor([1])), output=output)
        assert found == pytest.approx(
            {
                "disagreement": 1,
                "diversity": 0.5,
                "predictive_entropy": math.log(2),
                "mutual_information": math.log(2),
                "nll": math.log(2),
                "brier": 0.5,
                "calibration_error": 0.5,
            }
        )
        assert measured((given, torch.tensor([2])), output=output)["nll"] == math.inf  # which it is
    agreed = measured((certain[:1, :, :2].expand(3, -1, -1), torch.tensor([0])), output="probabilities")
    assert set(agreed.values()) == {0.0}


def test_half_precision_is_measured_in_single():
    half = LOGITS.bfloat16()
    assert measured((half, TARGET)) == pytest.approx(measured((half.float(), TARGET)), rel=1e-5)
    assert measured((half,), combine="mean") == pytest.approx(measured((half.float(),), combine="mean"), rel=1e-5)


def test_nothing_measured_is_no_number():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert all(math.isnan(value) for value in measured().values())
    assert math.isnan(measured((LOGITS[:, :0], TARGET[:0]))["disagreement"])


def test_ranks_add_their_sums():
    halves = [EnsembleMeasures(), EnsembleMeasures()]
    halves[0].update(LOGITS[:, :10], TARGET[:10])
    halves[1].update(LOGITS[:, 10:], TARGET[10:])
    states = [[half.count, half.sums, half.labelled, half.labelled_sums, half.bin_sums] for half in halves]
    for half in halves:
        gathered = iter(zip(*states, strict=True))
        half.distributed_available_fn = lambda: True
        half.dist_sync_fn = lambda state, group, gathered=gathered: list(next(gathered))  # in the order in which states were added
        assert {name: value.item() for name, value in half.compute().items()} == pytest.approx(expected(), rel=1e-5)


def test_memory_stays_and_copies_go_on():
    measures = EnsembleMeasures()
    measures.update(LOGITS, TARGET)
    before = [state.shape for state in measures.metric_state.values()]
    for twin in (copy.deepcopy(measures), pickle.loads(pickle.dumps(measures))):  # noqa: S301
        twin.update(LOGITS, TARGET)
        assert [state.shape for state in twin.metric_state.values()] == before
        assert twin.compute()["nll"].item() == pytest.approx(expected()["nll"], rel=1e-5)
        twin.reset()
        assert twin.count == twin.labelled == twin.sums.abs().sum() == 0
    with torch.inference_mode():
        measures.update(LOGITS, TARGET)
    measures.update(LOGITS, TARGET)
    assert measures.count == 3 * SAMPLES


@pytest.mark.parametrize(
    ("options", "batch", "words"),
    [
        ({"combine": "median"}, (), "`combine` must be one of"),
        ({"bins": 0}, (), "`bins` must be a whole number of at least 1, got 0."),
        ({"output": "probabilities", "combine": "logits"}, (), "`combine='logits'` must have members that return logits"),
        ({}, (TARGET,), "Predictions must be floating-point numbers, (members, samples, ...), got int64 of shape (40,)."),
        ({"combine": "mean"}, (LOGITS[:0],), "got float64 of shape (0, 40, 4)."),
        ({}, (LOGITS, TARGET[:3]), "`target` must have one class for each of (40,) predictions, got shape (3,)."),
        ({}, (LOGITS, TARGET + 1), "`target` must hold classes 0 to 3, got 4. Check `class_dim`, or set `ignore_index`."),
        ({}, (LOGITS, TARGET + 0.5), "`target` must hold classes 0 to 3, got "),
        ({"combine": "mean"}, (LOGITS, TARGET), "`target` must have the shape of one member's prediction, (40, 4), got (40,)."),
    ],
)
def test_what_does_not_fit_is_refused(options, batch, words):
    with pytest.raises(ArgumentError) as raised:
        measured(batch, **options)
    assert words in str(raised.value)
