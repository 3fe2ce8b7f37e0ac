"""Fractional max pooling: borders, regions, sizes, modules, and what no longer fits."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_tricks as lt
from contracts.harness import Loader, PoolNet, fit, make_trainer
from lightning_tricks import errors
from lightning_tricks._core.draws import mix, uniform
from lightning_tricks._core.surgery import stand_ins
from lightning_tricks.functional import apply_fractional_max_pool, remove_fractional_max_pool
from lightning_tricks.stochastic._fractional_pooling import borders, fractional_max_pool
from lightning_tricks.stochastic._fractional_stand_ins import Watch
from reference import fractional_max_pool as reference

MODES = ["random", "pseudorandom"]


def keys(count: int):
    return [mix(torch.tensor(key)) for key in range(count)]


# Borders


@pytest.mark.parametrize(("reach", "count"), [(7, 4), (11, 6), (35, 25), (13, 4), (8, 8), (9, 3), (5, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_borders_reach_from_end_to_end_in_the_two_next_whole_steps(mode, reach, count):
    seen = set()
    for key in keys(60):
        a = borders(key, reach, count, mode=mode)
        assert (int(a[0]), int(a[-1]), len(a)) == (0, reach, count + 1)
        steps = a.diff().tolist()
        assert set(steps) <= {reach // count, -(-reach // count)}
        seen.add(tuple(steps))
    assert (len(seen) == 1) == (reach % count == 0)


def test_random_steps_come_in_every_order_equally_often():
    draws = 2400
    steps = torch.stack([borders(key, 6, 4, mode="random").diff() for key in keys(draws)])  # two ones and two twos
    orders, counts = steps.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts / draws - 1 / 6).abs() < 5 * (1 / 6 * 5 / 6 / draws) ** 0.5).all()


@pytest.mark.parametrize(("reach", "count"), [(7, 4), (35, 25), (13, 9)])
def test_pseudorandom_borders_are_those_of_the_paper(reach, count):
    for key in keys(40):
        u = Fraction(float(uniform(key)))
        assert borders(key, reach, count, mode="pseudorandom").tolist() == reference.pseudorandom(Fraction(reach, count), u, count)


# Regions


@pytest.mark.parametrize("overlapping", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("before", "after"), [((9, 8), (5, 6)), ((9, 8), (9, 3)), ((6, 5, 7), (4, 3, 5))])
def test_outputs_and_gradients_equal_a_loop_over_regions(before, after, mode, overlapping):
    x = torch.randn(2, 3, *before, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for key in keys(5):
        y = fractional_max_pool(x, key, after, mode=mode, overlapping=overlapping)
        axes = []
        for axis, (old, new) in enumerate(zip(before, after, strict=True)):
            overlap = overlapping and new < old  # an axis that keeps its size is left as it is
            a = borders(mix(key + axis), old - overlap, new, mode=mode).tolist()
            axes.append(reference.regions(a, overlapping=overlap))
        expected = reference.pool(x, axes)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, expected)))
        one = fractional_max_pool(x[0], key, after, mode=mode, overlapping=overlapping)
        assert torch.equal(one, y[0])


def test_regions_that_divide_a_map_evenly_are_those_of_max_pooling_to_the_bit():
    x = torch.randint(0, 3, (4, 2, 8, 8)).float().requires_grad_()  # with many equal values
    y = fractional_max_pool(x, torch.tensor(1), [4, 4], mode="random", overlapping=False)
    plain = nn.functional.max_pool2d(x, 2)
    assert torch.equal(y, plain)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, plain)))


def test_samples_and_channels_share_regions():
    """Those of torch's `FractionalMaxPool2d` differ from channel to channel, and are drawn in evaluation, too."""
    x = torch.randn(1, 1, 16, 16).expand(4, 8, 16, 16)
    pool = lt.nn.FractionalMaxPool2d(1.4)
    y = pool(x)
    assert torch.equal(y, y[:1, :1].expand_as(y))
    theirs = nn.FractionalMaxPool2d(2, output_ratio=1 / 1.4).eval()
    assert not torch.equal(theirs(x), theirs(x)[:1, :1].expand_as(y))
    assert torch.equal(pool.eval()(x), pool(x))


def test_memory_stays_channels_last():
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    pool = lt.nn.FractionalMaxPool2d(1.5).eval()
    assert pool(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pool(x), pool(x.contiguous()))


# Modules


@pytest.mark.parametrize(("kind", "shape"), [(lt.nn.FractionalMaxPool2d, (12, 9)), (lt.nn.FractionalMaxPool3d, (6, 9, 12))])
def test_modules_shrink_by_their_ratio_and_draw_in_training_alone(kind, shape):
    pool, x = kind(1.5), torch.randn(2, 3, *shape)
    state = torch.get_rng_state()
    outputs = [pool(x) for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(output.shape[2:] == tuple(size * 2 // 3 for size in shape) for output in outputs)
    assert not all(torch.equal(outputs[0], output) for output in outputs)
    assert repr(pool) == f"{kind.__name__}(ratio=1.5, mode='random', overlapping=True)"


def test_a_module_that_is_loaded_goes_on_with_the_regions_that_would_have_come():
    pool, x = lt.nn.FractionalMaxPool2d(1.3), torch.randn(1, 1, 20, 20)
    pool(x)
    twin = lt.nn.FractionalMaxPool2d(1.3)
    twin.load_state_dict(pool.state_dict())
    assert all(torch.equal(pool(x), twin(x)) for _ in range(3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_draws_the_same_where_activation_checkpointing_repeats_it(reentrant):
    x, gradients = torch.randn(1, 2, 20, 20), []
    pool = lt.nn.FractionalMaxPool2d(1.3)
    for checkpointed in (False, True):
        leaf, twin = x.clone().requires_grad_(), copy.deepcopy(pool)
        y = checkpoint(twin, leaf, use_reentrant=reentrant, preserve_rng_state=False) if checkpointed else twin(leaf)
        y.square().sum().backward()
        gradients.append(leaf.grad)
        assert twin.draws == pool.draws + 1
    assert torch.equal(*gradients)


@pytest.mark.full
def test_a_module_compiles_whole_and_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pool, x = lt.nn.FractionalMaxPool2d(1.4), torch.randn(1, 2, 14, 14)
    twin = copy.deepcopy(pool)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), pool(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_modules_refuse_what_they_cannot_pool():
    with pytest.raises(errors.ArgumentError, match=r"`ratio` must lie in \(1, ∞\), got 1\."):
        lt.nn.FractionalMaxPool2d(1)
    with pytest.raises(errors.TrickError, match=r"FractionalMaxPool2d takes 3 or 4 dimensions, got \(3, 4\)\."):
        lt.nn.FractionalMaxPool2d(1.5)(torch.ones(3, 4))
    with pytest.raises(errors.TrickError, match=r"was to make 0 of 1: \(1, 1, 1, 5\)\."):
        lt.nn.FractionalMaxPool2d(1.5)(torch.ones(1, 1, 1, 5))


# In place of max pooling


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
        nn.MaxPool2d(2, 3, 1, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool3d((1, 2, 2)),
        nn.MaxPool3d(3, 2, 1),
        lt.nn.FractionalMaxPool2d(1.7),
    ],
    ids=repr,
)
def test_sizes_are_those_of_the_layer_that_is_replaced(pool):
    deep = isinstance(pool, nn.MaxPool3d)
    for shape in [(7, 8, 9), (10, 11, 12)]:
        x = torch.randn(1, 1, *shape) if deep else torch.randn(1, 1, *shape[1:])
        model = nn.Sequential(pool)
        plain = model(x)
        apply_fractional_max_pool(model)
        assert model(x).shape == plain.shape
        remove_fractional_max_pool(model)
        assert model(x).shape == plain.shape


def test_a_ratio_changes_sizes_and_evaluation_is_fixed():
    model = nn.Sequential(nn.MaxPool2d(2))
    apply_fractional_max_pool(model, 1.25, mode="pseudorandom")
    x = torch.randn(1, 2, 20, 20)
    outputs = [model(x) for _ in range(5)]
    assert outputs[0].shape == (1, 2, 16, 16)
    assert not all(torch.equal(outputs[0], output) for output in outputs)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_several_passes_are_averaged_in_evaluation():
    model, x = nn.Sequential(nn.MaxPool2d(2)).eval(), torch.randn(1, 2, 12, 12)
    apply_fractional_max_pool(model, samples=4)
    averaged = model(x)
    passes = []
    for number in range(4):
        model[0].forward.passes.set(number)
        passes.append(model[0](x))
    assert len({tuple(each.flatten().tolist()) for each in passes}) > 1
    torch.testing.assert_close(averaged, torch.stack(passes).mean(0))
    model.train()
    assert not torch.equal(model(x), model(x))


class Layered(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_an_example_shows_which_layer_does_not_fit_and_leaves_the_model_as_it_was():
    model, x = Layered(36), torch.zeros(5, 1, 8, 8)
    plain = model(x)
    words = r"made 'body.1' return maps of 4×4 in place of 3×3, and 'head', a Linear, does not fit what it gets, \(5, 64\): .*`ratio=None`"
    with pytest.raises(errors.TrickError, match=words):
        apply_fractional_max_pool(model, 1.5, example=x)
    assert torch.equal(model(x), plain)
    assert apply_fractional_max_pool(model, example=x).names == ("body.1",)
    assert apply_fractional_max_pool(Layered(64), 1.5, example=(x,)).names == ("body.1",)


def test_layers_that_cannot_be_changed_are_reported():
    class Own(nn.MaxPool2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, [1] * 4))

    model = nn.ModuleDict({"own": Own(2), "indices": nn.MaxPool2d(2, return_indices=True), "same": nn.MaxPool2d(3, 1, 1)})
    reasons = {
        "own": "is a Own, which pools in its own way",
        "indices": "returns indices beside its output",
        "same": "does not make maps smaller",
    }
    with pytest.raises(errors.NothingMatchedError, match=r"'own' is a Own, .*; 'indices' returns indices .*; 'same' does not"):
        apply_fractional_max_pool(model)
    model["plain"] = nn.MaxPool2d(2)
    report = apply_fractional_max_pool(model)
    assert (report.names, report.left) == (("plain",), reasons)
    with pytest.raises(errors.NothingMatchedError, match=r"Linear has no layer `nn.MaxPool2d` or `nn.MaxPool3d`"):
        apply_fractional_max_pool(nn.Linear(2, 2))


# In a fit


class Wide(PoolNet):
    """A PoolNet whose neck takes maps of 4×4 in place of 3×3."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.tied = nn.Linear(256, 8), nn.Linear(256, 8)


@pytest.mark.parametrize("validate", [True, False])  # the sanity check comes first
def test_a_fit_with_a_head_that_does_not_fit_names_it(validate):
    module = PoolNet()
    trick = lt.FractionalMaxPool(1.5)
    words = r"FractionalMaxPool\(ratio=1.5\) made 'body.4' return maps of 4×4 in place of 3×3, and 'neck', a Linear, does not fit"
    with pytest.raises(errors.TrickError, match=words):
        make_trainer([trick], num_sanity_val_steps=1).fit(module, Loader(), Loader(2) if validate else None)
    assert not any("forward" in vars(each) for each in module.modules())


def test_other_errors_of_the_first_batch_are_those_of_the_model():
    class Broken(Wide):
        def forward(self, x):
            msg = "the model's own"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="the model's own"):
        fit([lt.FractionalMaxPool(1.5)], Broken)


def test_a_ratio_trains_validates_and_tests_and_layers_are_watched_in_the_first_batch_alone():
    class Counts(Wide):
        def __init__(self):
            super().__init__()
            self.watched = []

        def training_step(self, batch, batch_idx):
            self.watched.append(len(stand_ins(self, Watch)))
            return super().training_step(batch, batch_idx)

    run = fit([lt.FractionalMaxPool(1.5)], Counts, max_epochs=1)
    assert run.module.watched[0] > 5
    assert run.module.watched[1:] == [0] * 4
    for evaluate in (run.trainer.validate, run.trainer.test):
        losses = [evaluate(run.module, Loader(2), verbose=False)[0] for _ in range(2)]
        assert losses[0] == losses[1]
    assert len(run.trainer.predict(run.module, Loader(2))) == 2
    assert not any("forward" in vars(each) for each in run.module.modules())


def test_evaluations_average_passes_of_forward_or_say_that_there_was_none():
    module = PoolNet()
    losses = {}
    for samples in (1, 6):
        trainer = make_trainer([lt.FractionalMaxPool(samples=samples)])
        losses[samples] = trainer.validate(module, Loader(2), verbose=False)[0]["val_loss"]
    assert losses[1] != losses[6]

    class Around(PoolNet):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.body(batch[0]).mean())

    with pytest.raises(errors.TrickError, match=r"averages outputs of the module's `forward`, which was not called\. Call `self\(x\)`"):
        make_trainer([lt.FractionalMaxPool(samples=2)]).validate(Around(), Loader(2), verbose=False)


def test_layers_built_in_configure_model_are_found():
    class Late(PoolNet):
        def __init__(self):
            super().__init__()
            self.body[4] = nn.Identity()
            self.pools = []

        def configure_model(self):
            if not isinstance(self.body[4], nn.MaxPool2d):
                self.body[4] = nn.MaxPool2d(2)

        def note(self, batch_idx):
            self.pools.append("forward" in vars(self.body[4]))

    for use in ("fit", "validate", "test", "predict"):
        module, trainer = Late(), make_trainer([lt.FractionalMaxPool()], max_epochs=1)
        loaders = (Loader(), Loader(1)) if use == "fit" else (Loader(1),)
        getattr(trainer, use)(module, *loaders, **({"verbose": False} if use in {"validate", "test"} else {}))
        assert module.pools == [True]
        assert "forward" not in vars(module.body[4])
