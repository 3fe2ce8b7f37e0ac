"""Fine-tuning and linear probes, written out in loops."""

from __future__ import annotations

import math


def sgd_with_rates(weights, gradients, rates, *, momentum, weight_decay, frozen):
    """Take steps of SGD with momentum, with a rate for each weight and step; what is frozen in a step is left alone with its buffer.

    Args:
        weights: The weights, by name.
        gradients: For each step, a function of the weights that gives each one's gradient.
        rates: For each step, the rate of each weight.
        momentum: The factor on the buffer.
        weight_decay: The factor on the weight in the gradient.
        frozen: For each step, the names that are frozen.
    """
    weights, buffers = dict(weights), {}
    for gradient, rate, asleep in zip(gradients, rates, frozen, strict=True):
        given = gradient(weights)
        for name in weights:
            if name in asleep:
                continue
            g = given[name] + weight_decay * weights[name]
            buffers[name] = g if name not in buffers else momentum * buffers[name] + g
            weights[name] = weights[name] - rate[name] * buffers[name]
    return weights


def logistic_gradient(x, y, weight, bias, l2):
    """Return the gradient of ``-1/n Σ log softmax(W z + b)[y] + l2/2 ‖W‖²`` over lists of samples."""
    classes, features, n = len(weight), len(x[0]), len(x)
    by_weight = [[l2 * weight[k][d] for d in range(features)] for k in range(classes)]
    by_bias = [0.0] * classes
    for row, label in zip(x, y, strict=True):
        scores = [sum(weight[k][d] * row[d] for d in range(features)) + bias[k] for k in range(classes)]
        total = sum(math.exp(score) for score in scores)
        for k in range(classes):
            error = math.exp(scores[k]) / total - (k == label)
            by_bias[k] += error / n
            for d in range(features):
                by_weight[k][d] += error * row[d] / n
    return by_weight, by_bias


def ridge_gradient(x, y, weight, bias, l2):
    """Return the gradient of ``1/(2n) Σ ‖W z + b − e_y‖² + l2/2 ‖W‖²`` over lists of samples."""
    classes, features, n = len(weight), len(x[0]), len(x)
    by_weight = [[l2 * weight[k][d] for d in range(features)] for k in range(classes)]
    by_bias = [0.0] * classes
    for row, label in zip(x, y, strict=True):
        for k in range(classes):
            error = sum(weight[k][d] * row[d] for d in range(features)) + bias[k] - (k == label)
            by_bias[k] += error / n
            for d in range(features):
                by_weight[k][d] += error * row[d] / n
    return by_weight, by_bias
