"""The table that drives the contract suite: one row per public trick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import lightning_tricks as lt
from contracts.harness import Net, PoolNet, ResidualNet
from lightning_tricks import optim, schedules, transforms

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

STANDARDIZATION_WRONG = (
    ({"per": "pixel"}, "`per` must be one of 'channel', 'feature', got 'pixel'"),
    ({"batches": 0}, "`batches` must be a positive number of batches, or 'all' for all, got 0."),
    ({"batches": True}, "got True"),
    ({"dim": 0}, "`dim` must be the dimension of channels, such as 1 or -1, and not 0, which is the batch, got 0."),
    ({"dim": 1.0}, "got 1.0"),
    ({"eps": -1e-3}, "`eps` must lie in [0, ∞), got -0.001."),
    ({"center": 1}, "`center` must be one of True, False, got 1"),
    ({"scale": None}, "got None"),
    ({"item": 0.5}, "`item` must be an index or a key in a batch"),
    ({"module": None}, "`module` must be the name of a module, or '' for the model itself, got None."),
    ({"name": "two words"}, "`name` must be a word"),
)

STANDARDIZATION_SKIPS = {
    "keys": "the statistics are buffers of the model, so that it goes nowhere without them",
    "lends": "the model that trains is the one that is evaluated",
    "pooled": "statistics of normalization layers are left to training",
    "tensor parallel": "the model of that check has no `forward`",
    "remove": "statistics belong to the model, which keeps them after the fit",
}

ENSEMBLE_WRONG = (
    ({"members": 0}, "`members` must be a whole number of at least 1, got 0."),
    ({"members": 2.0}, "got 2.0"),
    ({"members": True}, "got True"),
    ({"combine": "median"}, "`combine` must be one of 'probabilities', 'logits', 'vote', 'mean', got 'median'"),
    ({"output": "scores"}, "`output` must be one of 'logits', 'probabilities', got 'scores'"),
    ({"combine": "logits", "output": "probabilities"}, "`combine='logits'` must have members that return logits"),
    ({"class_dim": 0}, "`class_dim` must be the dimension of the classes, such as 1 or -1, and not 0, which is the batch, got 0."),
    ({"class_dim": 1.0}, "got 1.0"),
    ({"target": ""}, "`target` must be the name of a module such as 'net.head', or None for the model's `forward`, got ''."),
    ({"weights": "best"}, "`weights` must be one of 'current', 'average', got 'best'"),
    ({"refresh_batch_norm": 0}, "`refresh_batch_norm` must be a number of batches of at least 1, 'all', or None"),
    ({"refresh_batch_norm": True}, "got True"),
    ({"evaluate": "both"}, "`evaluate` must be one of True, False, 'members', got 'both'"),
    ({"measure": 1}, "`measure` must be one of True, False, got 1"),
    ({"item": 0.5}, "`item` must be an index or a key in a batch"),
    ({"memory": "gpu"}, "`memory` must be one of 'cpu', 'disk', got 'gpu'"),
    ({"dirpath": "s3://bucket/members"}, "`dirpath` must be a path of the file system"),
    ({"name": "two words"}, "`name` must be a word"),
)

ENSEMBLE_SKIPS = {
    "deepspeed": "the engine gathers and updates weights of its own, so the callback refuses it",
    "fsdp1": "parameters are melted into flat ones, in which no member's can be lent, so the callback refuses it",
    "lends": "members are lent within the forward pass alone, and the module holds the weights of training",
    "pooled": "statistics of normalization layers are left to training",
    "tensor parallel": "the model of that check has no `forward`",
    "remove": "a callback that changes no module has nothing to remove",
}

WATCHING_SKIPS = {
    "acts": "it watches training, which goes on as without it",
    "deepspeed": "the engine updates copies of the weights by itself, so the callback refuses it",
    "lends": "it watches training, and evaluations see what was trained",
    "pooled": "statistics of normalization layers are left to training",
    "remove": "a callback that changes no module has nothing to remove",
}

MIXING_WRONG = (
    ({"alpha": -0.1}, "`alpha` must lie in [0, ∞), got -0.1."),
    ({"alpha": float("inf")}, "got inf"),
    ({"alpha": "0.2"}, "got '0.2'"),
    ({"per": "pair"}, "`per` must be one of 'batch', 'sample', got 'pair'"),
    ({"probability": 1.5}, "`probability` must lie in [0, 1], got 1.5."),
    ({"start": -1}, "`start` must be an int of optimizer steps, or a text such as '500 steps'"),
    ({"stop": "late"}, "got 'late'"),
    ({"start": 5, "stop": 4}, "`stop` must come after `start`, got start=5 and stop=4."),
    ({"item": 0.5}, "`item` must be an index or a key in a batch"),
    ({"target": None}, "`target` must be an index or a key in a batch, or a list of these, got None."),
    ({"target": []}, "got []"),
    ({"target": True}, "got True"),
    ({"name": "two words"}, "`name` must be a word"),
)

MIXING_SKIPS = {
    "lends": "what training sees changes the weights themselves, and evaluations see what was trained",
    "ranks alike": "ranks mix their samples independently of each other, so that two do not train as one",
    "pooled": "statistics of normalization layers are left to training",
    "remove": "a callback that changes no module has nothing to remove",
}

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
    Case(
        lt.NormSwap,
        acting={"source": "layer", "target": "rms"},
        neutral={"source": "layer", "target": "layer"},
        wrong=(
            (
                {"source": "norm", "target": "layer"},
                "`source` must be one of 'batch', 'layer', 'group', 'instance', 'rms', 'ghost', 'sync', 'frozen'",
            ),
            ({"source": "none", "target": "batch"}, "got 'none'"),
            *(
                ({"source": "batch", **arguments}, words)
                for arguments, words in (
                    ({"target": "norm"}, "'response', 'none', got 'norm'"),
                    ({"target": "group", "groups": 0}, "`groups` must be a number of groups of at least 1, or the size of each as a text"),
                    ({"target": "group", "groups": "0 channels"}, "got '0 channels'"),
                    ({"target": "group", "groups": True}, "got True"),
                    ({"target": "layer", "groups": 4}, "`groups` is for `target='group'`, got groups=4 with target='layer'. Leave it out."),
                    ({"target": "group", "ghost_size": 4}, "`ghost_size` is for `target='ghost'`"),
                    ({"target": "ghost", "ghost_size": 0}, "`ghost_size` must be a whole number of at least 1, got 0."),
                    ({"target": "layer", "where": ""}, "`where` must be a glob over qualified names"),
                    ({"target": "layer", "exclude": [None]}, "`exclude` must be a glob"),
                    ({"target": "layer", "calibrate": 0}, "`calibrate` must be a whole number of at least 1, got 0."),
                    ({"target": "layer", "calibrate": "all"}, "got 'all'"),
                    ({"target": "layer", "name": "two words"}, "`name` must be a word"),
                )
            ),
        ),
        nothing_matched=(
            ({"where": "head"}, "`where='head'` matched none of ResidualNet's 2. Their names look like 'blocks.0.branch.0'"),
            ({"exclude": "*"}, "`exclude='*'` removed all 2"),
            ({"source": "group"}, "ResidualNet has none. It has 'batch' ×1 such as 'body.1', 'layer' ×2 such as 'blocks.0.branch.0'"),
        ),
        model=ResidualNet,
        skips={
            "keys": "layers of another kind have other parameters and statistics, which the checkpoint records",
            "lends": "layers of another kind change the weights themselves, and evaluations see what was trained",
            "pooled": "statistics of normalization layers are left to training",
            "remove": "a swap stays, since the weights that are trained are those of the new layers",
            "weights": "weights of the old layers do not fit the new ones",
            "tensor parallel": "the model of that check has no normalization layer",
        },
    ),
    Case(
        lt.FeatureNoise,
        acting={"std": 0.3, "where": "body.0"},
        neutral={"std": 0.0, "where": "body.0"},
        wrong=(
            ({"std": -0.1, "where": "body"}, "`std` must lie in [0, ∞), got -0.1."),
            ({"std": float("inf"), "where": "body"}, "got inf"),
            ({"std": "0.1", "where": "body"}, "got '0.1'"),
            ({"std": schedules.Linear(0.1, final=-0.5), "where": "body"}, "reaches -0.5"),
            ({"std": 0.1, "where": ""}, "`where` must be a glob over qualified names"),
            ({"std": 0.1, "where": "body", "exclude": [None]}, "`exclude` must be a glob"),
            ({"std": 0.1, "where": "body", "kind": "uniform"}, "`kind` must be one of 'additive', 'multiplicative', got 'uniform'"),
            ({"std": 0.1, "where": "body", "relative": 1}, "`relative` must be one of True, False, got 1"),
            ({"std": 0.1, "where": "body", "at": "weight"}, "`at` must be one of 'output', 'input', got 'weight'"),
            (
                {"std": 0.1, "where": "body", "kind": "multiplicative", "relative": True},
                "`relative=True` is for additive noise, got kind='multiplicative'",
            ),
            ({"std": 0.1, "where": "body", "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "layer*.?"}, "`where='layer*.?'` matched none of Net's 10 modules (Linear ×4, "),
            ({"exclude": "*"}, "`exclude='*'` removed all 1 that `where='body.0'` matched"),
        ),
        skips={
            "lends": "noise in training changes the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw for their samples independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
            "tensor parallel": "the model of that check has no module of this name",
        },
    ),
    Case(
        lt.DropBlock,
        acting={"rate": 0.3, "block_size": 2, "where": "body.0"},
        neutral={"rate": 0.0, "where": "body.0"},
        wrong=(
            ({"rate": 1.0, "where": "body"}, "`rate` must lie in [0, 1), got 1.0."),
            ({"rate": -0.1, "where": "body"}, "got -0.1"),
            ({"rate": schedules.Linear(0.1, final=1.5), "where": "body"}, "reaches 1.5"),
            ({"rate": 0.1, "block_size": 0, "where": "body"}, "`block_size` must be a whole number of at least 1, got 0."),
            ({"rate": 0.1, "block_size": 2.5, "where": "body"}, "got 2.5"),
            ({"rate": 0.1, "where": []}, "`where` must be a glob over qualified names"),
            ({"rate": 0.1, "where": "body", "exclude": 3}, "`exclude` must be a glob"),
            ({"rate": 0.1, "where": "body", "per": "batch"}, "`per` must be one of 'channel', 'sample', got 'batch'"),
            ({"rate": 0.1, "where": "body", "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "layer*.?"}, "`where='layer*.?'` matched none of Net's 10 modules (Linear ×4, "),
            ({"exclude": "*"}, "`exclude='*'` removed all 1 that `where='body.0'` matched"),
        ),
        skips={
            "lends": "what is dropped in training changes the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw for their samples independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
            "tensor parallel": "the model of that check has no feature maps",
        },
    ),
    Case(
        lt.FractionalMaxPool,
        acting={"ratio": None, "mode": "pseudorandom"},
        neutral={"overlapping": False},  # which divides six into three in one way only, that of the layer's own windows
        wrong=(
            ({"ratio": 1}, "`ratio` must lie in (1, ∞), got 1."),
            ({"ratio": "1.5"}, "got '1.5'"),
            ({"where": ""}, "`where` must be a glob over qualified names"),
            ({"exclude": [None]}, "`exclude` must be a glob"),
            ({"mode": "regular"}, "`mode` must be one of 'random', 'pseudorandom', got 'regular'"),
            ({"overlapping": 1}, "`overlapping` must be one of True, False, got 1"),
            ({"samples": 0}, "`samples` must be a whole number of at least 1, got 0."),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "head"}, "`where='head'` matched none of PoolNet's 1. Their names look like 'body.4'"),
            ({"exclude": "body"}, "`exclude='body'` removed all 1. Exclude less"),
        ),
        model=PoolNet,
        skips={
            "lends": "regions drawn in training change the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw their regions independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
            "tensor parallel": "the model of that check has no max pooling",
        },
    ),
    Case(
        lt.BatchNormFreeze,
        acting={"start": 3},
        neutral={"start": "100%"},
        wrong=(
            ({"start": -1}, "`start` must be an int of optimizer steps, or a text such as '500 steps'"),
            ({"start": "late"}, "got 'late'"),
            ({"start": "120%"}, "got '120%'"),
            ({"start": 3, "affine": 1}, "`affine` must be one of True, False, got 1"),
            ({"start": 3, "where": ""}, "`where` must be a glob over qualified names"),
            ({"start": 3, "exclude": [None]}, "`exclude` must be a glob"),
            ({"start": 3, "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "head"}, "`where='head'` matched none of Net's 1. Their names look like 'body.1'"),
            ({"exclude": "*"}, "`exclude='*'` removed all 1"),
        ),
        skips={
            "lends": "fixed statistics change the weights that train, and evaluations see what was trained",
            "pooled": "ranks go on with the statistics of rank zero, as they do under DDP",
            "tensor parallel": "the model of that check has no BatchNorm, which tensor parallelism does not split",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.InputStandardization,
        acting={"per": "channel"},
        neutral={"center": False, "scale": False},
        wrong=(
            *STANDARDIZATION_WRONG,
            ({"whitening": "zac"}, "`whitening` must be one of None, 'zca', 'pca', got 'zac'"),
            ({"whitening": "pca", "scale": False}, "`whitening='pca'` centers and scales, got center=True and scale=False."),
            ({"argument": -1}, "`argument` must be a position or a name among the arguments of `forward`"),
        ),
        nothing_matched=(({"module": "haed"}, "`module='haed'` is none of Net's. Its children are 'body', 'neck', 'head'"),),
        skips=STANDARDIZATION_SKIPS,
    ),
    Case(
        lt.TargetStandardization,
        acting={"item": 0},  # Net has no continuous targets; its inputs stand for some
        neutral={"center": False, "scale": False},
        wrong=(
            *STANDARDIZATION_WRONG,
            ({"output": 1.5}, "`output` must be an index or a key in what `forward` returns, or None"),
        ),
        nothing_matched=(({"module": "haed"}, "`module='haed'` is none of Net's. Its children are 'body', 'neck', 'head'"),),
        skips=STANDARDIZATION_SKIPS,
    ),
    Case(
        lt.Dropout,
        acting={"rate": 0.5, "after": "*.2"},
        neutral={"rate": 0.0, "after": "*.2"},
        wrong=(
            ({"rate": 1.0}, "`rate` must lie in [0, 1), got 1.0."),
            ({"rate": -0.1}, "got -0.1"),
            ({"rate": "0.1"}, "got '0.1'"),
            ({"rate": schedules.Linear(0.1, final=1.5)}, "reaches 1.5"),
            ({"rate": 0.1, "where": ""}, "`where` must be a glob over qualified names"),
            ({"rate": 0.1, "after": []}, "`after` must be a glob"),
            ({"rate": 0.1, "exclude": [None]}, "`exclude` must be a glob"),
            ({"rate": 0.1, "kind": "spatial"}, "`kind` must be one of None, 'element', 'channel', 'variational', 'alpha', 'channel_alpha'"),
            ({"rate": 0.1, "samples": 0}, "`samples` must be a whole number of at least 1, got 0."),
            ({"rate": 0.1, "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"after": "*.act"}, "`after='*.act'` matched none of Net's 10 modules (Linear ×4, "),
            ({"where": "head"}, "`where='head'` matched none of the 1 that `after='*.2'` did, such as 'body.2'"),
            ({"exclude": "body"}, "`exclude='body'` removed all 1"),
            ({"after": None, "where": "head"}, "`where='head'` matched none of Net's 1. Their names look like 'body.3'"),
            ({"after": None, "exclude": "*"}, "`exclude='*'` removed all 1"),
        ),
        skips={
            "lends": "what is dropped in training changes the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw for their samples independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
        },
    ),
    Case(
        lt.ActivationSwap,
        acting={"source": ["relu", "tanh"], "target": "gelu"},
        neutral={"source": "tanh", "target": "tanh"},
        wrong=(
            ({"source": "rleu", "target": "gelu"}, "`source` must be one of 'relu', 'relu6', 'leaky_relu',"),
            ({"source": [], "target": "gelu"}, "or several of these, got []"),
            ({"source": "relu", "target": "torch.nn.Nothing"}, "or the path of a module's class, got 'torch.nn.Nothing'"),
            ({"source": "relu", "target": "leaky_relu(0.2)"}, "such as 'leaky_relu(negative_slope=0.2)', got 'leaky_relu(0.2)'"),
            ({"source": "relu", "target": "elu(slope=2)"}, "`target` must have settings that its class takes, got 'elu(slope=2)'"),
            ({"source": "relu", "target": "quick_gelu"}, "`target` must be an activation that torch has as a module"),
            (
                {"source": "relu", "target": 3},
                "`target` must be the name of an activation, such as 'gelu', or a module or its class, got 3",
            ),
            ({"source": "relu", "target": "gelu", "where": ""}, "`where` must be a glob over qualified names"),
            ({"source": "relu", "target": "gelu", "exclude": [None]}, "`exclude` must be a glob"),
            ({"source": "relu", "target": "gelu", "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            (
                {"source": "elu", "target": "selu"},
                "found no activation: ResidualNet has 'relu', 'tanh'. Name one that is there as `source`.",
            ),
            (
                {"where": "head"},
                "`where='head'` matched none of ResidualNet's 3. Their names look like 'body.2', 'blocks.0.branch.2', 'blocks.1.branch.2'.",
            ),
            ({"exclude": "*"}, "`exclude='*'` removed all 3"),
        ),
        model=ResidualNet,
        skips={
            "types": "other activations are what it is for; keys and parameters stay",
            "lends": "another activation changes what is trained, and evaluations see that",
            "pooled": "statistics of normalization layers are left to training",
            "remove": "the weights belong to the new activations, which therefore stay",
        },
    ),
    Case(
        lt.Initialization,
        acting={"scheme": "kaiming_normal"},
        neutral={"scheme": "keep"},
        wrong=(
            ({"scheme": "he"}, "`scheme` must be one of 'keep', 'xavier_uniform', 'xavier_normal',"),
            *(
                ({"scheme": "lsuv", **arguments}, words)
                for arguments, words in (
                    ({"gain": 0}, "`gain` must lie in (0, ∞), got 0."),
                    ({"mode": "in"}, "`mode` must be one of 'fan_in', 'fan_out', got 'in'"),
                    ({"std": -0.1}, "`std` must lie in (0, ∞), got -0.1."),
                    ({"bias": "one"}, "`bias` must be one of 'zero', 'keep', got 'one'"),
                    ({"residual": 0}, "`residual` must be one of 'keep', 'zero', got 0"),
                    ({"seed": -1}, "`seed` must be a whole number of at least 0, got -1."),
                    ({"seed": "0"}, "got '0'"),
                    ({"batches": 0}, "`batches` must be a whole number of at least 1, got 0."),
                    ({"tolerance": 1.0}, "`tolerance` must lie in (0, 1), got 1.0."),
                    ({"pretrained": "keep"}, "`pretrained` must be one of 'refuse', 'overwrite', got 'keep'"),
                    ({"where": ""}, "`where` must be a glob over qualified names"),
                    ({"exclude": [None]}, "`exclude` must be a glob"),
                    ({"name": "two words"}, "`name` must be a word"),
                )
            ),
        ),
        nothing_matched=(
            ({"where": "haed"}, "`where='haed'` matched none of Net's 4. Their names look like 'body.0', 'neck', 'head'."),
            ({"exclude": "*"}, "`exclude='*'` removed all 4"),
            ({"where": "frozen"}, "all 1 are left ('frozen': it is frozen). Select others."),
            ({"residual": "zero"}, "found no residual branch to begin at zero in Net"),
        ),
        skips={
            "lends": "it acts before training, and evaluations see what was trained",
            "pooled": "statistics of normalization layers are left to training",
            "remove": "weights have been trained since, and those from before are gone",
        },
    ),
    Case(
        lt.DropConnect,
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
            ({"rate": 0.1, "kinds": "Bilinear"}, "`kinds` must name classes of layers among Linear, Conv1d"),
            ({"rate": 0.1, "kinds": []}, "or be None for all, got []."),
            ({"rate": 0.1, "kinds": 3}, "got 3"),
            ({"rate": 0.1, "granularity": "row"}, "`granularity` must be one of 'batch', 'example', got 'row'"),
            ({"rate": 0.1, "inference": "vote"}, "`inference` must be one of 'mean', 'gaussian', 'sample', got 'vote'"),
            ({"rate": 0.1, "draws": 0}, "`draws` must be a whole number of at least 1, got 0."),
            ({"rate": 0.1, "mask_bias": 1}, "`mask_bias` must be one of True, False, got 1"),
            ({"rate": 0.1, "name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=(
            ({"where": "layer*.?"}, "`where='layer*.?'` matched none of Net's 5 layers (Linear ×4, Conv2d ×1). Names look like 'body.0'"),
            ({"exclude": "*"}, "`exclude='*'` removed all 5"),
            ({"kinds": "LSTM"}, "`kinds=('LSTM',)` matched none of Net's 5 layers"),
        ),
        skips={
            "lends": "what is dropped in training changes the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw masks independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
        },
    ),
    Case(
        lt.FastGeometricEnsemble,
        acting={"members": 2, "start": "20%", "cycle": 2, "lr": (0.1, 0.001)},
        neutral={"members": 1, "schedule": None, "evaluate": False},
        wrong=(
            *ENSEMBLE_WRONG,
            ({"start": -1}, "`start` must be an int of optimizer steps, or a text such as '500 steps'"),
            ({"cycle": 5}, "`cycle` must be an even number of steps, in whose middle a member is taken, got 5."),
            ({"cycle": "7 steps"}, "got '7 steps'"),
            ({"cycle": "0 epochs"}, "`cycle` must be an int of optimizer steps"),
            ({"lr": 0.1}, "`lr` must be two numbers, in (0, ∞) and [0, ∞), got 0.1."),
            ({"lr": (0.0, 0.0)}, "`lr[0]` must lie in (0, ∞), got 0.0."),
            ({"lr": (0.1, -0.1)}, "`lr[1]` must lie in [0, ∞), got -0.1."),
            ({"lr": (0.001, 0.1)}, "`lr` must be the highest and then the lowest rate of a cycle"),
            ({"schedule": "cosine"}, "`schedule` must be one of 'triangular', None, got 'cosine'"),
            ({"schedule": None, "lr": (0.1, 0.001)}, "`lr` must be None where `schedule=None` leaves the learning rate alone"),
        ),
        nothing_matched=(({"target": "net.head"}, "`target='net.head'` names no module of Net, whose modules are 'body', "),),
        skips=ENSEMBLE_SKIPS,
    ),
    Case(
        lt.CheckpointEnsemble,
        acting={"members": 2, "every": 4},
        neutral={"evaluate": False},
        wrong=(
            *ENSEMBLE_WRONG,
            ({"monitor": ""}, "`monitor` must be the name of a logged metric such as 'val_loss', or None for the latest weights, got ''."),
            ({"monitor": 3}, "got 3"),
            ({"mode": "auto"}, "`mode` must be one of 'min', 'max', got 'auto'"),
            ({"every": 0}, "`every` must be an int of optimizer steps"),
        ),
        nothing_matched=(({"target": "net.head"}, "`target='net.head'` names no module of Net, whose modules are 'body', "),),
        skips={**ENSEMBLE_SKIPS, "trains alike": "training stays as it is, and evaluations alone change"},
    ),
    Case(
        lt.SnapshotEnsemble,
        acting={"members": 3},
        neutral={"schedule": None, "evaluate": False},
        wrong=(
            ({"members": 3, "cycles": 2}, "`cycles` must be at least `members`, each of which takes one, got cycles=2 and members=3."),
            ({"cycles": 0}, "`cycles` must be a whole number of at least 1, got 0."),
            ({"restart_lr": 0}, "`restart_lr` must lie in (0, ∞), got 0."),
            ({"restart_lr": "0.1"}, "got '0.1'"),
            ({"schedule": "linear"}, "`schedule` must be one of 'cosine', None, got 'linear'"),
            ({"schedule": None, "restart_lr": 0.1}, "`restart_lr` must be None where `schedule=None` leaves the learning rate alone"),
            *ENSEMBLE_WRONG,
        ),
        nothing_matched=(({"target": "bdy"}, "`target='bdy'` names no module of Net, whose modules are 'body', 'body.0'"),),
        skips=ENSEMBLE_SKIPS,
    ),
    Case(
        lt.BatchAugmentation,
        acting={"transforms": [transforms.Crop(padding=2), transforms.Rotation(20)]},
        neutral={"transforms": [transforms.Crop(), transforms.ColorJitter(), transforms.Flip(probability=0)]},
        wrong=(
            ({"transforms": "flip"}, "`transforms` must be transforms such as `transforms.Flip()`, or callables"),
            ({"transforms": [transforms.Flip]}, "got [<class"),
            ({"transforms": None}, "got None"),
            ({"transforms": transforms.Flip(), "item": 0.5}, "`item` must be an index or a key in a batch"),
            ({"transforms": transforms.Flip(), "name": "two words"}, "`name` must be a word"),
        ),
        skips={
            "lends": "what training sees of images changes the weights themselves, and evaluations see what was trained",
            "ranks alike": "ranks draw for their images independently of each other, so that two do not train as one",
            "pooled": "statistics of normalization layers are left to training",
            "tensor parallel": "the model of that check takes no images",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.GradientFlow,
        # Other tricks, and fifteen steps on noise, do what it would warn of.
        acting={"every": 2, "heat_map": False, "vanishing": 0.0, "exploding": 1e9, "dead": 1.0, "saturated": 1.0},
        neutral={"heat_map": False},
        wrong=(
            ({"every": 0}, "`every` must be an int of optimizer steps, or a text such as '500 steps'"),
            ({"every": "often"}, "got 'often'"),
            ({"where": ""}, "`where` must be a glob over qualified names"),
            ({"exclude": [None]}, "`exclude` must be a glob"),
            ({"activations": 1}, "`activations` must be one of True, False, got 1"),
            ({"report": "all"}, "`report` must be one of 'summary', 'layers', got 'all'"),
            ({"heat_map": "norm"}, "`heat_map` must be one of 'grad_norm', 'weight_norm',"),
            ({"vanishing": 1.5}, "`vanishing` must lie in [0, 1], got 1.5."),
            ({"exploding": 0.5}, "`exploding` must lie in [1, ∞), got 0.5."),
            ({"dead": -0.1}, "`dead` must lie in [0, 1], got -0.1."),
            ({"saturated": "0.5"}, "`saturated` must lie in [0, 1], got '0.5'."),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        nothing_matched=AVERAGING_NOTHING_MATCHED,
        skips=WATCHING_SKIPS,
    ),
    Case(
        lt.FitDiagnosis,
        acting={"patience": 1},
        neutral={},
        wrong=(
            ({"train": ""}, "`train` must be the name under which the module logs a loss, such as 'val_loss', got ''."),
            ({"val": None}, "`val` must be the name under which the module logs a loss, such as 'val_loss', got None."),
            ({"batches": 0}, "`batches` must be a whole number of at least 1, got 0."),
            ({"train": "loss", "batches": 2}, "two ways to the training loss, got train='loss' and batches=2. Leave one out."),
            ({"goal": "0.1"}, "`goal` must lie in (-∞, ∞), got '0.1'."),
            ({"patience": 0}, "`patience` must be a whole number of at least 1, got 0."),
            ({"tolerance": -0.1}, "`tolerance` must lie in [0, ∞), got -0.1."),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        skips={key: reason for key, reason in WATCHING_SKIPS.items() if key != "deepspeed"},
    ),
    Case(
        lt.FineTuning,
        acting={"stages": {"0%": "head", "3 steps": ["neck"]}, "lr_factors": {"neck": 0.5}},
        neutral={"stages": {"0%": "*"}},
        wrong=(
            ({"stages": {}}, "`stages` must map moments to what trains from then on, such as {'0%': 'head', '20%': 'layer4.*'}, got {}."),
            ({"stages": "head"}, "got 'head'"),
            ({"stages": {"10%": "head"}}, "`stages` must say what trains from the beginning, as in {'0%': 'head', …}"),
            ({"stages": {"soon": "head"}}, "`stages` must be an int of optimizer steps, or a text such as '500 steps'"),
            ({"stages": {"0%": ""}}, "`stages['0%']` must be a glob over qualified names such as 'layer4.*', a list of globs, a number"),
            ({"stages": {"0%": None}}, "got None"),
            ({"stages": {"0%": -1}}, "`stages['0%']` must be a whole number of at least 0, got -1."),
            ({"stages": {"0%": True}}, "got True"),
            ({"stages": {"0%": "120%"}}, "`stages['0%']` must lie in (0, 100], got 120.0."),
            *(
                ({"stages": {"0%": "head"}, **arguments}, words)
                for arguments, words in (
                    ({"layer_decay": 0}, "`layer_decay` must lie in (0, 1], got 0."),
                    ({"layer_decay": "0.5"}, "got '0.5'"),
                    ({"lr_factors": {"body": 0}}, "`lr_factors['body']` must lie in (0, ∞), got 0."),
                    ({"lr_factors": [0.5]}, "`lr_factors` must map globs over qualified names to factors, such as {'backbone.*': 0.1}"),
                    ({"statistics": "keep"}, "`statistics` must be one of 'freeze', 'train', got 'keep'"),
                    ({"num_classes": 0}, "`num_classes` must be a whole number of at least 1, got 0."),
                    ({"head": ""}, "`head` must be a glob over qualified names"),
                    ({"head": ["fc"]}, "`head` must be the name of one layer"),
                    ({"name": "two words"}, "`name` must be a word"),
                )
            ),
        ),
        nothing_matched=(
            ({"stages": {"0%": "haed"}}, "each of `stages` must thaw something, and 'haed' thaws no parameter of Net: names look like"),
            ({"stages": {"0%": "head", "2 steps": "frozen"}}, "all that it matches are frozen by the model itself"),
            ({"lr_factors": {"bdoy": 0.5}}, "'bdoy' in `lr_factors` matched no parameter that Net trains"),
        ),
        skips={
            "deepspeed": "the engine divides gradients of all parameters between ranks, so the callback refuses it",
            "fsdp1": "optimizer states of flat parameters cannot be saved in part, so the callback refuses it",
            "lends": "what is frozen changes what is trained, and evaluations see that",
            "pooled": "statistics of layers that train are left to training",
            "tensor parallel": "the model of that check has no layer of this name",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.LinearProbe,
        acting={"stages": ["body", "neck"]},
        neutral={"stages": "neck", "on": "end"},
        wrong=(
            ({"stages": []}, "`stages` must be a glob over qualified names"),
            ({"stages": 3}, "got 3"),
            *(
                ({"stages": "body", **arguments}, words)
                for arguments, words in (
                    ({"on": "fit"}, "`on` must be one of 'start', 'end', got 'fit'"),
                    ({"method": "svm"}, "`method` must be one of 'logistic', 'ridge', got 'svm'"),
                    ({"l2": -1}, "`l2` must lie in [0, ∞), got -1."),
                    ({"channel_dim": 0}, "`channel_dim` must be a dimension such as 1 or -1, and not 0"),
                    ({"channel_dim": 1.0}, "got 1.0"),
                    ({"target": None}, "`target` must be an index or a key in a batch, got None."),
                    ({"name": "two words"}, "`name` must be a word"),
                )
            ),
        ),
        nothing_matched=(({"stages": "layer*"}, "`stages='layer*'` matched none of Net's 10 modules"),),
        skips={
            "acts": "it measures the model, and leaves it as it is",
            "lends": "it measures the model, and leaves it as it is",
            "pooled": "statistics of normalization layers are left to training",
            "tensor parallel": "the model of that check has no module of this name",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(lt.MixUp, acting={"alpha": 0.8}, neutral={"alpha": 0.0}, wrong=MIXING_WRONG, skips=MIXING_SKIPS),
    Case(
        lt.CutMix,
        acting={"alpha": 1.0, "per": "sample"},
        neutral={"alpha": 1.0, "probability": 0.0},
        wrong=MIXING_WRONG,
        skips=MIXING_SKIPS,
    ),
    Case(
        lt.LabelSmoothing,
        acting={"smoothing": 0.2},
        neutral={"smoothing": 0.0},
        wrong=(
            ({"smoothing": -0.1}, "`smoothing` must lie in [0, 1], got -0.1."),
            ({"smoothing": 1.5}, "got 1.5"),
            ({"smoothing": "0.1"}, "got '0.1'"),
            ({"target": 0.5}, "`target` must be an index or a key in a batch, or a list of these, got 0.5."),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        skips={name: reason for name, reason in MIXING_SKIPS.items() if name != "ranks alike"},
    ),
    Case(
        lt.LossSpikeGuard,
        acting={"threshold": 0.01, "window": 3, "watch": ["loss", "grad_norm"], "patience": 100},
        neutral={"threshold": 1e9, "window": 3},
        wrong=(
            ({"threshold": 0}, "`threshold` must lie in (0, ∞), got 0."),
            ({"threshold": float("inf")}, "got inf"),
            ({"threshold": "10"}, "got '10'"),
            ({"window": 1}, "`window` must be a whole number of at least 2, got 1."),
            ({"window": 10.0}, "got 10.0"),
            ({"watch": "norm"}, "`watch` must be one of 'loss', 'grad_norm', got 'norm'."),
            ({"watch": []}, "`watch` must name at least one of 'loss', 'grad_norm', got []."),
            ({"watch": ["loss", None]}, "got None"),
            ({"watch": 3}, "got 3"),
            ({"patience": 0}, "`patience` must be a whole number of at least 1, got 0."),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        skips={
            "deepspeed": "the engine updates copies of the weights by itself, so the callback refuses it",
            "fsdp1": "gradients are pieces of flat tensors, so the callback refuses it",
            "lends": "what is left out changes the weights themselves, and evaluations see what was trained",
            "pooled": "statistics of normalization layers are left to training",
            "remove": "a callback that changes no module has nothing to remove",
        },
    ),
    Case(
        lt.TrackingReport,
        acting={"goals": {"val_loss": "min"}, "artifacts": "all"},
        neutral={},
        wrong=(
            (
                {"goals": ["val_loss"]},
                "`goals` must map whole names of metrics to what stands for the run, such as {'val_acc': 'max'}, got [",
            ),
            ({"goals": {"": "min"}}, "got {'': 'min'}"),
            ({"goals": {"val_*": "min"}}, "`goals` must map whole names of metrics"),
            ({"goals": {"val_loss": "least"}}, "`goals['val_loss']` must be one of 'min', 'max', 'mean', 'first', 'last', got 'least'"),
            ({"figures": 1}, "`figures` must be one of True, False, got 1"),
            ({"artifacts": "latest"}, "`artifacts` must be one of 'none', 'best', 'all', got 'latest'"),
            ({"name": "two words"}, "`name` must be a word"),
        ),
        skips={key: reason for key, reason in WATCHING_SKIPS.items() if key != "deepspeed"},
    ),
]
