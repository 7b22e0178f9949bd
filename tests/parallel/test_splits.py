"""What cannot be split is refused, with what to do instead."""

from __future__ import annotations

import pytest
import torch

from hstu.config import ConfigError, load_config
from hstu.models.backbone import make_backbone
from hstu.parallel import Mesh
from hstu.parallel.context import ContextParallel, attend_across_ranks
from hstu.parallel.mesh import Group
from hstu.parallel.tensor import Cut, TensorParallel
from tests.tiny import BINDINGS


def group_of(size: int) -> Group:
    return Group(rank=0, size=size, group=None)  # type: ignore[arg-type]


def split(*bindings: str, ranks: int = 2) -> None:
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], *bindings]).config
    backbone = make_backbone(config.network, 17)
    TensorParallel(group_of(ranks), config.tensor_model_parallel, torch.device("cpu")).split(backbone, config.network)


@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        (("NetworkArgs.num_attention_heads=3",), "does not divide NetworkArgs.num_attention_heads = 3"),
        (("NetworkArgs.backbone='sasrec'", "NetworkArgs.ffn_hidden_size=15"), "NetworkArgs.ffn_hidden_size = 15"),
        (("NetworkArgs.backbone='llama'", "NetworkArgs.num_query_groups=1"), "NetworkArgs.num_query_groups = 1"),
        (("NetworkArgs.backbone='gru'",), "NetworkArgs.backbone = 'gru' cannot be cut"),
    ],
)
def test_what_heads_cannot_share(bindings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match="tensor_model_parallel_size = 2") as caught:
        split(*bindings)
    assert said in str(caught.value)


def test_a_backbone_that_needs_whole_sequences() -> None:
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], "NetworkArgs.backbone='gru'"]).config
    context = ContextParallel.__new__(ContextParallel)
    context.size = 2
    with pytest.raises(ConfigError, match="context_parallel_size = 2: NetworkArgs.backbone = 'gru' needs whole"):
        attend_across_ranks(make_backbone(config.network, 17), context, config.network)


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
