"""Random attention problems for the tests of every backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hstu.ops import RelativeBias, hstu_attention, lengths_to_offsets


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: int = 2
    width: int = 8
    value_width: int = 6
    context: tuple[int, ...] | None = None
    candidates: tuple[int, ...] | None = None
    segments: bool = False
    memory: bool = False
    position: bool = False
    time: bool = False
    query_time: str = "own"
    num_buckets: int = 40
    options: dict[str, Any] = field(default_factory=dict)

    def named(self, **changes: Any) -> Case:
        return replace(self, **changes)


RAGGED = Case((5, 0, 1, 70, 3, 130, 2))
ENDS = RAGGED.named(context=(2, 0, 0, 3, 0, 1, 1), candidates=(2, 0, 1, 7, 3, 20, 0))
CASES = {
    "causal": RAGGED,
    "equal": Case((33, 33, 33)),
    "empty": Case((0, 0)),
    "no_samples": Case(()),
    "one_token": Case((1, 1)),
    "not_causal": RAGGED.named(options={"causal": False}),
    "position": RAGGED.named(position=True),
    "time": RAGGED.named(time=True),
    "bias": RAGGED.named(position=True, time=True),
    "bias_next": RAGGED.named(position=True, time=True, query_time="next"),
    "few_buckets": RAGGED.named(time=True, num_buckets=5),
    "candidates": ENDS.named(position=True, time=True, query_time="next"),
    "candidate_groups": ENDS.named(options={"candidate_group_size": 3}),
    "candidates_not_causal": ENDS.named(options={"causal": False, "candidate_group_size": 2}),
    "context_full": ENDS.named(options={"context_attention": "full"}),
    "window": RAGGED.named(options={"max_attn_len": 9}),
    "window_zero": RAGGED.named(options={"max_attn_len": 0}),
    "window_ends": ENDS.named(position=True, options={"max_attn_len": 11}),
    "window_not_causal": ENDS.named(options={"max_attn_len": 4, "causal": False}),
    "segments": ENDS.named(segments=True),
    "memory": ENDS.named(segments=True, memory=True, position=True, options={"max_attn_len": 5}),
    "everything": ENDS.named(
        segments=True,
        memory=True,
        position=True,
        time=True,
        query_time="next",
        options={"max_attn_len": 7, "candidate_group_size": 2, "context_attention": "full"},
    ),
    "alpha": RAGGED.named(options={"alpha": 1.7}),
    "odd_widths": RAGGED.named(heads=3, width=25, value_width=50),
}


def build(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list, dict[str, Any]]:
    """Arguments of ``hstu_attention``: (tensors that need gradients, keyword arguments)."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(case.lengths, dtype=torch.int64)
    total, longest = int(lengths.sum()), max(case.lengths, default=0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    q, k = normal(total, case.heads, case.width), normal(total, case.heads, case.width)
    v = normal(total, case.heads, case.value_width)
    arguments: dict[str, Any] = dict(
        offsets=lengths_to_offsets(lengths), max_seqlen=longest, scaling_seqlen=12.5, **case.options
    )
    if case.context is not None:
        arguments["num_context"] = torch.tensor(case.context)
    if case.candidates is not None:
        arguments["num_candidates"] = torch.tensor(case.candidates)
    if case.segments:
        numbers = [torch.arange(n) // 9 for n in case.lengths]
        arguments["segments"] = torch.cat(numbers).int() if numbers else torch.zeros(0, dtype=torch.int32)
    if case.memory:
        arguments["is_memory"] = torch.cat([torch.arange(n) % 9 == 8 for n in case.lengths])
    gaps = torch.exp(torch.rand(total, generator=rng) * 14).long() - 1
    tables = {}
    if case.position:
        tables["position"] = normal(2 * (longest + 3) - 1)
    if case.time:
        tables["time"] = normal(case.num_buckets + 1)
    if tables:
        arguments["bias"] = RelativeBias(
            **tables, timestamps=1_700_000_000 + gaps.cumsum(0), query_time=case.query_time
        )
    return [q, k, v], arguments


def outputs_and_gradients(
    tensors: list, arguments: dict[str, Any], backend: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Output and every gradient, with all floating arguments first cast to ``dtype``."""
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in zip("qkv", tensors, strict=True)}
    arguments = dict(arguments)
    bias = arguments.get("bias")
    if bias is not None:
        for name in ("position", "time"):
            table = getattr(bias, name)
            if table is not None:
                inputs[name] = table.detach().to(dtype).requires_grad_()
                bias = replace(bias, **{name: inputs[name]})
        arguments["bias"] = bias
    out = hstu_attention(inputs["q"], inputs["k"], inputs["v"], **arguments, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(dtype)).sum().backward()
    results = {"out": out.detach()}
    for name, x in inputs.items():
        results[f"d_{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    return results
