"""Which layers of a trained network to fine-tune, by how much data there is and how much it differs from what the network has seen.

Source: the notes and slides on transfer learning of CS231n, Stanford University, 2016 and later: a table of four cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from lightning_tricks._core.checks import check_choice, check_count
from lightning_tricks.transfer._fine_tuning import FineTuning

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["transfer_plan"]

_PLANS: Final[Mapping[tuple[str, str], tuple[Mapping[str, int | str], float | None]]] = {
    ("little", "similar"): ({"0%": 0}, None),
    ("little", "different"): ({"0%": 0, "30%": "50%"}, 0.8),
    ("much", "similar"): ({"0%": 0, "10%": "30%"}, 0.8),
    ("much", "different"): ({"0%": 0, "10%": "100%"}, 0.8),
}


def transfer_plan(
    n_samples: int,
    similarity: Literal["similar", "different"],
    *,
    much: int = 1000,
    num_classes: int | None = None,
    head: str | None = None,
) -> FineTuning:
    """Return the textbook's strategy for fine-tuning on so many samples, as a callback that is ready to use.

    | data | similar | different |
    | --- | --- | --- |
    | little | the head alone, a linear classifier | the head, then the later half of the layers |
    | much | the head, then the last 30 % of the layers | the head, then all layers |

    This is a rule of thumb, and a starting point. The source has no numbers: what is much, when layers thaw, how many a few are, and the
    factor of 0.8 on the learning rate from layer to layer are choices made here.

    Differs from the source where there is little data of another kind. There it says that one is in trouble, and to try linear
    classifiers on several stages. `linear_probe` does so, and tells which stage still has features of use; a callback cannot cut the
    network there, and retrains what comes after instead.

    Args:
        n_samples: Number of training samples.
        similarity: Whether the new data are similar to what the network was trained on, or different.
        much: From how many samples on they are much.
        num_classes: Outputs of a new head; None = the head stays. See `FineTuning`.
        head: Name of the head; None = find it.

    Returns:
        The callback.

    Raises:
        ArgumentError: If an argument lies outside its domain.

    References:
        CS231n, "Transfer Learning", Stanford University: https://cs231n.github.io/transfer-learning/.

    Example:
        >>> transfer_plan(200, "similar", num_classes=5)
        FineTuning(stages={'0%': 0}, num_classes=5)
        >>> transfer_plan(50_000, "different")
        FineTuning(stages={'0%': 0, '10%': '100%'}, layer_decay=0.8)
    """
    amount = "much" if check_count("n_samples", n_samples) >= check_count("much", much) else "little"
    stages, layer_decay = _PLANS[amount, check_choice("similarity", similarity, ("similar", "different"))]
    return FineTuning(stages, layer_decay=layer_decay, num_classes=num_classes, head=head)
