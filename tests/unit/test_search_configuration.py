"""Configurations of LightningCLI: places, lines, and changed values."""

from __future__ import annotations

import pytest

from lightning_tricks.errors import ArgumentError
from lightning_tricks.search._configuration import Configuration

pytest.importorskip("yaml")

TEXT = """\
model:
  class_path: toy.Toy
optimizer:
  class_path: torch.optim.SGD
  init_args:
    lr: 1e-3
trainer:
  callbacks:
    - class_path: lightning_tricks.EMA
      init_args:
        decay: 0.9
    - class_path: lightning_tricks.StochasticDepth
      init_args:
        rate: 0.1
    - class_path: lightning_tricks.WeightDecay
"""


@pytest.fixture
def configuration(tmp_path):
    (tmp_path / "base.yaml").write_text(TEXT)
    return Configuration.read(tmp_path / "base.yaml")


def test_places_are_found_by_name_and_by_index_and_numbers_are_numbers(configuration):
    assert configuration.get("optimizer.init_args.lr") == 0.001
    decay = ("trainer", "callbacks", 0, "init_args", "decay")
    for name in ("EMA", "0", "-3"):
        assert configuration.find(f"trainer.callbacks.{name}.init_args.decay") == decay
    with pytest.raises(ArgumentError, match=r"base.yaml:8: .* has no item 'EMMA', but 'EMA', 'StochasticDepth', 'WeightDecay'"):
        configuration.find("trainer.callbacks.EMMA")


def test_what_would_be_lost_in_reading_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("model:\n  init_args:\n    lr: 1\n    width: 2\n    lr: 2\n")
    with pytest.raises(ArgumentError, match=r"twice.yaml:5: each key must be there once, and 'lr' is in line 3, too"):
        Configuration.read(tmp_path / "twice.yaml")
    (tmp_path / "latin.yaml").write_bytes("# é\nmodel:".encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"latin.yaml: a file of YAML in UTF-8 is needed"):
        Configuration.read(tmp_path / "latin.yaml")


def test_items_are_taken_out_and_the_lines_of_the_others_stay_theirs(configuration, tmp_path):
    values = {
        "trainer.callbacks.EMA": False,
        "trainer.callbacks.WeightDecay": True,
        "trainer.callbacks.StochasticDepth.init_args.rate": 0.2,
        "trainer.max_epochs": 3,
        "lr_scheduler.class_path": "torch.optim.lr_scheduler.ConstantLR",
    }
    changed = configuration.with_values(values)
    depth, decay = changed.tree["trainer"]["callbacks"]
    assert depth == {"class_path": "lightning_tricks.StochasticDepth", "init_args": {"rate": 0.2}}
    assert decay == {"class_path": "lightning_tricks.WeightDecay"}
    assert changed.location.of(("trainer", "callbacks", 0, "init_args", "rate")).endswith("base.yaml:14: ")
    assert changed.location.of(("trainer", "callbacks", 1)).endswith("base.yaml:15: ")
    assert changed.location.of(("trainer", "max_epochs")).endswith("base.yaml:7: ")
    none = configuration.with_values(dict.fromkeys(("trainer.callbacks.0", "trainer.callbacks.1", "trainer.callbacks.-1"), False))
    assert none.tree["trainer"]["callbacks"] == []
    assert len(configuration.tree["trainer"]["callbacks"]) == 3
    changed.save(tmp_path / "changed.yaml")
    assert Configuration.read(tmp_path / "changed.yaml") == changed
