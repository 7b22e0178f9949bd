"""A loss of your own: BPR-max (https://arxiv.org/abs/1706.03847), the positive against negatives by their probability.

    python examples/custom_loss.py

or from the commands: --import custom_loss and --gin-bindings "RetrievalArgs.loss='bpr_max'".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import hstu


@hstu.register_loss("bpr_max")
def bpr_max(positive: Tensor, negative: Tensor, live: Tensor, *, penalty: float = 0.1) -> Tensor:
    """Return one loss for each label token, [L].

    Args:
        positive: [L], scores of the next item.
        negative: [L, K], scores of its negatives.
        live: [L, K] bool, False where a negative is the positive itself.
        penalty: Weight of the squared scores of the negatives.
    """
    log_p = negative.masked_fill(~live, float("-inf")).log_softmax(1)
    ahead = F.logsigmoid(positive[:, None] - negative)
    losses = -(log_p + ahead).logsumexp(1) + penalty * (log_p.exp() * negative.square()).sum(1)
    return losses.where(live.any(1), 0.0)


def main() -> None:
    """Train with it on the shop of the examples."""
    run = hstu.fit(
        "examples/shop.csv",
        user="user",
        item="item",
        time="time",
        run_dir="runs/custom-loss",
        **{
            "RetrievalArgs.loss": "bpr_max",
            "RetrievalArgs.loss_options": {"penalty": 0.05},
            "RetrievalArgs.temperature": 0.2,
            "TrainerArgs.max_epochs": 3,
        },
    )
    print(run.scores)


if __name__ == "__main__":
    main()
