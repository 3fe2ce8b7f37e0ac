"""The row of the contract suite for MaxNorm."""

from max_norm import MaxNorm

from contracts.cases import AVERAGING_NOTHING_MATCHED, Case

CASE = Case(
    MaxNorm,
    acting={"limit": 0.3},
    neutral={"limit": 1e6},
    wrong=(
        ({"limit": 0}, "`limit` must lie in (0, ∞), got 0."),
        ({"limit": "3"}, "got '3'"),
        ({"where": ""}, "`where` must be a glob over qualified names"),
        ({"exclude": [None]}, "`exclude` must be a glob"),
        ({"name": "two words"}, "`name` must be a word"),
    ),
    nothing_matched=AVERAGING_NOTHING_MATCHED,
    skips={
        "deepspeed": "each rank has parts of the rows whose norms are limited, so the callback refuses it",
        "fsdp1": "parameters are melted into flat ones, so the callback refuses it",
        "lends": "the limit changes the weights themselves, and evaluations see what was trained",
        "pooled": "statistics of normalization layers are left to training",
        "remove": "a callback that changes no module has nothing to remove",
    },
)
