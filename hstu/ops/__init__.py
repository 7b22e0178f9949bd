"""Operations of the library: tensors in, tensors out. Needs torch; triton only for the GPU kernels."""

from hstu.ops.attention import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops.checks import debug_checks
from hstu.ops.jagged import (
    add_positions,
    concat_jagged,
    interleave_jagged,
    lengths_to_offsets,
    positions_in_sequence,
    sequence_ids,
    sequences_and_positions,
    split_jagged,
)
from hstu.ops.layer import LayerOptions, LayerWeights, hstu_layer
from hstu.ops.softmax import pool_cross_entropy
from hstu.ops.transfer import host_to_device

__all__ = [
    "Layout",
    "LayerOptions",
    "LayerWeights",
    "Mask",
    "RelativeBias",
    "add_positions",
    "concat_jagged",
    "debug_checks",
    "host_to_device",
    "hstu_attention",
    "hstu_layer",
    "interleave_jagged",
    "lengths_to_offsets",
    "pool_cross_entropy",
    "positions_in_sequence",
    "sequence_ids",
    "sequences_and_positions",
    "softmax_attention",
    "split_jagged",
]
