"""Random attention problems for the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, lengths_to_offsets, softmax_attention
from tests.ops.moved import moved


@dataclass(frozen=True)
class Case:
    """Lengths are those of the keys; ``queries``: how many of their last tokens are queries, None for all."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None
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
    mask: Mask = Mask()
    alpha: float | None = None

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
    "not_causal": RAGGED.named(mask=Mask(causal=False)),
    "position": RAGGED.named(position=True),
    "time": RAGGED.named(time=True),
    "bias": RAGGED.named(position=True, time=True),
    "bias_next": RAGGED.named(position=True, time=True, query_time="next"),
    "few_buckets": RAGGED.named(time=True, num_buckets=5),
    "candidates": ENDS.named(position=True, time=True, query_time="next"),
    "candidate_groups": ENDS.named(mask=Mask(candidate_group_size=3)),
    "candidates_not_causal": ENDS.named(mask=Mask(causal=False, candidate_group_size=2)),
    "context_full": ENDS.named(mask=Mask(context="full")),
    "window": RAGGED.named(mask=Mask(max_attn_len=9)),
    "window_zero": RAGGED.named(mask=Mask(max_attn_len=0)),
    "window_ends": ENDS.named(position=True, mask=Mask(max_attn_len=11)),
    "window_not_causal": ENDS.named(mask=Mask(max_attn_len=4, causal=False)),
    "segments": ENDS.named(segments=True),
    "memory": ENDS.named(segments=True, memory=True, position=True, mask=Mask(max_attn_len=5)),
    "everything": ENDS.named(
        segments=True,
        memory=True,
        position=True,
        time=True,
        query_time="next",
        mask=Mask(max_attn_len=7, candidate_group_size=2, context="full"),
    ),
    "alpha": RAGGED.named(alpha=1.7),
    "odd_widths": RAGGED.named(heads=3, width=25, value_width=50),
}


EVERYTHING = CASES["everything"]
# Caches in front: any cut, all of the tokens, the last row alone, and samples of which nothing is asked.
KEYS = {
    "keys": RAGGED.named(queries=(2, 0, 1, 33, 3, 7, 1)),
    "keys_bias": RAGGED.named(queries=(2, 0, 1, 33, 3, 7, 1), position=True, time=True, query_time="next"),
    "keys_all": CASES["candidates"].named(queries=RAGGED.lengths),
    "keys_last_row": ENDS.named(queries=(1, 0, 1, 1, 1, 1, 1), position=True, time=True),
    "keys_some_samples": EVERYTHING.named(queries=(0, 0, 1, 40, 0, 129, 2)),
    "keys_no_queries": RAGGED.named(queries=(0,) * 7),
    "keys_candidates": CASES["candidate_groups"].named(queries=(2, 0, 1, 7, 3, 20, 0)),
    "keys_context_full": CASES["context_full"].named(queries=(5, 0, 1, 69, 2, 60, 1)),
    "keys_window": CASES["window_ends"].named(queries=(3, 0, 1, 20, 3, 50, 2)),
    "keys_not_causal": RAGGED.named(queries=(3, 0, 1, 20, 3, 50, 2), mask=Mask(causal=False)),
    "keys_everything": EVERYTHING.named(queries=(3, 0, 1, 20, 3, 50, 2)),
}
CASES |= KEYS


def query_rows(case: Case) -> torch.Tensor:
    """Rows of the queries among the keys, ``[t]``."""
    ends = torch.tensor(case.lengths).cumsum(0).tolist()
    counts = case.lengths if case.queries is None else case.queries
    rows = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *rows])


def build_layouts(case: Case, timestamps: torch.Tensor | None = None) -> tuple[Layout, Layout]:
    """Layouts of the queries and of the keys, one object where they are the same tokens."""
    lengths = torch.tensor(case.lengths, dtype=torch.int64)
    fields: dict[str, Any] = {"timestamps": timestamps}
    if case.context is not None:
        fields["num_context"] = torch.tensor(case.context)
    if case.candidates is not None:
        fields["num_candidates"] = torch.tensor(case.candidates)
    if case.segments:
        numbers = [torch.arange(n) // 9 for n in case.lengths]
        fields["segments"] = torch.cat(numbers).int() if numbers else torch.zeros(0, dtype=torch.int32)
    if case.memory:
        fields["is_memory"] = torch.cat([torch.arange(n) % 9 == 8 for n in case.lengths])
    keys = Layout(lengths_to_offsets(lengths), **fields)
    if case.queries is None:
        return keys, keys
    return Layout(lengths_to_offsets(torch.tensor(case.queries, dtype=torch.int64))), keys


def build(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list, dict[str, Any]]:
    """Arguments of ``hstu_attention``: (tensors that need gradients, keyword arguments)."""
    rng = torch.Generator().manual_seed(seed)
    total, longest = sum(case.lengths), max(case.lengths, default=0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    q, k = normal(total, case.heads, case.width), normal(total, case.heads, case.width)
    v = normal(total, case.heads, case.value_width)
    gaps = torch.exp(torch.rand(total, generator=rng) * 14).long() - 1
    tables = {}
    if case.position:
        tables["position"] = normal(2 * (longest + 3) - 1)
    if case.time:
        tables["time"] = normal(case.num_buckets + 1)
    layout, keys = build_layouts(case, 1_700_000_000 + gaps.cumsum(0))
    arguments: dict[str, Any] = dict(layout=layout, mask=case.mask, scaling_seqlen=12.5)
    if keys is not layout:
        arguments["keys"] = keys
    if case.alpha is not None:
        arguments["alpha"] = case.alpha
    if tables:
        arguments["bias"] = RelativeBias(**tables, query_time=case.query_time)  # type: ignore[arg-type]
    return [q[query_rows(case)], k, v], arguments


def outputs_and_gradients(
    tensors: list,
    arguments: dict[str, Any],
    backend: str,
    dtype: torch.dtype,
    attention: Callable[..., torch.Tensor] = hstu_attention,
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
    out = attention(inputs["q"], inputs["k"], inputs["v"], **arguments, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    results = {"out": out.detach()}
    for name, x in inputs.items():
        results[f"d_{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    return results


def check(
    case: Case,
    dtype: torch.dtype,
    run: Callable[..., torch.Tensor] = hstu_attention,
    groups: int = 1,
    device: str = "cpu",
) -> None:
    """The error of the kernels is at most twice (forward) or three times (backward) that of the plain computation."""
    tensors, arguments = moved(build(case, dtype), device)
    if run is softmax_attention:
        arguments = {name: x for name, x in arguments.items() if name not in ("bias", "scaling_seqlen")}
        tensors = [tensors[0].repeat_interleave(groups, 1), *tensors[1:]]
    exact, plain, kernel = (
        outputs_and_gradients(tensors, arguments, backend, precision, run)
        for backend, precision in (("reference", torch.float64), ("reference", dtype), ("triton", dtype))
    )
    for key, truth in exact.items():
        assert kernel[key].shape == truth.shape and kernel[key].dtype == dtype
        if truth.numel():
            factor = 2 if key == "out" else 3
            # The exact result has the error of one rounding as well; of zeros, the terms that cancel have it: products
            # of the gradient of the output with rows of v, times a row of k or q.
            size = (
                truth.abs().max() or case.value_width * max(x.abs().max() for x in tensors if x.numel()).double() ** 2
            )
            unit = torch.finfo(dtype).eps / 2 * size
            allowed = factor * (plain[key].double() - truth).abs().max() + max(unit, 1e-6 * truth.abs().max())
            assert (kernel[key].double() - truth).abs().max() <= allowed, key
