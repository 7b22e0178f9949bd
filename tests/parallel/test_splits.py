"""What cannot be split is refused, with what to do instead."""

from __future__ import annotations

import pytest
import torch

from hstu.config import Config, ConfigError, load_config
from hstu.parallel import Mesh
from hstu.parallel.mesh import Group
from hstu.parallel.tensor import Cut
from tests.tiny import BINDINGS


def load(*bindings: str, context: int = 1, tensor: int = 1) -> Config:
    degrees = (
        f"ContextParallelArgs.context_parallel_size={context}",
        f"TensorModelParallelArgs.tensor_model_parallel_size={tensor}",
    )
    return load_config("retrieval", [], [*BINDINGS["retrieval"], *bindings, *degrees]).config


REFUSED = {
    "heads": (("NetworkArgs.num_attention_heads=3",), 1, 2, "does not divide NetworkArgs.num_attention_heads = 3"),
    "feed-forward": (("NetworkArgs.backbone='sasrec'", "NetworkArgs.ffn_hidden_size=15"), 1, 2, "ffn_hidden_size = 15"),
    "default feed-forward": (
        ("NetworkArgs.backbone='sasrec'", "NetworkArgs.hidden_size=18", "NetworkArgs.num_attention_heads=4"),
        1, 4, "ffn_hidden_size = 18",
    ),
    "groups": (("NetworkArgs.backbone='llama'", "NetworkArgs.num_query_groups=1"), 1, 2, "num_query_groups = 1"),
    "gru": (("NetworkArgs.backbone='gru'",), 1, 2, "NetworkArgs.backbone = 'gru' cannot be cut"),
    "gru sequences": (("NetworkArgs.backbone='gru'",), 2, 1, "NetworkArgs.backbone = 'gru' needs whole sequences"),
    "hf": (("NetworkArgs.backbone='hf:gpt2'",), 1, 2, "NetworkArgs.backbone = 'hf:gpt2' cannot be cut"),
    "hf sequences": (("NetworkArgs.backbone='hf:gpt2'",), 2, 1, "'hf:gpt2' needs whole sequences"),
    "recomputed": (("NetworkArgs.recompute_gate=True",), 2, 1, "recompute_gate = True: needs whole weights"),
    "selective": (("NetworkArgs.recompute='selective'",), 2, 1, "recompute = 'selective': needs whole weights and "
                  "sequences on a rank; use 'full'"),
    "recomputed, cut": (("NetworkArgs.recompute_input_silu=True",), 1, 2, "recompute_input_silu = True: needs whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_share(name: str) -> None:
    bindings, context, tensor, said = REFUSED[name]
    load(*bindings)
    with pytest.raises(ConfigError) as caught:
        load(*bindings, context=context, tensor=tensor)
    assert said in str(caught.value)


def test_degrees_that_do_not_divide_the_ranks() -> None:
    with Mesh.create() as mesh:
        assert mesh.with_degrees(1, 1) is mesh
        with pytest.raises(ValueError, match="context_parallel_size = 3 times .* = 2 does not divide the 1 rank"):
            mesh.with_degrees(3, 2)
        assert mesh.degrees == [1, 1, 1]


def test_a_cut_takes_a_share_of_each_part() -> None:
    whole = torch.arange(12.0).view(12, 1)
    own = Cut(dim=0, parts=(4, 8), group=Group(rank=1, size=2, group=None)).own(whole)  # type: ignore[arg-type]
    assert own.flatten().tolist() == [2, 3, 8, 9, 10, 11]
