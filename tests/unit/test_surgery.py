"""Changing models: in every place, at the right moment, on the record."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from lightning_tricks._core.checkpoint import read_changes, write_change
from lightning_tricks._core.surgery import StandIn, replace_module, when_built
from lightning_tricks.errors import CheckpointError, NothingMatchedError, TrickError, UnsupportedStrategyError


def test_a_shared_module_is_replaced_in_every_place_and_stays_shared():
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"one": nn.Sequential(norm), "two": nn.Sequential(nn.Identity(), norm)})
    new = nn.LayerNorm(3)
    replace_module(model, norm, new)
    assert model["one"][0] is model["two"][1] is new


def test_a_replaced_module_passes_on_its_mode_and_its_hooks():
    seen = []
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    model[0].register_forward_pre_hook(lambda module, inputs, options: seen.append(len(options)), with_kwargs=True)
    old, new = model[0], nn.LayerNorm(3)
    new.register_forward_hook(lambda module, inputs, output: seen.append("its own"))
    replace_module(model, old, new)
    assert not new.training
    model(torch.ones(2, 3))
    assert seen == [0, "LayerNorm", "its own"]
    handle.remove()
    model(torch.ones(2, 3))
    assert seen[3:] == [0, "its own"]
    old.eval()(torch.ones(2, 3))
    assert len(seen) == 5


class Doubled(StandIn):
    """Gives twice what the module gives."""

    def __call__(self, x):
        return 2 * self.plain(x)


def test_what_stands_in_for_a_module_stands_in_for_the_one_that_replaces_it():
    model = nn.Sequential(nn.ReLU())
    old, inner, outer = model[0], Doubled(model[0]), Doubled(model[0])
    inner.attach()
    outer.attach()
    replace_module(model, old, nn.Tanh())
    x = torch.randn(3)
    torch.testing.assert_close(model(x), 4 * x.tanh())
    torch.testing.assert_close(old(x), x.relu())
    inner.detach()
    torch.testing.assert_close(model(x), 2 * x.tanh())
    outer.detach()
    assert "forward" not in vars(model[0])


def test_a_model_cannot_be_replaced_within_itself():
    model = nn.Linear(2, 2)
    with pytest.raises(TrickError, match="Linear does not hold Linear"):
        replace_module(model, model, nn.Linear(2, 2))


class Late(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def configure_model(self):
        self.calls += 1
        self.layer = nn.Linear(2, 2)


def double(module):
    if not hasattr(module, "layer"):
        msg = "nothing here"
        raise NothingMatchedError(msg)
    module.layer.extra = nn.Parameter(torch.zeros(1))


def test_layers_built_later_are_changed_once_they_are_there():
    module = Late()
    patches = when_built(module, double, trick="Trick()", function="double")
    module.configure_model()
    assert hasattr(module.layer, "extra")
    module.configure_model()
    assert not hasattr(module.layer, "extra")  # once for each use of the Trainer
    patches.undo()
    assert module.calls == 2
    assert "configure_model" not in vars(module)


def test_layers_that_are_there_are_changed_at_once():
    module = Late()
    module.configure_model()
    when_built(module, double, trick="Trick()", function="double")
    assert hasattr(module.layer, "extra")
    assert "configure_model" not in vars(module)


def test_nothing_to_change_is_an_error_unless_more_is_built():
    module = pl.LightningModule()
    with pytest.raises(NothingMatchedError, match="nothing here"):
        when_built(module, double, trick="Trick()", function="double")


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")  # of torch 2.6
def test_layers_that_are_sharded_as_they_are_built_are_refused():
    class Sharded(Late):
        def configure_model(self):
            super().configure_model()
            mesh = init_device_mesh("cpu", (1,))
            self.layer.weight = nn.Parameter(distribute_tensor(self.layer.weight.detach(), mesh))

    module = Sharded()
    when_built(module, double, trick="Trick()", function="double")
    with pytest.raises(UnsupportedStrategyError, match=r"Trick\(\) creates parameters.*Call `functional.double` in between"):
        module.configure_model()


def test_changes_of_keys_are_recorded_in_their_order():
    checkpoint = {}
    assert read_changes(checkpoint) == []
    write_change(checkpoint, "swap_norm", {"source": "batch", "target": "group"})
    write_change(checkpoint, "replace_head", {"num_classes": 3})
    assert read_changes(checkpoint) == [("swap_norm", {"source": "batch", "target": "group"}), ("replace_head", {"num_classes": 3})]
    checkpoint["lightning_tricks"]["version"] = 99
    with pytest.raises(CheckpointError, match="found version 99"):
        read_changes(checkpoint)
