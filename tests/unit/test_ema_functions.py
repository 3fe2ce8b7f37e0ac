import math

import pytest
import torch

from lightning_tricks import errors, functional
from reference.ema import decay_at, ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_updates_equal_the_formula(dtype, decay):
    torch.manual_seed(0)
    history = [[torch.randn(3, 2, dtype=dtype), torch.randn((), dtype=dtype), torch.randn(0, 4, dtype=dtype)] for _ in range(20)]
    average = [tensor.clone() for tensor in history[0]]
    expected = [tensor.clone().to(torch.promote_types(dtype, torch.float64)) for tensor in history[0]]
    for current in history[1:]:
        functional.ema_update_(average, current, decay)
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, current, strict=True)]
    for got, wanted in zip(average, expected, strict=True):
        torch.testing.assert_close(got, wanted.to(dtype))


def test_a_float32_average_of_bfloat16_weights_moves_where_a_bfloat16_average_stands_still():
    current = [torch.full((4,), 2.0, dtype=torch.bfloat16)]
    precise, coarse = [torch.ones(4)], [torch.ones(4, dtype=torch.bfloat16)]
    for _ in range(5000):
        functional.ema_update_(precise, current, 0.999)
        functional.ema_update_(coarse, current, 0.999)
    torch.testing.assert_close(precise[0], torch.full((4,), 2 - 0.999**5000))
    assert torch.equal(coarse[0], torch.ones(4, dtype=torch.bfloat16))


def test_large_tensors_of_another_dtype_are_updated_in_pieces():
    current = [torch.randn(3, 1_500_000).half(), torch.randn(1, 2, 900_000).half(), torch.randn(40, 70_000).half().t()]
    average = [torch.zeros(tensor.shape) for tensor in current]
    functional.ema_update_(average, current, 0.75)
    for got, wanted in zip(average, current, strict=True):
        torch.testing.assert_close(got, 0.25 * wanted.float())


def test_channels_last_and_strided_tensors():
    current = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(6, 4)[:, ::2]]
    average = [torch.zeros(2, 3, 4, 5), torch.zeros(6, 2)]
    functional.ema_update_(average, current, 0.5)
    for got, wanted in zip(average, current, strict=True):
        torch.testing.assert_close(got, 0.5 * wanted)


@pytest.mark.parametrize(
    ("average", "current", "decay", "words"),
    [
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, "`decay` must lie in [0, 1], got 1.5."),
        ([torch.zeros(2)], [torch.zeros(3)], 0.5, "the same shapes"),
        ([torch.zeros(2)], [], 0.5, "the same shapes"),
        (
            torch.zeros(2),
            torch.zeros(2),
            0.5,
            "`average` must be an iterable of floating-point tensors, such as `model.parameters()`, got a Tensor.",
        ),
        ([torch.zeros(2)], [1.0], 0.5, "`current` must be an iterable of floating-point tensors"),
        ([torch.zeros(2)], None, 0.5, "got a NoneType."),
        ([torch.zeros(2, dtype=torch.int64)], [torch.ones(2)], 0.5, "got torch.int64."),
    ],
)
def test_wrong_arguments_change_nothing(average, current, decay, words):
    with pytest.raises(errors.ArgumentError) as raised:
        functional.ema_update_(average, current, decay)
    assert words in str(raised.value)
    assert all((tensor == 0).all() for tensor in average)


def test_parameters_can_be_passed_as_they_come():
    net, twin = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    expected = 0.5 * net.weight + 0.5 * twin.weight
    functional.ema_update_(net.parameters(), twin.parameters(), 0.5)
    torch.testing.assert_close(net.weight, expected)


def test_nothing_is_differentiated():
    weight = torch.nn.Parameter(torch.ones(3))
    average = [torch.zeros(3)]
    functional.ema_update_(average, [weight], 0.5)
    assert not average[0].requires_grad


@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_decay_of_an_update_is_the_product_over_its_steps(warmup, every):
    for step in range(0, 30, every):
        expected = math.prod(decay_at(t, 0.6, warmup) for t in range(step, step + every))
        assert functional.ema_decay(step, 0.6, warmup=warmup, steps=every) == pytest.approx(expected)


def test_warm_up_follows_the_published_values():
    assert [round(functional.ema_decay(t, 0.999, warmup=1000), 4) for t in (0, 1, 8, 90)] == [0.1, 0.1818, 0.5, 0.91]


def test_the_reference_forgets_half_in_a_half_life():
    """The reference itself, on a jump from 0 to 1."""
    history = [torch.tensor(0.0)] + [torch.tensor(1.0)] * 50
    assert ema(history, 0.5 ** (1 / 50)).item() == pytest.approx(0.5)
