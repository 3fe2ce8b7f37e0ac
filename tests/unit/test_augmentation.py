"""Transforms of images: each equals its definition, draws as it says, and leaves everything else alone."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_tricks import errors, transforms
from lightning_tricks._core.draws import mix, uniforms
from lightning_tricks._core.generators import normal
from lightning_tricks.data._augmenting import transformed
from lightning_tricks.functional import augment
from reference import augmentation as reference

KEY = torch.tensor(12345)
SIZE = (7, 9)
EACH = [
    transforms.Flip(),
    transforms.Crop(2),
    transforms.ResizedCrop(),
    transforms.Rotation(30),
    transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    transforms.Noise(0.1),
    transforms.Cutout(3),
    transforms.Erasing(probability=1),
]
each = pytest.mark.parametrize("transform", EACH, ids=lambda transform: type(transform).__name__)


def some(n: int = 6, channels: int = 3, size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    images = torch.rand(n, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)


def numbers(place: int, n: int, transform: transforms.Transform) -> list[list[float]]:
    """Return what a transform at a place of the list draws: for each image, first whether it is chosen."""
    return uniforms(mix(mix(KEY) ^ (place + 1)), n, transform.draws + 1, torch.device("cpu")).tolist()


# Moving pixels


def source(transform: transforms.Transform, u: list[float], size: tuple[int, int]):
    """Return where places come from after one transform, and the size after it, as the reference has it."""
    after = transform.size_after(size)
    match transform:
        case transforms.Flip():
            return (reference.flip(transform.direction, size) if u[0] < transform.probability else lambda at: at), after
        case transforms.Crop():
            return reference.crop(transform.padding, size, after, u[1:]), after
        case transforms.Rotation():
            return reference.rotation(transform.degrees, size, u[1:]), after
    return reference.resized_crop(size, transform.scale, transform.ratio, after, u[1:]), after


def expected(images: Tensor, several: list[transforms.Transform], border: str) -> Tensor:
    drawn = [numbers(place, len(images), each) for place, each in enumerate(several)]
    results = []
    for i, image in enumerate(images):
        sources, size = [], (image.shape[1], image.shape[2])
        for each, u in zip(several, drawn, strict=True):
            found, size = source(each, u[i], size)
            sources.append(found)
        results.append(reference.moved(image, sources, size, border))
    return torch.stack(results)


@pytest.mark.parametrize("border", ["zeros", "edge", "mirror"])
@pytest.mark.parametrize(
    "several",
    [
        lambda border: [transforms.Flip()],
        lambda border: [transforms.Flip("vertical")],
        lambda border: [transforms.Crop(4, border=border)],
        lambda border: [transforms.Crop(2, size=(5, 10), border=border), transforms.Flip(), transforms.Flip("vertical")],
        lambda border: [transforms.Rotation(180, border=border)],
        lambda border: [transforms.Crop(2, border=border), transforms.Rotation(60, border=border), transforms.Flip()],
        lambda border: [transforms.Rotation(40, border=border), transforms.ResizedCrop(size=(4, 6)), transforms.Flip("vertical")],
    ],
)
def test_moves_equal_one_interpolation_at_the_place_that_pixels_come_from(several, border):
    images, several = some(), several(border)
    exact = not any(isinstance(each, transforms.Rotation | transforms.ResizedCrop) for each in several)
    torch.testing.assert_close(transformed(images, several, KEY), expected(images, several, border), rtol=0, atol=0 if exact else 2e-5)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])  # wide images, in which few or no boxes of nearly all their area fit
def test_resized_crops_equal_the_first_box_that_fits_or_the_middle(scale):
    images, transform = some(20, 1, (4, 12)), transforms.ResizedCrop(scale=scale)
    boxes = [reference.box((4, 12), scale, transform.ratio, u[1:]) for u in numbers(0, 20, transform)]
    assert any(boxes) == (scale[0] < 0.5)
    torch.testing.assert_close(transformed(images, [transform], KEY), expected(images, [transform], "edge"), rtol=0, atol=2e-5)


def test_moves_of_whole_pixels_copy_every_kind_of_number():
    several = [transforms.Crop(2), transforms.Flip()]
    plain = transformed(some(dtype=torch.uint8).double(), several, KEY)
    for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        moved = transformed(some(dtype=torch.uint8).to(dtype), several, KEY)
        assert moved.dtype == dtype
        assert torch.equal(moved.double(), plain)


def test_different_borders_are_not_merged():
    images = some()
    both = transformed(images, [transforms.Crop(3, border="edge"), transforms.Crop(3)], KEY)
    assert (both == 0).any(dim=1).flatten(1).any(dim=1).sum() > 3
    assert not (transformed(images, [transforms.Crop(3, border="edge"), transforms.Crop(3, border="edge")], KEY) == 0).any()


def test_a_place_that_is_not_chosen_is_the_middle_and_the_whole_image():
    images = some(size=(8, 8))
    assert torch.equal(transformed(images, [transforms.Crop(size=4, probability=0)], KEY), images[:, :, 2:6, 2:6])
    halved = transformed(images, [transforms.ResizedCrop(size=4, probability=0)], KEY)
    torch.testing.assert_close(halved, torch.nn.functional.avg_pool2d(images, 2), rtol=0, atol=1e-6)


# Changing values


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_equal_their_formulas(channels):
    images, strengths = some(channels=channels, dtype=torch.float64), (0.5, 1.5, 0.8, 0.5)
    transform = transforms.ColorJitter(brightness=0.5, contrast=1.5, saturation=0.8, hue=0.5)
    wanted = [reference.jitter(image, strengths, u[1:]) for image, u in zip(images, numbers(0, 6, transform), strict=True)]
    torch.testing.assert_close(transformed(images, [transform], KEY), torch.stack(wanted), rtol=0, atol=1e-6)


def test_squares_and_rectangles_equal_their_definitions():
    images, square, rectangle = some(), transforms.Cutout(4, fill=0.5), transforms.Erasing(probability=1)
    cut = [
        reference.filled(x, (int(u[1] * 7) - 2, int(u[2] * 9) - 2), (4, 4), 0.5) for x, u in zip(images, numbers(0, 6, square), strict=True)
    ]
    assert torch.equal(transformed(images, [square], KEY), torch.stack(cut))
    erased = []
    for image, u in zip(images, numbers(0, 6, rectangle), strict=True):
        height, width = reference.box(SIZE, rectangle.scale, rectangle.ratio, u[1:])
        corner = int(u[21] * (7 - height + 1)), int(u[22] * (9 - width + 1))
        erased.append(reference.filled(image, corner, (height, width), 0.0))
    assert torch.equal(transformed(images, [rectangle], KEY), torch.stack(erased))
    as_bytes = transformed(some(dtype=torch.uint8), [square], KEY)
    assert ((as_bytes == 128) | (as_bytes == some(dtype=torch.uint8))).all()


def test_noise_is_added_in_units_of_the_images():
    images = some(4, 3, (32, 32))
    noise = transformed(images, [transforms.Noise(0.2)], KEY) - images
    drawn = normal(mix(mix(KEY) ^ 1), torch.tensor(0.2, dtype=torch.float64), images.shape, images.dtype, images.device)
    torch.testing.assert_close(noise, drawn, rtol=0, atol=1e-12)
    assert abs(noise.std() / 0.2 - 1) < 0.03
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    changed = transformed(grey, [transforms.Noise(0.1)], KEY).double() - 128
    assert abs(changed.std() / 25.5 - 1) < 0.02
    assert changed.mean().abs() < 0.7


def test_bytes_are_rounded_once():
    images = some(dtype=torch.uint8)
    several = [transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2), transforms.Rotation(20)]
    precise = transformed(images.double() / 255, several, KEY)
    assert torch.equal(transformed(images, several, KEY), (transformed(images.float() / 255, several, KEY) * 255).round().byte())
    assert (transformed(images, several, KEY) - precise * 255).abs().max() < 0.51


# Draws


@each
def test_draws_depend_on_seed_place_and_image_alone(transform):
    images = some(8, size=(12, 12)).float()
    state = torch.get_rng_state()
    first = augment(images, transform, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, augment(images, transform, seed=3))
    assert torch.equal(first, augment(images, transform, seed=torch.tensor(3)))
    assert not torch.equal(first, augment(images, transform, seed=4))
    alike = augment(images[:1].repeat(32, 1, 1, 1), transform, seed=3)
    assert len(alike.flatten(1).unique(dim=0)) > (1 if isinstance(transform, transforms.Flip) else 8)
    once, twice = (augment(alike, [transform] * count, seed=3) for count in (1, 2))
    assert not torch.equal(once, twice)
    if not isinstance(transform, transforms.Noise):
        assert torch.equal(augment(images[:3], transform, seed=3), first[:3])


@each
def test_the_share_of_changed_images_is_the_probability(transform):
    transform = type(transform)(**{**vars(transform), "probability": 0.3})
    images = some(1, size=(12, 12)).float().repeat(2000, 1, 1, 1)
    changed = (augment(images, transform, seed=5) != images).flatten(1).any(dim=1).float().mean()
    unchanged = {"Crop": 1 / 25}.get(type(transform).__name__, 0.0)  # one of the 25 places is the middle
    assert abs(changed - 0.3 * (1 - unchanged)) < 5 * (0.21 / 2000) ** 0.5


def chi_square(values: Tensor, cells: int) -> float:
    counts = torch.bincount(values.long(), minlength=cells).double()
    return float(((counts - len(values) / cells).square() / (len(values) / cells)).sum())


def test_numbers_are_uniform_and_independent_of_each_other():
    table = uniforms(KEY, 4000, 6, torch.device("cpu"))
    assert table.min() >= 0
    assert table.max() < 1
    for column in table.T:
        assert chi_square(column * 20, 20) < 48  # 99.98 % of chi-square with 19 degrees of freedom
    later = uniforms(KEY + 1, 4000, 6, torch.device("cpu"))
    pairs = [(table[:, 0], table[:, 1]), (table[:, 2], table[:, 5]), (table[1:, 0], table[:-1, 0]), (table[:, 0], later[:, 0])]
    for first, second in pairs:
        assert chi_square((first * 10).floor() * 10 + (second * 10).floor(), 100) < 160  # 99.99 % with 99 degrees of freedom


def test_places_of_crops_are_uniform():
    position = torch.zeros(5000, 1, 5, 5)
    position[:, :, 2, 2] = 1
    where = augment(position, transforms.Crop(2), seed=1).flatten(1).argmax(dim=1)
    assert chi_square(where, 25) < 58  # 99.99 % of chi-square with 24 degrees of freedom


def test_angles_are_uniform_and_counter_clockwise():
    right = torch.zeros(2000, 1, 41, 41)
    right[:, :, 20, 38] = 1  # to the right of the middle
    turned = augment(right, transforms.Rotation(90), seed=1).flatten(1).argmax(dim=1)
    angle = torch.atan2(20.0 - turned // 41, turned % 41 - 20.0).rad2deg()
    assert -91 < angle.min() < -88
    assert 88 < angle.max() < 91
    assert chi_square(((angle + 90) / 180 * 10).clamp(0, 9.99), 10) < 33  # 99.99 % with 9 degrees of freedom


# What is given, and what is left alone


@each
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_layout_and_the_given_images_stay(transform, dtype, layout):
    images = some(dtype=dtype).contiguous(memory_format=layout)
    before = images.clone()
    changed = augment(images, [transform, transforms.Flip()], seed=1)
    assert changed.dtype == dtype
    assert changed.shape == images.shape
    assert changed.is_contiguous(memory_format=layout)
    assert torch.equal(images, before)
    assert torch.equal(changed, augment(before.contiguous(), [transform, transforms.Flip()], seed=1))
    assert augment(images[:0], [transform, transforms.Flip()]).shape == (0, 3, *SIZE)


@pytest.mark.parametrize(
    "transform",
    [
        transforms.Flip(probability=0),
        transforms.Crop(),
        transforms.Crop(4, probability=0),
        transforms.ResizedCrop(probability=0),
        transforms.Rotation(0),
        transforms.ColorJitter(),
        transforms.Noise(0),
        transforms.Cutout(probability=0),
        transforms.Erasing(probability=0),
    ],
    ids=repr,
)
def test_neutral_arguments_return_the_same_images(transform):
    images = some()
    assert transform.is_neutral
    assert transformed(images, [transform], KEY) is images


def test_a_callable_draws_from_the_seed_and_leaves_the_random_state():
    images = some()
    several = [transforms.Flip(), lambda x: x + torch.rand(()), transforms.Cutout(3)]
    state = torch.get_rng_state()
    first = augment(images, several, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, augment(images, several, seed=1))
    assert not torch.equal(first, augment(images, several, seed=2))
    seen = []
    augment(some(dtype=torch.uint8), [transforms.Rotation(5), lambda x: seen.append(x.dtype) or x])
    assert seen == [torch.uint8]


@each
def test_transforms_are_values(transform):
    assert eval(repr(transform), vars(transforms)) == transform  # noqa: S307
    assert pickle.loads(pickle.dumps(transform)) == transform  # noqa: S301
    with pytest.raises(TypeError):
        type(transform)(1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(transforms.Flip, "left"), "`direction` must be one of 'horizontal', 'vertical', got 'left'."),
        (partial(transforms.Flip, probability=1.1), "`probability` must lie in [0, 1], got 1.1."),
        (partial(transforms.Crop, -1), "`padding` must be a whole number of at least 0, got -1."),
        (partial(transforms.Crop, 4, size=0), "`size` must be a whole number of at least 1, got 0."),
        (partial(transforms.Crop, 4, size=(1, 2, 3)), "`size` must be a height and a width, or one number for both, got (1, 2, 3)."),
        (partial(transforms.Crop, 4, border="reflect"), "`border` must be one of 'zeros', 'edge', 'mirror', got 'reflect'."),
        (partial(transforms.ResizedCrop, scale=(0, 1)), "`scale[0]` must lie in (0, 1], got 0."),
        (partial(transforms.ResizedCrop, scale=(0.5, 0.2)), "`scale[1]` must lie in [0.5, 1], got 0.2."),
        (partial(transforms.ResizedCrop, ratio=2), "`ratio` must be two numbers"),
        (partial(transforms.Rotation, 200), "`degrees` must lie in [0, 180], got 200."),
        (partial(transforms.ColorJitter, hue=0.6), "`hue` must lie in [0, 0.5], got 0.6."),
        (partial(transforms.ColorJitter, contrast=-1), "`contrast` must lie in [0, ∞), got -1."),
        (partial(transforms.Noise, "much"), "`std` must lie in [0, ∞), got 'much'."),
        (partial(transforms.Cutout, 1.5), "`size` must be a whole number of at least 1, got 1.5."),
        (partial(transforms.Erasing, fill=float("nan")), "`fill` must lie in (-∞, ∞), got nan."),
    ],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(errors.ArgumentError) as raised:
        make()
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("images", "transform", "words"),
    [
        (
            torch.zeros(3, 8, 8),
            transforms.Flip(),
            "`images` must be a batch, (N, C, H, W), of floating-point numbers or of uint8, got shape",
        ),
        (torch.zeros(1, 3, 8, 8, dtype=torch.long), transforms.Flip(), "got shape (1, 3, 8, 8) of torch.int64."),
        ([[1.0]], transforms.Flip(), "got a list."),
        (torch.zeros(1, 3, 8, 8), transforms.Flip, "`transforms` must be transforms such as `transforms.Flip()`, or callables"),
        (torch.zeros(1, 3, 8, 8), transforms.Crop(size=9), "cuts 9 pixels, and images of 8 × 8 have 8 with padding."),
        (torch.zeros(1, 2, 8, 8), transforms.ColorJitter(hue=0.1), "needs images of 1 or 3 channels, for grey values and colours, got 2."),
        (torch.zeros(2, 3, 8, 8), lambda x: x[0], "must return as many images as it gets, 2, and"),
    ],
)
def test_wrong_images_are_refused(images, transform, words):
    with pytest.raises(errors.TrickError) as raised:
        augment(images, transform)
    assert words in str(raised.value)


# Other packages


@pytest.mark.full
def test_colours_rotations_and_crops_have_the_numbers_of_torchvision():
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as theirs

    from lightning_tricks.data import _photometry as ours

    images = some(dtype=torch.float32)
    factors, shares = torch.linspace(0.1, 1.9, 6), torch.linspace(-0.5, 0.5, 6)
    for name, values in (("brightness", factors), ("contrast", factors), ("saturation", factors), ("hue", shares)):
        wanted = torch.stack([getattr(theirs, f"adjust_{name}")(x, float(value)) for x, value in zip(images, values, strict=True)])
        changed = images.clone()
        if name == "hue":
            changed = ours.adjust_hue(changed, values)
        else:
            getattr(ours, f"adjust_{name}_")(changed, values)
        torch.testing.assert_close(changed, wanted, rtol=0, atol=2e-6)
    rotation, crop = transforms.Rotation(180), transforms.ResizedCrop((0.5, 1))
    angles = [(2 * u[1] - 1) * 180 for u in numbers(0, 6, rotation)]
    turned = [theirs.rotate(x, angle, InterpolationMode.BILINEAR) for x, angle in zip(images, angles, strict=True)]
    torch.testing.assert_close(transformed(images, [rotation], KEY), torch.stack(turned), rtol=0, atol=2e-5)
    for image, cropped, u in zip(images, transformed(images, [crop], KEY), numbers(0, 6, crop), strict=True):
        height, width = reference.box(SIZE, crop.scale, crop.ratio, u[1:])
        top, left = int(u[21] * (7 - height + 1)), int(u[22] * (9 - width + 1))
        inside = theirs.resized_crop(image, top, left, height, width, list(SIZE), InterpolationMode.BILINEAR)[:, 1:-1, 1:-1]
        torch.testing.assert_close(cropped[:, 1:-1, 1:-1], inside, rtol=0, atol=2e-5)  # at edges theirs sees the piece alone


@pytest.mark.full
def test_compiles_to_one_graph_for_all_seeds():
    torch._dynamo.reset()
    several, images = [transforms.Rotation(20), transforms.Noise(0.1)], some(dtype=torch.float32)
    compiled = torch.compile(partial(augment, transforms=several), backend="aot_eager", fullgraph=True)
    graphs = []
    for seed in range(3):
        torch.testing.assert_close(compiled(images, seed=torch.tensor(seed)), augment(images, several, seed=seed), rtol=0, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
