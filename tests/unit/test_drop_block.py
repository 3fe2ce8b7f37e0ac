"""DropBlock: formulas, masks, shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from lightning_tricks import errors
from lightning_tricks._core.generators import bernoulli
from lightning_tricks._core.surgery import stand_ins
from lightning_tricks.functional import apply_drop_block
from lightning_tricks.stochastic._drawing import Drawing
from lightning_tricks.stochastic._drop_block import grow, seed_rate
from reference import drop_block as reference


def identity(rate: float, block_size: int, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Identity())
    apply_drop_block(model, rate, block_size=block_size, where="0", **options)
    return model


SIZES = [(9,), (7, 6), (5, 4, 6)]


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_equal_the_papers_algorithm(sizes, block):
    model = identity(0.4, block)
    x = torch.randn(2, 3, *sizes, dtype=torch.float64, requires_grad=True)
    y = model(x)
    (held,) = stand_ins(model, Drawing)
    blocks = [min(block, size) for size in sizes]
    rate = seed_rate(torch.tensor(0.4, dtype=torch.float64), sizes, blocks)
    assert float(rate) == pytest.approx(reference.gamma(0.4, sizes, block))
    places = [size - side + 1 for size, side in zip(sizes, blocks, strict=True)]
    begins = bernoulli(held.key(held.clock), rate, [2, 3, *places], x.device)
    expected = reference.drop_block(x, begins, block)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)  # masks are of single precision
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)), rtol=1e-5, atol=0)
    assert float(held.dropped) == pytest.approx(float((y == 0).double().mean()), abs=1e-6)
    assert 0 < float(held.dropped) < 1


@pytest.mark.parametrize("block", [1, 2, 3, 4, 6, 7])
def test_blocks_grow_as_max_pooling_grows_them(block):
    begins = torch.rand(4, 2, 10 - block, 12 - block, generator=torch.Generator().manual_seed(block)) < 0.1
    side = block - 1
    padded = nn.functional.pad(begins.float(), [side] * 4)
    assert torch.equal(grow(begins, [block, block]), nn.functional.max_pool2d(padded, block, stride=1).bool())


def test_each_position_is_dropped_as_often_as_blocks_cover_it():
    sizes, block, rate, draws = (6, 5), 3, 0.3, 4000
    model = identity(rate, block)
    x = torch.ones(draws, 1, *sizes)
    kept = (model(x) != 0).double().mean((0, 1))
    for place in product(*(range(size) for size in sizes)):
        share = (1 - reference.gamma(rate, sizes, block)) ** reference.covering(place, sizes, block)
        assert abs(kept[place] - share) < 5 * (share * (1 - share) / draws) ** 0.5


def test_the_mean_of_what_is_left_stays():
    y = identity(0.2, 3)(torch.ones(64, 8, 14, 14))
    assert y.mean() == pytest.approx(1.0, abs=1e-5)


def test_a_block_as_large_as_the_map_drops_channels_and_one_of_a_single_position_is_dropout():
    y = identity(0.5, 7)(torch.ones(50, 8, 4, 4))
    share = y.flatten(2).bool()
    assert torch.equal(share.all(-1), share.any(-1))
    assert abs(share.double().mean() - 0.5) < 5 * 0.5 / 400**0.5
    y = identity(0.5, 1)(torch.ones(10, 8, 10, 10))
    assert abs((y != 0).double().mean() - 0.5) < 5 * 0.5 / 8000**0.5


def test_one_mask_for_all_channels():
    kept = identity(0.4, 2, per="sample")(torch.ones(16, 5, 8, 8)) != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert len({tuple(sample.flatten().tolist()) for sample in kept}) > 1
    kept = identity(0.4, 2)(torch.ones(16, 5, 8, 8)) != 0
    assert not torch.equal(kept, kept[:, :1].expand_as(kept))


def test_a_batch_of_which_nothing_is_left_is_zero():
    model = identity(0.999, 3)
    outputs = torch.stack([model(torch.ones(1, 1, 3, 3)) for _ in range(20)])
    assert outputs.isfinite().all()
    assert (outputs == 0).all((1, 2, 3, 4)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_stays(dtype):
    y = identity(0.2, 3)(torch.ones(8, 4, 12, 12, dtype=dtype))
    assert y.dtype == dtype
    assert y.double().mean() == pytest.approx(1.0, abs=0.01)


def test_evaluation_is_the_plain_network():
    model, x = identity(0.5, 3), torch.randn(2, 3, 8, 8)
    assert model.eval()(x) is x
    assert not torch.equal(model.train()(x), x)


@pytest.mark.parametrize(("value", "found"), [(torch.ones(2, 3), r"one of shape \(2, 3\)"), ((torch.ones(2, 3, 4),), "a tuple")])
def test_what_is_no_feature_map_is_refused(value, found):
    with pytest.raises(errors.TrickError, match=f"'0' returned {found}. Exclude it"):
        identity(0.5, 3)(value)
