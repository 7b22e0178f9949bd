"""A loss of your own: a hinge, the positive ahead of its hardest negatives by a margin.

    python examples/custom_loss.py

or from the commands: --import custom_loss and --gin-bindings "RetrievalArgs.loss='hinge'".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import hstu


@hstu.register_loss("hinge")
def hinge(positive: Tensor, negative: Tensor, live: Tensor, *, margin: float = 1.0, hardest: int = 5) -> Tensor:
    """Return one loss for each label token, [L].

    Args:
        positive: [L], scores of the next item.
        negative: [L, K], scores of its negatives.
        live: [L, K] bool, False where a negative is the positive itself.
        margin: How far ahead is far enough.
        hardest: Negatives that count, those that score highest.
    """
    behind = F.relu(margin - positive[:, None] + negative) * live
    return behind.topk(min(hardest, negative.shape[1]), 1).values.mean(1)


def main() -> None:
    """Train with it on the shop of the examples."""
    run = hstu.fit(
        "examples/shop.csv",
        user="user",
        item="item",
        time="time",
        run_dir="runs/custom-loss",
        **{
            "RetrievalArgs.loss": "hinge",
            "RetrievalArgs.loss_options": {"margin": 2.0},
            "RetrievalArgs.temperature": 0.2,
            "TrainerArgs.max_epochs": 3,
        },
    )
    print(run.scores)


if __name__ == "__main__":
    main()
