"""The mask against an independent enumeration of its definition, token by token."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from tests.ops.attention_cases import CASES, Case, build, build_layouts, query_rows

BACKENDS = ("reference", "padded", "cpu")


def may_attend(case: Case, sample: int, i: int, j: int) -> bool:
    """Whether token i of a sample may attend to token j, straight from the definition."""
    length = case.lengths[sample]
    context = case.context[sample] if case.context else 0
    history = length - (case.candidates[sample] if case.candidates else 0)
    group, window = case.mask.candidate_group_size, case.mask.max_attn_len

    def kind(t: int) -> str:
        return "context" if t < context else "candidate" if t >= history else "history"

    def memory(t: int) -> bool:
        return case.memory and t % 9 == 8

    ordered = j <= i or not case.mask.causal
    if case.mask.context == "full" and kind(i) == "context":
        ordered = True
    same_segment = i // 9 == j // 9 if case.segments else True
    if not (ordered and (same_segment or memory(j) or kind(j) == "context")):
        return False
    if kind(j) == "candidate":
        if kind(i) != "candidate" or j > i:
            return False
        if i != j and (group == 1 or (i - history) // group != (j - history) // group):
            return False
    exempt = window is None or kind(j) == "context" or memory(j) or memory(i)
    return exempt or min(i, history) - min(j, history) <= window


@cache
def expected_pairs(case: Case, sample: int) -> torch.Tensor:
    """``[n, m]`` of the queries of a sample and its keys."""
    m = case.lengths[sample]
    n = m if case.queries is None else case.queries[sample]
    seen = [[may_attend(case, sample, i, j) for j in range(m)] for i in range(m - n, m)]
    return torch.tensor(seen, dtype=torch.bool).view(n, m)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_rows_attend_to_what_the_definition_says(name: str, backend: str) -> None:
    """With q.k = 0 and a bias table of ones each visible value counts silu(1)/S: values are one-hot."""
    case = CASES[name]
    _, arguments = build(case)
    longest, keys = max(case.lengths, default=0), arguments.get("keys", arguments["layout"])
    places = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(n) for n in case.lengths)])
    arguments["bias"] = RelativeBias(position=torch.ones(2 * longest + 1))
    k = torch.zeros(sum(case.lengths), 1, 4)
    v = torch.eye(max(longest, 1))[places][:, None, :]
    out = hstu_attention(k[query_rows(case)], k, v, **arguments, backend=backend)[:, 0] * arguments["scaling_seqlen"]
    seen = out.div(torch.nn.functional.silu(torch.tensor(1.0))).round().bool()
    for sample, own in enumerate(seen.split(arguments["layout"].lengths.tolist())):
        expected = expected_pairs(case, sample)
        assert torch.equal(own[:, : int(keys.lengths[sample])], expected), f"sample {sample}"
        assert not bool(own[:, int(keys.lengths[sample]) :].any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_softmax_rows_attend_to_what_the_definition_says(name: str, backend: str) -> None:
    """With q.k = 0 each visible value has the same weight: values are one-hot."""
    case = CASES[name]
    _, arguments = build(case)
    places = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(n) for n in case.lengths)])
    k = torch.zeros(sum(case.lengths), 1, 4)
    v = torch.eye(max(*case.lengths, 1) if case.lengths else 1)[places][:, None, :]
    keys = {"keys": arguments["keys"]} if "keys" in arguments else {}
    out = softmax_attention(
        k[query_rows(case)], k, v, arguments["layout"], case.mask, **keys, backend=backend
    )[:, 0]  # fmt: skip
    for sample, own in enumerate(out.split(arguments["layout"].lengths.tolist())):
        expected = expected_pairs(case, sample).float()
        torch.testing.assert_close(own[:, : case.lengths[sample]], expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("width", [1, 4, 25])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.queries is None])
def test_spans_that_are_not_reachable_have_no_visible_pair(name: str, width: int) -> None:
    """And those that are have one, where order and window alone decide."""
    case = CASES[name]
    layout, _ = build_layouts(case)
    for sample, length in enumerate(case.lengths):
        first = torch.arange(0, length, width)
        last = (first + width - 1).clamp(max=length - 1)
        tokens = slice(*layout.offsets[sample : sample + 2].tolist())

        def spans(values: torch.Tensor | None, tokens: slice = tokens) -> Any:
            if values is None:
                return None
            parts = [x for x in values[tokens].split(width) if x.numel()]
            low, high = (values.new_tensor([getattr(x, kind)() for x in parts]) for kind in ("amin", "amax"))
            return (low[:, None], high[:, None]), (low, high)

        padding = -length % width
        seen = torch.nn.functional.pad(expected_pairs(case, sample), (0, padding, 0, padding))
        seen = seen.view(len(first), width, len(first), width).any(3).any(1)
        memory = spans(None if layout.is_memory is None else layout.is_memory.int())
        reach = case.mask.reachable(
            (first[:, None], last[:, None]), (first, last), context=layout.context[sample],
            history=layout.history[sample], segments=spans(layout.segments),
            has_memory=False if memory is None else (memory[0][1] | memory[1][1]) > 0,
        )  # fmt: skip
        assert bool((reach | ~seen).all()), sample
        if name in ("causal", "equal", "window", "window_zero", "not_causal"):
            assert torch.equal(reach, seen)
        if name == "segments" and length > 100:
            assert int(reach.sum()) < reach.numel() / 2


@pytest.mark.parametrize("context, candidates, group", list(itertools.product((0, 2), (0, 3), (1, 2))))
def test_visible_of_one_short_sample(context: int, candidates: int, group: int) -> None:
    case = Case((7,), context=(context,), candidates=(candidates,), mask=Mask(candidate_group_size=group))
    place = torch.arange(7)
    seen = case.mask.visible(
        place[:, None],
        place[None, :],
        context=context,
        history=7 - candidates,
    )
    assert seen.tolist() == [[may_attend(case, 0, i, j) for j in range(7)] for i in range(7)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "candidates", "everything"])
def test_a_changed_token_leaves_rows_that_may_not_attend_to_it_bit_for_bit(name: str, backend: str) -> None:
    case = CASES[name]
    (q, k, v), arguments = build(case)
    before = hstu_attention(q, k, v, **arguments, backend=backend)
    sample = 5
    start = sum(case.lengths[:sample])
    for j in (0, 3, 60, 109, 115, 129):
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for x in (q2, k2, v2):
            x[start + j] += 1.0
        after = hstu_attention(q2, k2, v2, **arguments, backend=backend)
        changed = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
        attending = [start + i for i in range(case.lengths[sample]) if i == j or may_attend(case, sample, i, j)]
        assert set(changed) <= set(attending)
        assert start + j in changed


@pytest.mark.parametrize("name", ["bias_next", "everything"])
def test_another_sample_in_the_batch_changes_nothing(name: str) -> None:
    case = CASES[name]
    (q, k, v), arguments = build(case)
    together = hstu_attention(q, k, v, **arguments, backend="cpu")
    rows = slice(sum(case.lengths[:5]), sum(case.lengths[:6]))
    whole = arguments["layout"]
    counts = {n: getattr(whole, n) for n in ("num_context", "num_candidates")}
    flags = {n: getattr(whole, n) for n in ("segments", "is_memory", "timestamps")}
    one = {n: x[5:6] for n, x in counts.items() if x is not None}
    one |= {n: x[rows] for n, x in flags.items() if x is not None}
    alone = dict(arguments, layout=Layout(torch.tensor([0, case.lengths[5]]), **one))
    torch.testing.assert_close(
        hstu_attention(q[rows], k[rows], v[rows], **alone, backend="cpu"),
        together[rows],
        rtol=1e-5,
        atol=1e-6,
    )
