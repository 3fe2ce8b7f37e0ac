"""Soups: what they average, whom they take, and what they refuse."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_tricks as lt
from contracts.harness import Net, fit
from lightning_tricks import errors, functional
from lightning_tricks.averaging import _soup
from reference.soup import greedy, mean


def save(folder, *models, **options):
    """Save models under names that sort in the order given."""
    paths = [folder / f"{index:02d}.pt" for index in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        torch.save(model, path, **options)
    return paths


def random_models(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return [
        {"weight": torch.randn(4, 3, generator=generator).to(dtype), "steps": torch.tensor(10 * index), "mask": torch.tensor([index > 0])}
        for index in range(count)
    ]


def scalars(*values):
    return [{"weight": torch.tensor([float(value)])} for value in values]


def near(target):
    return lambda state: -abs(state["weight"].mean().item() - target)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# The uniform soup


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_uniform_equals_the_reference(tmp_path, dtype, count):
    models = random_models(count, dtype)
    assert_same(functional.uniform_soup(save(tmp_path, *models)), mean(models))


def test_uniform_accepts_paths_of_every_kind_from_any_iterable(tmp_path):
    models = random_models(2)
    first, second = save(tmp_path, *models)
    assert_same(functional.uniform_soup(path for path in (str(first), second)), mean(models))


def test_a_path_given_twice_counts_twice(tmp_path):
    low, high = save(tmp_path, *scalars(0, 3))
    assert functional.uniform_soup([low, high, high])["weight"].item() == 2
    assert functional.uniform_soup([high, high])["weight"].item() == 3


def test_low_precision_is_summed_in_high(tmp_path):
    big = torch.tensor([60000.0], dtype=torch.float16)  # twice this is no float16
    assert functional.uniform_soup(save(tmp_path, *[{"w": big}] * 3))["w"].item() == 60000
    ones = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]  # in float32, the 1 is lost
    assert functional.uniform_soup(save(tmp_path, *ones))["w"].item() == pytest.approx(1 / 3)


def test_infinities_that_agree_stay(tmp_path):
    models = [{"mask": torch.tensor([-math.inf, math.inf, value])} for value in (1.0, 3.0, 5.0)]
    paths = save(tmp_path, *models)
    assert functional.uniform_soup(paths)["mask"].tolist() == [-math.inf, math.inf, 3.0]
    soup = functional.greedy_soup(paths, lambda state: -abs(state["mask"][2].item() - 4))
    assert soup.state_dict["mask"].tolist() == [-math.inf, math.inf, 4.0]
    assert soup.members == (paths[1], paths[2])


def test_complex_and_empty_tensors_and_scalars(tmp_path):
    models = [{"c": torch.tensor([value + 1j]), "empty": torch.zeros(0, 3), "scalar": torch.tensor(value)} for value in (1.0, 2.0)]
    soup = functional.uniform_soup(save(tmp_path, *models))
    assert soup["c"].tolist() == [1.5 + 1j]
    assert soup["empty"].shape == (0, 3)
    assert soup["scalar"].item() == 1.5


def test_what_is_not_averaged_is_the_first_files_or_the_best_models(tmp_path):
    models = [{**model, "_extra_state": {"note": index}} for index, model in enumerate(random_models(3))]
    paths = save(tmp_path, *models)
    uniform = functional.uniform_soup(paths)
    assert (uniform["steps"].item(), uniform["mask"].item(), uniform["_extra_state"]) == (0, False, {"note": 0})
    soup = functional.greedy_soup(paths, lambda state: state["steps"].item()).state_dict
    assert (soup["steps"].item(), soup["mask"].item(), soup["_extra_state"]) == (20, True, {"note": 2})


def test_the_soup_does_not_depend_on_the_files_afterwards(tmp_path):
    models = random_models(2)
    paths = save(tmp_path, *models)
    soup = functional.uniform_soup(paths)
    for path in paths:
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(soup, mean(models))


def test_parameters_become_plain_tensors(tmp_path):
    paths = save(tmp_path, *[dict(nn.Linear(2, 1).named_parameters()) for _ in range(2)])
    assert not any(isinstance(value, nn.Parameter) or value.requires_grad for value in functional.uniform_soup(paths).values())


def test_the_older_format_of_torch_is_read_too(tmp_path):
    models = random_models(2)
    assert_same(functional.uniform_soup(save(tmp_path, *models, _use_new_zipfile_serialization=False)), mean(models))


def test_tied_weights_stay_tied_where_they_agree(tmp_path):
    values = [torch.full((3,), float(index)) for index in range(4)]
    tied = save(tmp_path, *[{"a": value, "b": value, "c": value[:2]} for value in values[:2]])
    soup = functional.uniform_soup(tied)
    assert soup["a"] is soup["b"]
    assert soup["c"].tolist() == [0.5, 0.5]
    untied = save(tmp_path, {"a": values[0], "b": values[0]}, {"a": values[2], "b": values[3]})
    soup = functional.uniform_soup(untied)
    assert (soup["a"].tolist(), soup["b"].tolist()) == ([1.0] * 3, [1.5] * 3)


def test_a_state_dict_keeps_its_versions_and_loads_strictly(tmp_path):
    nets = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(3)]
    soup = functional.uniform_soup(save(tmp_path, *[net.state_dict() for net in nets]))
    assert soup._metadata["1"] == {"version": 2}
    assert list(soup) == list(nets[0].state_dict())
    assert nets[0].load_state_dict(soup, strict=True).missing_keys == []


def test_only_one_checkpoint_is_loaded_at_a_time(tmp_path, monkeypatch):
    import gc
    import weakref

    alive, most, load = weakref.WeakSet(), [], _soup.read_state_dict

    class Watched(OrderedDict):
        __hash__ = object.__hash__

    def watch(path):
        gc.collect()
        most.append(len(alive))
        alive.add(weights := Watched(load(path)))
        return weights

    monkeypatch.setattr(_soup, "read_state_dict", watch)
    paths = save(tmp_path, *random_models(6))
    functional.uniform_soup(paths)
    functional.greedy_soup(paths, near(0))
    assert most == [0] * len(most)
    assert len(most) == 6 + (6 + 6 + 6)


# The greedy soup


@pytest.mark.parametrize("seed", range(20))
def test_greedy_equals_the_reference(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    models = [{"weight": torch.randn(3, generator=generator), "n": torch.tensor(i)} for i in range(6)]
    target = torch.randn(3, generator=generator) * 0.3

    def score(state):
        return -(state["weight"] - target).square().sum().item()

    paths = save(tmp_path, *models)
    soup = functional.greedy_soup(paths, score)
    expected, members = greedy(models, score)
    assert soup.members == tuple(paths[index] for index in members)
    assert_same(soup.state_dict, expected)
    assert soup.score == score(soup.state_dict) == score(expected)
    assert soup.scores == {path: score(model) for path, model in zip(paths, models, strict=True)}


def test_greedy_tries_equal_scores_in_the_order_given(tmp_path):
    paths = save(tmp_path, *scalars(3, 1, 3, 1))  # all as near to 2
    soup = functional.greedy_soup(paths, near(2))
    assert soup.members == (paths[0], paths[1])
    assert functional.greedy_soup(paths[::-1], near(2)).members == (paths[3], paths[2])


def test_greedy_adds_only_what_is_strictly_better(tmp_path):
    paths = save(tmp_path, *scalars(1, 2, 3))
    soup = functional.greedy_soup(paths, lambda state: 0.5)
    assert soup.members == (paths[0],)
    assert soup.state_dict["weight"].item() == 1


def test_greedy_goes_on_after_one_that_does_not_help(tmp_path):
    paths = save(tmp_path, *scalars(3, 4, 0))
    soup = functional.greedy_soup(paths, near(2))  # 3 alone, not with 4 (whose score is that of 0, and which is tried first), but with 0
    assert soup.members == (paths[0], paths[2])
    assert soup.score == -0.5


def test_score_is_called_once_for_each_model_and_for_each_soup(tmp_path):
    seen = []

    def score(state):
        seen.append(state["weight"].item())
        return near(2)(state)

    functional.greedy_soup(save(tmp_path, *scalars(6, 1, 3.5)), score)
    assert seen == [6, 1, 3.5, 2.25, 3.5]


def test_a_path_given_twice_is_tried_once(tmp_path):
    low, high = save(tmp_path, *scalars(0, 3))
    seen = []
    soup = functional.greedy_soup([low, high, str(high)], lambda state: seen.append(state) or near(2)(state))
    assert len(seen) == 3
    assert soup.members == (high, low)
    assert list(soup.scores) == [low, high]


def test_a_score_that_changes_what_it_is_given_does_no_harm(tmp_path):
    models = scalars(1, 3, 8)

    def score(state):
        value = near(2)(state)
        state["weight"].zero_()
        state.clear()
        return value

    paths = save(tmp_path, *models)
    assert functional.greedy_soup(paths, score).state_dict["weight"].item() == 2
    assert_same(functional.uniform_soup(paths), mean(models))


def test_scores_may_be_tensors(tmp_path):
    soup = functional.greedy_soup(save(tmp_path, *scalars(1, 3)), lambda state: -(state["weight"] - 2).abs().requires_grad_())
    assert (soup.score, type(soup.score)) == (0.0, float)


def test_a_soup_is_frozen_and_prints_without_its_weights(tmp_path):
    (path,) = save(tmp_path, *scalars(1))
    soup = functional.greedy_soup([path], near(2))
    assert repr(soup) == f"Soup(members=({path!r},), score=-1.0, scores={{{path!r}: -1.0}})"
    with pytest.raises(FrozenInstanceError):
        soup.score = 1.0


# What is refused


@pytest.mark.parametrize(
    "recipe", [functional.uniform_soup, lambda paths: functional.greedy_soup(paths, near(0))], ids=["uniform", "greedy"]
)
class TestRefused:
    @pytest.mark.parametrize("paths", [[], iter(()), "a.ckpt", Path("a.ckpt"), b"a", [1], [b"a"], 3, None], ids=repr)
    def test_paths_that_are_none(self, recipe, paths):
        with pytest.raises(errors.ArgumentError, match="`paths` must be paths of checkpoints, at least one"):
            recipe(paths)

    def test_one_path_outside_a_list(self, recipe):
        with pytest.raises(errors.ArgumentError, match=r"got 'a\.ckpt'; put it into a list"):
            recipe("a.ckpt")

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ({"weight": torch.zeros(2)}, "has a float32 tensor of shape (2,) under 'weight', and"),
            ({"weight": torch.zeros(1).half()}, "has a float16 tensor of shape (1,) under 'weight', and"),
            ({"bias": torch.zeros(1)}, "has nothing under 'weight', and"),
            ({"weight": torch.zeros(1), "bias": torch.zeros(1)}, "has a float32 tensor of shape (1,) under 'bias', and"),
            ({"weight": None, "bias": torch.zeros(1)}, "has something other than a tensor under 'weight', and"),
        ],
    )
    def test_files_that_disagree(self, recipe, tmp_path, other, words):
        paths = save(tmp_path, *scalars(1, 2), other)
        with pytest.raises(errors.CheckpointError) as caught:
            recipe(paths)
        assert f"'{paths[2]}' {words} '{paths[0]}' has" in str(caught.value)

    def test_a_missing_file(self, recipe, tmp_path):
        with pytest.raises(errors.CheckpointError, match=r"'.*gone.pt' does not exist"):
            recipe([*save(tmp_path, *scalars(1)), tmp_path / "gone.pt"])

    def test_a_folder(self, recipe, tmp_path):
        with pytest.raises(errors.CheckpointError, match="is a folder; consolidate a sharded checkpoint"):
            recipe([tmp_path])

    @pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no checkpoint"])
    def test_a_damaged_file(self, recipe, tmp_path, damage):
        paths = save(tmp_path, *random_models(2))
        paths[1].write_bytes(damage(paths[1].read_bytes()))
        with pytest.raises(
            errors.CheckpointError, match=r"(?s)01.pt' must be a checkpoint that .* can read.*The file is damaged, or"
        ) as caught:
            recipe(paths)
        assert caught.value.__cause__ is not None

    def test_objects_that_could_run_code(self, recipe, tmp_path):
        paths = save(tmp_path, {"state_dict": scalars(1)[0], "hyper_parameters": {"folder": tmp_path, "model": nn.ReLU()}})
        with pytest.raises(errors.CheckpointError, match="save its 'state_dict' alone"):
            recipe(paths)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([1, 2], "got a list"),
            (torch.zeros(2), "got a Tensor"),
            ({}, "got a dict"),
            ({"epoch": 3}, r"got the names \['epoch'\]"),
            ({"n": torch.tensor(3)}, r"got the names \['n'\]"),
            ({"model": scalars(1)[0], "loss": torch.tensor(0.5)}, "got 'model' in it is no tensor"),
        ],
    )
    def test_what_is_no_state_dict(self, recipe, tmp_path, content, words):
        with pytest.raises(errors.CheckpointError, match=words):
            recipe(save(tmp_path, content))


def test_greedy_checks_all_files_before_it_scores_any(tmp_path):
    def score(state):
        pytest.fail("scored")

    with pytest.raises(errors.CheckpointError):
        functional.greedy_soup(save(tmp_path, *scalars(1, 2), {"weight": torch.zeros(2)}), score)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.5", torch.zeros(2), torch.tensor(math.nan), 1j], ids=repr)
def test_a_score_must_be_a_finite_number(tmp_path, value):
    paths = save(tmp_path, *scalars(1, 2, 3))
    with pytest.raises(errors.ArgumentError, match="`score` must return a finite number") as caught:
        functional.greedy_soup(paths, lambda state: value if state["weight"].item() == 2 else state["weight"].item())
    assert f"for '{paths[1]}'" in str(caught.value)
    with pytest.raises(errors.ArgumentError) as caught:
        functional.greedy_soup(paths, lambda state: value if state["weight"].item() == 2.5 else state["weight"].item())
    assert f"for '{paths[2]} + {paths[1]}'" in str(caught.value)


def test_score_must_be_a_function(tmp_path):
    with pytest.raises(errors.ArgumentError, match=r"`score` must be a function .* got 0\.5"):
        functional.greedy_soup(save(tmp_path, *scalars(1)), 0.5)


# Whole runs


def test_checkpoints_of_a_trainer_give_the_averages_they_deploy(tmp_path):
    paths, averages, raws = [], [], []
    for seed in (0, 1):
        run = fit([lt.EMA(0.9)], seed=seed)
        paths.append(tmp_path / f"{seed}.ckpt")
        run.trainer.save_checkpoint(paths[-1])
        averages.append(run.trick.averaged_state_dict())
        raws.append(run.trick.raw_state_dict())
    soup = functional.uniform_soup(paths)
    expected = (averages[0]["head.weight"].double() + averages[1]["head.weight"].double()) / 2
    assert torch.equal(soup["head.weight"], expected.float())
    assert not torch.equal(averages[0]["head.weight"], averages[1]["head.weight"])
    assert not torch.equal(averages[0]["head.weight"], raws[0]["head.weight"])
    net = Net()
    net.load_state_dict(soup, strict=True)
    assert torch.equal(net.head.weight, soup["head.weight"])


def test_greedy_is_no_worse_than_the_best_model_on_held_out_data(tmp_path):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 4, generator=generator)
    x = torch.randn(600, 20, generator=generator)
    y = (x @ truth + 3 * torch.randn(600, 4, generator=generator)).argmax(1)
    torch.manual_seed(0)
    start, paths = nn.Linear(20, 4).state_dict(), []
    for index, rate in enumerate((0.05, 0.1, 0.3, 1.0, 30.0)):
        net = nn.Linear(20, 4)
        net.load_state_dict(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        for _ in range(60):
            batch = torch.randint(200, (16,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        paths.append(tmp_path / f"{index}.pt")
        torch.save(net.state_dict(), paths[-1])

    def accuracy(state):
        net.load_state_dict(state, strict=True)
        with torch.no_grad():
            return (net(x[200:]).argmax(1) == y[200:]).float().mean()

    soup = functional.greedy_soup(paths, accuracy)
    assert soup.score >= max(soup.scores.values())
    assert len(soup.members) > 1
    assert soup.score == accuracy(soup.state_dict).item()
