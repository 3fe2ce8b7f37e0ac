"""Loss landscapes against models that are made anew at each place, and models that are left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_tricks as lt
from contracts.harness import assert_equal, weights
from lightning_tricks import errors
from lightning_tricks.diagnostics import LossLandscape, loss_landscape
from lightning_tricks.diagnostics._loss_landscape import normalize_filters
from reference import diagnostics as reference


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2))
    model(torch.randn(8, 1, 4, 4))
    return model


DATA = TensorDataset(torch.randn(11, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(11) % 2)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_is_the_mean_loss_of_models_made_anew_at_each_place(dimensions):
    found = loss_landscape(make(), DataLoader(DATA, batch_size=4), dimensions=dimensions, points=5, span=0.5, seed=3)
    own = dict(make().named_parameters())
    generator = torch.Generator().manual_seed(3)
    drawn = [{name: torch.randn(weight.shape, generator=generator) for name, weight in own.items()} for _ in range(dimensions)]
    directions = [reference.normalize_filters(direction, own) for direction in drawn]
    for mine, its in zip(found.directions, directions, strict=True):
        for name, value in its.items():
            torch.testing.assert_close(mine[name], value)
    inputs, targets = DATA.tensors
    steps = [-0.5, -0.25, 0.0, 0.25, 0.5]
    expected = reference.landscape(make, directions, steps, lambda model: nn.functional.cross_entropy(model(inputs), targets).item())
    assert found.steps.tolist() == steps
    torch.testing.assert_close(found.losses, expected, rtol=1e-4, atol=1e-6)
    assert found.center == pytest.approx(expected.flatten()[expected.numel() // 2].item())


def test_filters_have_the_norms_of_the_weights_and_vectors_stay():
    own = {"w": torch.randn(4, 3, 2), "b": torch.randn(4), "zero": torch.zeros(2, 2)}
    scaled = normalize_filters({name: torch.randn(tensor.shape) for name, tensor in own.items()}, own)
    torch.testing.assert_close(scaled["w"].flatten(1).norm(dim=1), own["w"].flatten(1).norm(dim=1))
    assert not scaled["b"].any()
    assert not scaled["zero"].any()


def test_rescaled_networks_have_the_same_landscape():
    """ReLU lets one layer's weights be multiplied by what the next one's are divided by; without normalization that changes the slice."""

    def network(factor):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[2].weight.div_(factor)
        return model

    data = [(DATA.tensors[0].flatten(1), DATA.tensors[1])]
    one, other = (loss_landscape(network(factor), data, points=5) for factor in (1.0, 16.0))
    torch.testing.assert_close(one.losses, other.losses)
    assert one.losses.std() > 0.01


def test_the_model_and_its_surroundings_are_left_as_they_were_also_after_an_exception():
    model, loader = make().train(), DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))
    model[1].eval()
    before, modes = weights(model), [module.training for module in model.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()

    def fails(model, batch):
        model[1].running_mean += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_landscape(model, loader, loss=fails)
    first = loss_landscape(model, loader, points=3, batches=2)
    second = loss_landscape(model, loader, points=3, batches=2)
    assert torch.equal(first.losses, second.losses)
    assert_equal(weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_buffers_that_a_forward_pass_replaces_are_the_models_own_again():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("cache", None)

        def forward(self, x):
            self.calls, self.cache = self.calls + 1, x
            return super().forward(x)

    model = Counting()
    calls = model.calls
    loss_landscape(model, [(torch.ones(2, 4), torch.tensor([0, 1]))], points=3)
    assert model.calls is calls
    assert calls == 0
    assert model.cache is None


def test_directions_of_another_model_are_normalized_anew():
    model, other = make(), make()
    with torch.no_grad():
        other[5].weight.mul_(3)
    first = loss_landscape(model, [DATA[:4]], points=3)
    second = loss_landscape(other, [DATA[:4]], points=3, directions=first.directions)
    torch.testing.assert_close(second.directions[0]["5.weight"], 3 * first.directions[0]["5.weight"])
    torch.testing.assert_close(second.losses, loss_landscape(other, [DATA[:4]], points=3).losses)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dimensions": 3}, "`dimensions` must be one of 1, 2, got 3."),
        ({"span": 0}, "`span` must lie in (0, ∞), got 0."),
        ({"points": 4}, "`points` must be odd, so that the model itself is in the middle, got 4."),
        ({"points": 1}, "`points` must be a whole number of at least 3, got 1."),
        ({"batches": 0}, "`batches` must be a whole number of at least 1, got 0."),
        ({"seed": -1}, "`seed` must be a whole number of at least 0, got -1."),
        (
            {"directions": [{"0.weight": torch.ones(1)}]},
            "`directions` must be 1 mapping(s), as `dimensions=1` says, from the model's 6 names",
        ),
        ({"loss": lambda *_: 1.0}, "`loss` must return the mean loss of a batch, a tensor of one number, and returned 1.0."),
        ({"loss": lambda *_: torch.ones(4)}, "a tensor of one number, and returned a tensor of shape (4,). Take its mean."),
        ({"loader": []}, "`loader` must yield at least one batch with samples, and yielded none."),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_wrong_arguments_are_refused_and_leave_the_model(arguments, words):
    model = make()
    with pytest.raises(errors.ArgumentError) as raised:
        loss_landscape(model, **{"loader": [DATA[:4]], **arguments})
    assert words in str(raised.value)
    assert_equal(weights(model), weights(make()))


@pytest.mark.full
def test_pictures_show_one_model_or_several(tmp_path):
    model, smoothed = make(), make()
    lt.functional.initialize(smoothed, "xavier_normal")
    for dimensions in (1, 2):
        one, other = (loss_landscape(each, [DATA[:]], dimensions=dimensions, points=5) for each in (model, smoothed))
        path = one.plot(tmp_path / "new" / f"{dimensions}.png", label="before", others={"after": other})
        assert path.read_bytes().startswith(b"\x89PNG")
        alone = one.plot(tmp_path / "alone.png")
        assert alone.read_bytes() != path.read_bytes()
    flat = LossLandscape(torch.ones(3), torch.linspace(-1, 1, 3), ())
    with pytest.raises(errors.ArgumentError, match="as many directions as this one, 2"):
        one.plot(tmp_path / "mixed.png", others={"flat": flat})


def test_is_public_in_both_places():
    assert lt.diagnostics.loss_landscape is lt.functional.loss_landscape
