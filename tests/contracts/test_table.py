"""The table is complete, and its skips are among the known promises."""

import lightning_tricks as lt
from contracts.cases import CASES
from lightning_tricks._core.trick import Trick

PROMISES = {
    "deepspeed",
    "fsdp1",
    "keys",
    "lends",
    "neutral",
    "one process",
    "pooled",
    "ranks alike",
    "remove",
    "tensor parallel",
    "trains alike",
    "types",
    "weights",
}


def test_every_public_trick_has_a_row():
    public = {getattr(lt, name) for name in lt.__all__ if isinstance(getattr(lt, name), type) and issubclass(getattr(lt, name), Trick)}
    assert public
    assert public == {case.trick for case in CASES}


def test_skips_name_promises_and_give_reasons():
    for case in CASES:
        assert case.skips.keys() <= PROMISES
        assert all(len(reason) > 20 for reason in case.skips.values())
