"""HSTU layers in a plain PyTorch loop: no trainer, no config, no TorchRec, no Megatron-Core; a page to start from.

    python examples/own_training_loop.py

The task: sequences of three items that come again and again, to be continued.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.hstu import HSTUConfig, HSTUStack, hstu_preset
from hstu.layers.tokens import Tokens
from hstu.ops import Layout, lengths_to_offsets

NUM_ITEMS, WIDTH, LONGEST = 50, 32, 24


class NextItem(nn.Module):
    """Items to scores of the next item."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(NUM_ITEMS, WIDTH)
        nn.init.normal_(self.items.weight, std=0.2)
        config = HSTUConfig(
            hidden_size=WIDTH,
            num_heads=2,
            qk_channels=16,
            value_channels=16,
            max_tokens=LONGEST,
            scaling_seqlen=float(LONGEST),
            position_bias=True,
            **hstu_preset("research"),
        )
        self.stack = HSTUStack(config, num_layers=2)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Map jagged items [T] of sequences with ``lengths`` [B] to scores [T, NUM_ITEMS]."""
        layout = Layout(lengths_to_offsets(lengths))  # no padding: B sequences in one run of T tokens
        values = self.items(items)
        tokens = Tokens(values=values, layout=layout, event_rows=torch.arange(len(items)), tokens_per_event=1)
        return self.stack(tokens) @ self.items.weight.T


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return items [T] and lengths [batch] of sequences that repeat three items of their own."""
    lengths = torch.randint(10, LONGEST + 1, (batch,), generator=generator)
    motifs = [torch.randperm(NUM_ITEMS, generator=generator)[:3] for _ in range(batch)]
    return torch.cat([motif.repeat(LONGEST)[:length] for motif, length in zip(motifs, lengths, strict=True)]), lengths


def main(steps: int = 300) -> float:
    """Train, and return the share of new sequences whose last item is predicted."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), NextItem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        items, lengths = draw(32, generator)
        last = lengths.cumsum(0) - 1
        known = torch.ones(len(items), dtype=torch.bool)
        known[last] = False  # nothing follows the last item of a sequence
        loss = F.cross_entropy(model(items, lengths)[known], items.roll(-1)[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    with torch.no_grad():
        items, lengths = draw(256, generator)
        before = lengths.cumsum(0) - 2
        right = model(items, lengths)[before].argmax(1) == items[before + 1]
    share = right.float().mean().item()
    print(f"the last item is right in {share:.1%} of new sequences")
    return share


if __name__ == "__main__":
    main()
