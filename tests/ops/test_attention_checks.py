"""Wrong arguments are refused with an error that names them; nothing else is needed to import the ops."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops import attention as attention_module

T, H, D = 6, 2, 4


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = dict(
        q=torch.zeros(T, H, D),
        k=torch.zeros(T, H, D),
        v=torch.zeros(T, H, 3),
        scaling_seqlen=4.0,
    )
    arguments |= changes
    layout, masks = dict(offsets=torch.tensor([0, 2, 6]), max_seqlen=4), {}
    for name in list(arguments):
        if name in (*Layout.__dataclass_fields__, "max_seqlen"):
            layout[name] = arguments.pop(name)
        elif name in Mask.__dataclass_fields__:
            masks[name] = arguments.pop(name)
    if "layout" not in arguments:
        arguments["layout"] = Layout(**layout)
    return hstu_attention(mask=Mask(**masks), **arguments)


WRONG = {
    "k": (dict(k=torch.zeros(T, H, D + 1)), "k has head width 5"),
    "v": (dict(v=torch.zeros(T + 1, H, D)), "v must have the tokens and heads of k"),
    "width": (dict(q=torch.zeros(T, H, 300), k=torch.zeros(T, H, 300)), "head width 300"),
    "dtype": (dict(v=torch.zeros(T, H, D, dtype=torch.float64)), "v is torch.float64"),
    "integers": (dict(q=torch.zeros(T, H, D).int()), "q is torch.int32"),
    "offsets dtype": (dict(offsets=torch.tensor([0, 2, 6]).int()), "int64 tensor"),
    "offsets end": (dict(offsets=torch.tensor([0, 2, 5])), "q has 6 tokens, offsets of its layout end at 5"),
    "offsets order": (dict(offsets=torch.tensor([0, 5, 2, 6])), "must not decrease"),
    "offsets start": (dict(offsets=torch.tensor([1, 2, 6])), "must run from 0"),
    "no offsets": (dict(offsets=torch.zeros(0, dtype=torch.int64)), r"\[B \+ 1\]"),
    "max_seqlen": (dict(max_seqlen=3), "longest sequence has 4"),
    "max_seqlen negative": (dict(max_seqlen=-1), "max_seqlen is -1"),
    "scaling": (dict(scaling_seqlen=0.0), "scaling_seqlen is 0.0"),
    "context": (dict(context="some"), "choose 'causal' or 'full'"),
    "backend": (dict(backend="cuda"), "choose one of"),
    "group": (dict(candidate_group_size=0), "at least 1"),
    "window": (dict(max_attn_len=-1), "max_attn_len is -1"),
    "too many": (
        dict(num_context=torch.tensor([1, 2]), num_candidates=torch.tensor([1, 3])),
        "sample 1 has 5 context and candidate tokens but only 4",
    ),
    "negative": (dict(num_candidates=torch.tensor([0, -1])), "sample 1 is negative"),
    "count shape": (dict(num_context=torch.tensor([1])), "num_context must be"),
    "segments": (dict(segments=torch.zeros(T, dtype=torch.int64)), "segments must be torch.int32"),
    "memory": (dict(is_memory=torch.zeros(T)), "is_memory must be torch.bool"),
    "even table": (dict(bias=RelativeBias(position=torch.zeros(8))), "2N - 1"),
    "short table": (dict(bias=RelativeBias(position=torch.zeros(5))), "max_seqlen 4 needs 7"),
    "no times": (dict(bias=RelativeBias(time=torch.zeros(5))), "the layout has no timestamps"),
    "times": (dict(timestamps=torch.zeros(T + 1, dtype=torch.int64)), "timestamps has 7 entries, offsets end at 6"),
    "layout": (dict(layout=torch.tensor([0, 2, 6])), "must be a hstu.ops.Layout, got Tensor"),
    "keys": (dict(keys=Layout(torch.tensor([0, 1, 6]))), "sample 0 has 2 queries but only 1 keys"),
    "keys' samples": (dict(keys=Layout(torch.tensor([0, 6]))), "layout has 2 samples, keys has 1"),
    "keys' tokens": (dict(keys=Layout(torch.tensor([0, 2, 7]))), "k has 6 tokens, offsets of its layout end at 7"),
    "longer keys": (
        dict(k=torch.zeros(T + 1, H, D), v=torch.zeros(T + 1, H, D)),
        "q has 6 tokens, k has 7: give k's layout as keys",
    ),
    "k heads": (dict(k=torch.zeros(T, 1, D), v=torch.zeros(T, 1, D)), "k has 1 heads, q has 2"),
    "query_time": (
        dict(bias=RelativeBias(position=torch.zeros(7), query_time="last")),  # type: ignore[arg-type]
        "choose 'own' or 'next'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_right_arguments() -> None:
    assert call().shape == (T, H, 3)


def test_softmax_needs_heads_that_divide() -> None:
    q, k = torch.zeros(T, 3, D), torch.zeros(T, 2, D)
    with pytest.raises(ValueError, match="q has 3 heads, k has 2"):
        softmax_attention(q, k, k, Layout(torch.tensor([0, 2, 6])))


def test_a_layout_elsewhere_needs_its_longest_length() -> None:
    """Reading it back would wait for the device; ``meta`` stands for one."""
    offsets = torch.zeros(3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="max_seqlen is None and offsets are on meta"):
        Layout(offsets)
    assert Layout(offsets, max_seqlen=7).longest == 7
    with pytest.raises(ValueError, match="num_context is on cpu, offsets on meta"):
        Layout(offsets, max_seqlen=7, num_context=torch.zeros(2, dtype=torch.int64))


def test_auto_announces_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    attention_module._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="hstu.ops"):
        call()
        call()
    assert [r.getMessage() for r in caplog.records] == ["hstu_attention: backend 'cpu' (CPU tensors)"]


def test_ops_import_needs_torch_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'torchrec', 'fbgemm_gpu', 'megatron', 'gin'): sys.modules[name] = None\n"
        "import torch, hstu.ops\n"
        "q = torch.ones(2, 1, 1)\n"
        "hstu.ops.hstu_attention(q, q, q, hstu.ops.Layout(torch.tensor([0, 2])), scaling_seqlen=1.0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
