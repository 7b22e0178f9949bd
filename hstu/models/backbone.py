"""Config to backbone: jagged in, jagged out, whatever its kind."""

from __future__ import annotations

from torch import nn

from hstu.config import NetworkArgs
from hstu.config.backbones import HUGGING_FACE
from hstu.layers.hstu import HSTUConfig, HSTUStack, hstu_preset
from hstu.layers.huggingface import HuggingFaceStack
from hstu.layers.llama import LLaMAConfig, LLaMAStack
from hstu.layers.mean import MeanStack
from hstu.layers.recurrent import RecurrentStack
from hstu.layers.transformer import TransformerConfig, TransformerStack
from hstu.models.custom import make_custom
from hstu.ops import Mask


def make_backbone(network: NetworkArgs, max_tokens: int, *, with_candidates: bool = True) -> nn.Module:
    """Return the module from ``Tokens`` to hidden states [T, D] that ``network`` describes.

    Args:
        network: The knobs.
        max_tokens: Tokens of the longest sample.
        with_candidates: Whether samples may have candidates.

    Raises:
        ConfigError: for a backbone that does not exist, or a HuggingFace model that cannot be built.
    """
    if network.backbone in ("hstu", "llama", "sasrec", "bert"):
        stack = _stack(network, max_tokens)
        stack.recompute = network.recompute == "full"
        return stack
    if network.backbone in ("gru", "lstm"):
        return RecurrentStack(network.backbone, network.hidden_size, network.num_layers, network.hidden_dropout)  # type: ignore[arg-type]
    if network.backbone == "mean":
        return MeanStack(network.hidden_size, attention_mask(network), network.norm_epsilon)
    if network.is_hugging_face:
        return _hugging_face(network, max_tokens, with_candidates)
    return make_custom(network, max_tokens)


def _stack(network: NetworkArgs, max_tokens: int) -> HSTUStack | LLaMAStack | TransformerStack:
    if network.backbone == "hstu":
        return HSTUStack(_hstu_config(network, max_tokens), network.num_layers)
    if network.backbone == "llama":
        return LLaMAStack(_llama_config(network), network.num_layers)
    return TransformerStack(_transformer_config(network), network.num_layers)


def attention_mask(network: NetworkArgs) -> Mask:
    """Return who attends to whom in every layer of the backbone."""
    return Mask(
        causal=not network.is_masked,
        context=network.context_attention,
        max_attn_len=network.max_attn_len,
        # Of a masked backbone the hidden items of a permutation take the place of candidates, each after the other.
        candidate_group_size=2**30 if network.is_masked else network.target_group_size,
    )


def has_position_table(network: NetworkArgs) -> bool:
    """Whether the backbone takes positions from a table rather than knowing them itself."""
    return network.backbone not in ("llama", "gru", "lstm", "mean") and not network.is_hugging_face


def _hstu_config(network: NetworkArgs, max_tokens: int) -> HSTUConfig:
    selective = network.recompute == "selective"
    return HSTUConfig(
        hidden_size=network.hidden_size,
        num_heads=network.num_attention_heads,
        qk_channels=network.kv_channels,
        value_channels=network.value_channels,
        max_tokens=max_tokens,
        scaling_seqlen=float(network.scaling_seqlen),
        gate=network.gate,
        position_bias=network.relative_position_bias,
        time_bias_buckets=network.num_bias_time_buckets if network.relative_time_bias else 0,
        bias_query_time=network.bias_query_time,
        mask=attention_mask(network),
        dropout=network.hidden_dropout,
        norm_eps=network.norm_epsilon,
        recompute_norm=selective or network.recompute_input_layernorm,
        recompute_silu=selective or network.recompute_input_silu,
        recompute_gate=selective or network.recompute_gate,
        backend={"auto": "auto", "pytorch": "reference", "triton": "triton"}[network.kernel_backend],  # type: ignore[arg-type]
        **hstu_preset(network.preset),
    )


def _transformer_config(network: NetworkArgs) -> TransformerConfig:
    return TransformerConfig(
        hidden_size=network.hidden_size,
        num_heads=network.num_attention_heads,
        head_channels=network.kv_channels,
        ffn_size=network.ffn_hidden_size,
        activation="gelu" if network.backbone == "bert" else "relu",  # Sun et al. 2019; Kang & McAuley 2018
        norm=network.norm_placement,
        mask=attention_mask(network),
        dropout=network.hidden_dropout,
        norm_eps=network.norm_epsilon,
    )


def _hugging_face(network: NetworkArgs, max_tokens: int, with_candidates: bool) -> nn.Module:
    try:
        return HuggingFaceStack(
            network.backbone.removeprefix(HUGGING_FACE),
            hidden_size=network.hidden_size,
            num_layers=network.num_layers,
            num_heads=network.num_attention_heads,
            ffn_size=network.ffn_hidden_size,
            max_tokens=max_tokens,
            dropout=network.hidden_dropout,
            mask=attention_mask(network),
            with_candidates=with_candidates,
            pretrained=network.pretrained_backbone,
        )
    except ValueError as error:
        raise network.error("backbone", str(error)) from None


def _llama_config(network: NetworkArgs) -> LLaMAConfig:
    return LLaMAConfig(
        hidden_size=network.hidden_size,
        num_heads=network.num_attention_heads,
        num_groups=network.num_query_groups,
        head_channels=network.kv_channels,
        ffn_size=network.ffn_hidden_size,
        mask=attention_mask(network),
        dropout=network.hidden_dropout,
        norm_eps=network.norm_epsilon,
    )
