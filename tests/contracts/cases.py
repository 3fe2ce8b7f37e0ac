"""The table that drives the contract suite: one row per public trick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import lightning_tricks as lt
from contracts.harness import Net, ResidualNet
from lightning_tricks import optim, schedules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import lightning.pytorch as pl


@dataclass(frozen=True)
class Case:
    """A trick and how the suite uses it.

    Attributes:
        trick: The callback's class.
        acting: Arguments under which it changes something within fifteen steps.
        neutral: Arguments under which it changes nothing.
        wrong: Wrong arguments, each with words of the error.
        nothing_matched: Arguments that select nothing in the model, with words of the error.
        model: Makes the model.
        skips: Promises that do not apply, each with the reason.
    """

    trick: type
    acting: Mapping[str, Any]
    neutral: Mapping[str, Any]
    wrong: tuple[tuple[Mapping[str, Any], str], ...]
    nothing_matched: tuple[tuple[Mapping[str, Any], str], ...] = ()
    model: Callable[[], pl.LightningModule] = Net
    skips: Mapping[str, str] = field(default_factory=dict)

    def make(self, **changes: Any) -> Any:
        """Make the callback with its acting arguments."""
        return self.trick(**{**self.acting, **changes})


AVERAGING_WRONG = (
    ({"start": "80"}, "`start` must be an int of optimizer steps, or a text such as '500 steps'"),
    ({"start": -1}, "got -1"),
    ({"start": True}, "got True"),
    ({"start": "120%"}, "got '120%'"),
    ({"start": 1.5}, "got 1.5"),
    ({"every": 0}, "`every` must be an int of optimizer steps"),
    ({"every": "0 epochs"}, "got '0 epochs'"),
    ({"buffers": "sync"}, "`buffers` must be one of 'average', 'copy', 'keep', got 'sync'"),
    ({"device": "gpu7"}, "`device` must name a device such as 'cpu'"),
    ({"dtype": "bfloat16"}, "`dtype` must be 'float32' or 'float64'"),
    ({"dtype": "float99"}, "got 'float99'"),
    ({"where": ""}, "`where` must be a glob over qualified names"),
    ({"where": []}, "`where` must be a glob"),
    ({"where": 3}, "got 3"),
    ({"exclude": [None]}, "`exclude` must be a glob"),
    ({"evaluate": "never"}, "`evaluate` must be one of True, False, 'both', got 'never'"),
    ({"evaluate": 1}, "got 1"),
    ({"name": "two words"}, "`name` must be a word"),
)

AVERAGING_NOTHING_MATCHED = (
    ({"where": "*.block*"}, "`where='*.block*'` matched none of Net's"),
    ({"exclude": "*"}, "`exclude='*'` removed all"),
    ({"where": "frozen"}, "all 2 that `where='frozen'` matched are frozen"),
)

WEIGHT_DECAY_WRONG = (
    ({"weight_decay": -0.1}, "`weight_decay` must lie in [0, ∞), got -0.1."),
    ({"weight_decay": float("nan")}, "got nan"),
    ({"weight_decay": float("inf")}, "got inf"),
    ({"weight_decay": "0.1"}, "got '0.1'"),
    ({"weight_decay": True}, "got True"),
    ({"weight_decay": [0.1]}, "got [0.1]"),
    ({"weight_decay": {}}, "`weight_decay` must map globs over qualified names to decays, such as {'head.*': 0.1}, got {}."),
    ({"weight_decay": {3: 0.1}}, "got {3: 0.1}"),
    ({"weight_decay": {"head": -1}}, "`weight_decay['head']` must lie in [0, ∞), got -1."),
    *(
        ({"weight_decay": 0.1, **arguments}, words)
        for arguments, words in (
            ({"mode": "l3"}, "`mode` must be one of 'decoupled', 'l2', 'l1', got 'l3'"),
            ({"where": ""}, "`where` must be a glob over qualified names"),
            ({"exclude": [None]}, "`exclude` must be a glob"),
            ({"skip": "biases"}, "`skip` must be one of 'matrix', 'embedding', 'norm', 'bias', 'other', got 'biases'"),
            ({"skip": ["bias", 1]}, "got 1"),
            ({"skip": None}, "got None"),
            ({"existing": "add"}, "`existing` must be one of 'refuse', 'replace', got 'add'"),
            ({"log_penalty": 1}, "`log_penalty` must be one of True, False, got 1"),
            ({"name": "two words"}, "`name` must be a word"),
        )
    ),
)

CASES = [
    Case(
        lt.EMA,
        acting={"decay": 0.8},
        neutral={"evaluate": False},
        wrong=(
            ({"decay": 1.5}, "`decay` must lie in [0, 1], got 1.5."),
            ({"decay": -0.1}, "got -0.1"),
            ({"decay": "0.9"}, "got '0.9'"),
            ({"decay": float("nan")}, "got nan"),
            ({"decay": 0.9, "half_life": 5}, "`decay` and `half_life` say the same thing, got decay=0.9 and half_life=5"),
            ({"half_life": 0}, "`half_life` must be"),
            ({"half_life": "soon"}, "got 'soon'"),
            ({"warmup": "-3"}, "`warmup` must be"),
            *AVERAGING_WRONG,
        ),
        nothing_matched=AVERAGING_NOTHING_MATCHED,
        skips={
            "pooled": "an average follows the statistics of its rank, as training does",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.BatchNormRefresh,
        acting={"on": "validation"},
        neutral={},
        wrong=(
            ({"batches": 0}, "`batches` must be a positive number of batches, or 'all' for all, got 0."),
            ({"batches": "every"}, "got 'every'"),
            ({"batches": True}, "got True"),
            ({"batches": 2.5}, "got 2.5"),
            ({"on": "start"}, "`on` must be one of 'end', 'validation', got 'start'"),
            ({"where": ""}, "`where` must be a glob over qualified names"),
            ({"exclude": [None]}, "`exclude` must be a glob"),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "head"}, "`where='head'` matched none of Net's 1. Their names look like 'body.1'"),
            ({"exclude": "*"}, "`exclude='*'` removed all 1"),
        ),
        skips={
            "neutral": "statistics that are never measured anew are those of a run without the callback; it must not disturb training",
            "tensor parallel": "the model of that check has no BatchNorm, which tensor parallelism does not split",
            "one process": "an unbiased variance changes by a factor of (n - 1)/(n - 1/2) when every value counts twice",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.OptimizerFactory,
        acting={"recipe": optim.SGD(lr=0.1, momentum=0.9, nesterov=True), "schedule": schedules.Cosine(warmup=3)},
        # What Net configures by itself.
        neutral={
            "recipe": optim.SGD(lr=0.05, momentum=0.9, implementation="for-loop"),
            "schedule": schedules.Step(factor=0.9, every="2 epochs"),
        },
        wrong=(
            ({"recipe": "adamw"}, "`recipe` must be an optimizer recipe, such as `optim.AdamW(lr=1e-3)`, got 'adamw'."),
            ({"recipe": torch.optim.SGD}, "got <class 'torch.optim.sgd.SGD'>"),
            ({"recipe": optim.SGD(), "schedule": 0.5}, "`schedule` must be a schedule, such as `schedules.Cosine()`, or None"),
            ({"recipe": optim.SGD(), "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            (
                {"recipe": optim.SGD(overrides={"hed.*": {"lr": 0.1}})},
                "'hed.*' in `overrides` matched none of the 12 parameters. Did you mean 'head'?",
            ),
        ),
        skips={
            "lends": "an optimizer changes the weights themselves, and evaluations see what was trained",
            "pooled": "an optimizer leaves BatchNorm's statistics to each rank, as training does",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.PolyakAveraging,
        acting={"start": 2},
        neutral={"evaluate": False},
        wrong=(
            ({"stop": 0}, "`stop` must be an int of optimizer steps"),
            ({"stop": "later"}, "got 'later'"),
            ({"start": 5, "stop": 4}, "`stop` must come after `start`, got start=5 and stop=4."),
            *AVERAGING_WRONG,
        ),
        nothing_matched=AVERAGING_NOTHING_MATCHED,
        skips={
            "pooled": "an average follows the statistics of its rank, as training does",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.LatestWeightAveraging,
        acting={"window": 3, "every": 2},
        neutral={"evaluate": False},
        wrong=(
            ({"window": 0}, "`window` must be a whole number of at least 1, got 0."),
            ({"window": 2.0}, "got 2.0"),
            ({"window": True}, "got True"),
            ({"window": "5"}, "got '5'"),
            *AVERAGING_WRONG,
        ),
        nothing_matched=AVERAGING_NOTHING_MATCHED,
        skips={
            "pooled": "an average follows the statistics of its rank, as training does",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.PostHocEMA,
        acting={"evaluate": True},
        neutral={},
        wrong=(
            ({"sigma_rel": 0.1}, "`sigma_rel` must be a list of widths such as (0.05, 0.10), got 0.1."),
            ({"sigma_rel": []}, "got []"),
            ({"sigma_rel": [0.05, 0.05]}, "`sigma_rel` must be a list of different widths, got [0.05, 0.05]."),
            (
                {"sigma_rel": [0.05, 0.29]},
                "`sigma_rel` must lie between 0 and 1/√12 = 0.2887, the width of the equal-weight mean, got 0.29.",
            ),
            ({"sigma_rel": [0]}, "got 0"),
            ({"sigma_rel": ["0.1"]}, "got '0.1'"),
            ({"snapshot_every": 0}, "`snapshot_every` must be an int of optimizer steps"),
            ({"dirpath": ""}, "`dirpath` must be a path of the file system, or None"),
            ({"dirpath": "s3://bucket/averages"}, "got 's3://bucket/averages'"),
            ({"dirpath": 3}, "got 3"),
            *(row for row in AVERAGING_WRONG if "start" not in row[0]),
        ),
        nothing_matched=AVERAGING_NOTHING_MATCHED,
        skips={
            "pooled": "an average follows the statistics of its rank, as training does",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.WeightDecay,
        acting={"weight_decay": 0.1},
        neutral={"weight_decay": 0.0},
        wrong=WEIGHT_DECAY_WRONG,
        nothing_matched=(
            *AVERAGING_NOTHING_MATCHED,
            (
                {"where": "*.bias"},
                "those that `where` and `exclude` leave (bias ×5, norm ×1) are frozen, exempt by `no_weight_decay`, or left",
            ),
            ({"weight_decay": {"*": 0.1, "haed": 0.2}}, "`weight_decay['haed']` matched none of the 4 parameters that decay"),
            ({"weight_decay": {"head.bias": 0.2}}, "Their names look like 'body.0.weight', 'neck.weight', 'head.weight'."),
        ),
        skips={
            "deepspeed": "the engine updates copies of the weights by itself, so the callback refuses it",
            "lends": "decay changes the weights themselves, and evaluations see what was trained",
            "pooled": "weights decay alike on all ranks, and statistics of normalization layers are left to training",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.StochasticDepth,
        acting={"rate": 0.5},
        neutral={"rate": 0.0},
        wrong=(
            ({"rate": 1.0}, "`rate` must lie in [0, 1), got 1.0."),
            ({"rate": -0.1}, "got -0.1"),
            ({"rate": float("nan")}, "got nan"),
            ({"rate": "0.1"}, "got '0.1'"),
            ({"rate": schedules.Linear(0.1, final=1.5)}, "reaches 1.5"),
            ({"rate": 0.1, "where": ""}, "`where` must be a glob over qualified names"),
            ({"rate": 0.1, "exclude": [None]}, "`exclude` must be a glob"),
            ({"rate": 0.1, "mode": "row"}, "`mode` must be one of 'sample', 'batch', got 'row'"),
            ({"rate": 0.1, "growth": "cubic"}, "`growth` must be one of 'linear', 'uniform', got 'cubic'"),
            ({"rate": 0.1, "scaling": "test"}, "`scaling` must be one of 'training', 'evaluation', got 'test'"),
            ({"rate": 0.1, "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "layer*.?"}, "`where='layer*.?'` matched none of ResidualNet's 21 modules (Linear ×6, "),
            ({"exclude": "blocks.?"}, "`exclude='blocks.?'` removed all 2 that can be dropped"),
            ({"where": "blocks.?", "exclude": "*"}, "`exclude='*'` removed all 2"),
            ({"where": "neck"}, "found no block to drop, in ResidualNet. Name blocks whose output has their input's shape by `where`"),
        ),
        model=ResidualNet,
        skips={
            "lends": "what is dropped in training changes the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw for their samples independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
            "tensor parallel": "the model of that check has no residual block",
        },
    ),
]
