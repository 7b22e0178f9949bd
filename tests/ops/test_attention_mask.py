"""The mask against an independent enumeration of its definition, token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hstu.ops import RelativeBias, hstu_attention
from hstu.ops.attention.mask import Mask, visible
from tests.ops.attention_cases import CASES, Case, build

BACKENDS = ("reference", "cpu")


def may_read(case: Case, sample: int, i: int, j: int) -> bool:
    """Whether token i of a sample may read token j, straight from the definition."""
    length = case.lengths[sample]
    context = case.context[sample] if case.context else 0
    history = length - (case.candidates[sample] if case.candidates else 0)
    group = case.options.get("candidate_group_size", 1)
    window = case.options.get("max_attn_len")

    def kind(t: int) -> str:
        return "context" if t < context else "candidate" if t >= history else "history"

    def memory(t: int) -> bool:
        return case.memory and t % 9 == 8

    ordered = j <= i or not case.options.get("causal", True)
    if case.options.get("context_attention") == "full" and kind(i) == "context":
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_rows_read_what_the_definition_says(name: str, backend: str) -> None:
    """With q.k = 0 and a bias table of ones each visible value counts silu(1)/S: values are one-hot."""
    case = CASES[name]
    _, arguments = build(case)
    longest = max(case.lengths, default=0)
    total = sum(case.lengths)
    places = torch.cat([torch.arange(n) for n in case.lengths]) if case.lengths else torch.zeros(0).long()
    arguments["bias"] = RelativeBias(position=torch.ones(2 * longest + 1))
    q = torch.zeros(total, 1, 4)
    v = torch.eye(max(longest, 1))[places][:, None, :]
    out = hstu_attention(q, q, v, **arguments, backend=backend)[:, 0] * arguments["scaling_seqlen"]
    seen = out.div(torch.nn.functional.silu(torch.tensor(1.0))).round().long()
    start = 0
    for sample, n in enumerate(case.lengths):
        expected = torch.tensor(
            [[may_read(case, sample, i, j) for j in range(n)] for i in range(n)], dtype=torch.int64
        ).view(n, n)
        assert torch.equal(seen[start : start + n, :n], expected), f"sample {sample}"
        start += n


@pytest.mark.parametrize("context, candidates, group", list(itertools.product((0, 2), (0, 3), (1, 2))))
def test_visible_of_one_short_sample(context: int, candidates: int, group: int) -> None:
    case = Case((7,), context=(context,), candidates=(candidates,), options={"candidate_group_size": group})
    place = torch.arange(7)
    seen = visible(
        Mask(candidate_group_size=group),
        place[:, None],
        place[None, :],
        context=context,
        history=7 - candidates,
    )
    assert seen.tolist() == [[may_read(case, 0, i, j) for j in range(7)] for i in range(7)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["causal", "candidates", "everything"])
def test_a_changed_token_leaves_rows_that_may_not_read_it_bit_for_bit(name: str, backend: str) -> None:
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
        readers = [start + i for i in range(case.lengths[sample]) if i == j or may_read(case, sample, i, j)]
        assert set(changed) <= set(readers)
        assert start + j in changed


@pytest.mark.parametrize("name", ["bias_next", "everything"])
def test_another_sample_in_the_batch_changes_nothing(name: str) -> None:
    case = CASES[name]
    (q, k, v), arguments = build(case)
    together = hstu_attention(q, k, v, **arguments, backend="cpu")
    rows = slice(sum(case.lengths[:5]), sum(case.lengths[:6]))
    alone = dict(arguments, offsets=torch.tensor([0, case.lengths[5]]))
    for option in ("num_context", "num_candidates"):
        if option in alone:
            alone[option] = alone[option][5:6]
    for option in ("segments", "is_memory"):
        if option in alone:
            alone[option] = alone[option][rows]
    alone["bias"] = replace(alone["bias"], timestamps=alone["bias"].timestamps[rows])
    torch.testing.assert_close(
        hstu_attention(q[rows], k[rows], v[rows], **alone, backend="cpu"),
        together[rows],
        rtol=1e-5,
        atol=1e-6,
    )
