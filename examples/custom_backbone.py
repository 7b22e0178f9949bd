"""A backbone of your own: an exponential average of what came before, with learned speeds.

    python examples/custom_backbone.py

or from the commands, with the folder of this file where Python looks (PYTHONPATH=examples) or as working directory:

    python examples/pretrain_gr_retrieval.py --import custom_backbone --gin-config-file custom_retrieval.gin \
      --gin-bindings "NetworkArgs.backbone='average'" ...

The run remembers the import: predict, export and hstu.open_run need no flag.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import hstu
from hstu.ops import positions_in_sequence


@hstu.register_backbone("average")
class AverageStack(nn.Module):
    """Layers of x + W silu(average of x so far)."""

    def __init__(self, network, max_tokens: int, *, slowest: float = 0.95) -> None:
        super().__init__()
        width, depth = network.hidden_size, network.num_layers
        # sigmoid of these: how much of the average each channel keeps from one token to the next
        self.speeds = nn.Parameter(torch.linspace(-3.0, math.log(slowest / (1 - slowest)), width))
        self.mixers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, tokens) -> Tensor:
        """Map the values of a jagged stream [T, D] to hidden rows [T, D]."""
        x, layout = tokens.values.float(), tokens.layout
        for mixer in self.mixers:
            x = x + mixer(nn.functional.silu(self._averages(x, layout)))
        return x

    def _averages(self, x: Tensor, layout) -> Tensor:
        """Return a_t = keep * a_{t-1} + (1 - keep) * x_t within each sample, by doubling steps."""
        place = positions_in_sequence(layout.offsets, x.shape[0])
        keep = self.speeds.sigmoid()
        average, reach = (1 - keep) * x, 1
        while reach < layout.longest:
            earlier = torch.zeros_like(average)
            earlier[reach:] = average[:-reach]
            average = average + keep**reach * torch.where((place >= reach)[:, None], earlier, 0.0)
            reach *= 2
        return average


def main() -> None:
    """Train it on the shop of the examples."""
    run = hstu.fit(
        "examples/shop.csv",
        user="user",
        item="item",
        time="time",
        run_dir="runs/custom-backbone",
        **{
            "NetworkArgs.backbone": "average",
            "NetworkArgs.backbone_options": {"slowest": 0.9},
            "TrainerArgs.max_epochs": 3,
        },
    )
    print(run.scores)


if __name__ == "__main__":
    main()
