"""Bootstrap samples and out-of-bag predictions as Breiman describes them, in loops over examples and members."""

from __future__ import annotations

import math

import torch


def hashed(value):
    """Hash an integer of 32 bits."""
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ value >> 16


def bag(key, size):
    """Draw one example after another."""
    return [math.floor(size * hashed(hashed(position + 1) ^ key) / 2**32) for position in range(size)]


def out_of_bag(bags, predict, size):
    """Combine for each example the probabilities of the members whose bags lack it; `predict(member, example)` gives logits."""
    predictions, counts = [], []
    for example in range(size):
        unseen = [member for member, drawn in enumerate(bags) if example not in drawn]
        counts.append(len(unseen))
        if unseen:
            total = sum(torch.softmax(predict(member, example).double(), -1) for member in unseen)
            predictions.append(torch.log(total / len(unseen)))
        else:
            predictions.append(None)
    return predictions, counts
