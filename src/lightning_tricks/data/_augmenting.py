"""Random transforms of batches of images, one after another, each image by itself and all in one computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lightning_tricks._core.draws import mix, uniforms
from lightning_tricks.data._geometry import Geometric
from lightning_tricks.data._sampling import Border, sample
from lightning_tricks.data._transform import Photometric, Transform, as_floats, as_given, for_each
from lightning_tricks.errors import ArgumentError, TrickError

__all__ = ["Augmentation", "are_images", "augment", "check_transforms", "transformed"]

Augmentation = Transform | Callable[[Any], Any]  # from and to tensors; LightningCLI would refuse callables that do not say so


def augment(images: Tensor, transforms: Augmentation | Sequence[Augmentation], *, seed: int | Tensor = 0) -> Tensor:
    """Change images at random, each by itself.

    Transforms that move pixels and follow each other are one map, along which images are sampled once: nothing is blurred twice, and what
    one moves out of the image another can bring back. Mirroring and shifting alone copy pixels as they are.

    Args:
        images: A batch of floating-point numbers or of bytes.
        transforms: One of `lightning_tricks.transforms`, or any callable that takes and returns batches; or several, which act in their
            order.
        seed: What the draws follow from, at least 0: the same seed draws the same. A tensor without dimensions lets compiled code draw
            anew without compiling anew.

    Returns:
        New images, in the given precision and memory layout; bytes as numbers from a callable on that returns such.

    Shape:
        - Input: (N, C, H, W)
        - Output: (N, C, H, W), or of another height and width if a transform sets a size

    Raises:
        ArgumentError: If `transforms` holds anything else, or `images` are none.

    Note:
        Callables draw from torch's generators, which start from the seed for them and are as before afterwards.

    Example:
        >>> from lightning_tricks import transforms
        >>> images = torch.rand(2, 3, 32, 32)
        >>> changed = augment(images, [transforms.Crop(4), transforms.Flip()], seed=1)
        >>> changed.shape, torch.equal(changed, augment(images, [transforms.Crop(4), transforms.Flip()], seed=1))
        (torch.Size([2, 3, 32, 32]), True)
    """
    if not are_images(images):
        found = f"shape {tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        msg = f"`images` must be a batch, (N, C, H, W), of floating-point numbers or of uint8, got {found}."
        raise ArgumentError(msg)
    start = seed if isinstance(seed, Tensor) else torch.tensor(seed)
    return transformed(images, check_transforms(transforms), mix(mix(start + 0x9E3779B9)))


def check_transforms(value: Any) -> tuple[Augmentation, ...]:
    """Accept one transform or several; a list, as YAML has it, becomes a tuple."""
    several = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for each in several:
        if not isinstance(each, Geometric | Photometric) and (isinstance(each, type) or not callable(each)):
            msg = f"`transforms` must be transforms such as `transforms.Flip()`, or callables that take batches of images, got {value!r}."
            raise ArgumentError(msg)
    return several


def are_images(value: Any) -> TypeGuard[Tensor]:
    """Tell whether this is a batch of images."""
    return isinstance(value, Tensor) and value.ndim == 4 and (value.is_floating_point() or value.dtype == torch.uint8)


def transformed(images: Tensor, transforms: Sequence[Augmentation], key: Tensor) -> Tensor:
    """Apply transforms in their order; draws follow from a key, a tensor without dimensions on the CPU."""
    dtype, current = images.dtype, images
    pending: list[tuple[Geometric, Tensor]] = []  # that move pixels, each with its key
    for place, transform in enumerate(transforms):
        own = mix(mix(key) ^ (place + 1))
        if isinstance(transform, Transform) and transform.is_neutral:
            continue
        if not isinstance(transform, Geometric) or len(_borders([*pending, (transform, own)])) > 1:
            current, pending = _moved(current, pending), []
        if isinstance(transform, Geometric):
            pending.append((transform, own))
        elif isinstance(transform, Photometric):
            current = _changed(current if transform.on_bytes else as_floats(current), transform, own)
        else:
            assert not isinstance(transform, Transform)
            current = _called(transform, as_given(current, dtype), int(own))
            if dtype == torch.uint8 and current.is_floating_point():
                dtype = current.dtype  # as whoever turns bytes into numbers scales them, too
    current = as_given(_moved(current, pending), dtype)
    laid_out = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return current.contiguous(memory_format=torch.channels_last) if laid_out else current


def _borders(moves: Sequence[tuple[Geometric, Tensor]]) -> list[Border]:
    """Return the different ways in which transforms look outside of images."""
    borders = [transform.look_outside() for transform, _ in moves]
    return sorted({border for border in borders if border is not None})


def _moved(images: Tensor, pending: Sequence[tuple[Geometric, Tensor]]) -> Tensor:
    """Sample images along the maps of transforms, the first of which acts first."""
    if not pending:
        return images
    size = (images.shape[2], images.shape[3])
    total: Tensor | None = None
    for transform, key in pending:
        numbers = uniforms(key, len(images), transform.draws + 1, images.device)
        maps = transform.maps(numbers[:, 1:], numbers[:, 0] < transform.probability, size)
        total = maps if total is None else total @ maps
        size = transform.size_after(size)
    assert total is not None
    border = next(iter(_borders(pending)), None)
    if all(transform.exact for transform, _ in pending):
        return sample(images, total, size, border=border, exact=True)
    images = as_floats(images)
    moved = sample(images, total, size, border=border, exact=False)
    if moved.shape == images.shape and any(transform.probability < 1 for transform, _ in pending):
        stays = (total == torch.eye(3, device=total.device)).all(dim=2).all(dim=1)
        moved = torch.where(for_each(images, stays), images, moved)  # rather than interpolated, which rounds
    return moved


def _changed(images: Tensor, transform: Photometric, key: Tensor) -> Tensor:
    numbers = uniforms(key, len(images), transform.draws + 1, images.device)
    return transform.change(images, numbers[:, 1:], numbers[:, 0] < transform.probability, key)


def _called(function: Callable[[Tensor], Tensor], images: Tensor, key: int) -> Tensor:
    """Call somebody else's function, which may draw from torch's generators."""
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.default_generator.manual_seed(key)
        if images.is_cuda:
            torch.cuda.manual_seed(key)
        result = function(images)
    if not isinstance(result, Tensor) or len(result) != len(images):
        found = f"{tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        msg = f"A transform must return as many images as it gets, {len(images)}, and {function!r} returned {found}."
        raise TrickError(msg)
    return result
