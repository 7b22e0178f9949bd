"""Which backbone has a use for which field of ``NetworkArgs``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hstu.config.base import ConfigError
from hstu.registry import Registry, T

if TYPE_CHECKING:
    from hstu.config.args import NetworkArgs

BACKBONES = ("hstu", "sasrec", "llama", "bert", "gru", "lstm", "mean", "hf:<config>")
HUGGING_FACE = "hf:"
_SPLIT = ("hstu", "sasrec", "llama", "bert")  # those whose sequences and heads ranks can share
RECOMPUTE = ("recompute_input_layernorm", "recompute_input_silu", "recompute_gate")

# Field: value when unset, backbones with a use for it, what it belongs to.
_USES: dict[str, tuple[object, tuple[str, ...], str]] = {
    "relative_position_bias": (None, ("hstu",), "relative bias inside SiLU attention"),
    "relative_time_bias": (None, ("hstu",), "relative bias inside SiLU attention"),
    "gate": (None, ("hstu",), "gated attention output"),
    "value_channels": (None, ("hstu",), "heads whose values have a width of their own"),
    "scaling_seqlen": (-1, ("hstu",), "attention without softmax"),
    **{field: (False, ("hstu",), "the fused layer") for field in RECOMPUTE},
    "ffn_hidden_size": (None, ("sasrec", "llama", "bert", "hf"), "feed-forward layers"),
    "num_query_groups": (None, ("llama",), "grouped-query attention"),
    "norm_placement": (None, ("sasrec", "bert"), "a choice between pre- and post-norm"),
    "num_position_buckets": (None, ("hstu", "sasrec", "bert"), "a position table"),
    "max_attn_len": (None, ("hstu", "sasrec", "llama", "mean", "hf"), "causal attention"),
    "target_group_size": (1, ("hstu", "sasrec", "llama", "mean", "hf"), "attention between candidates"),
    "context_attention": ("causal", ("hstu", "sasrec", "llama", "mean", "hf"), "causal attention"),
}

CUSTOM_BACKBONES = Registry("backbone", BACKBONES)


def register_backbone(name: str, *, uses: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Return a decorator for a backbone of your own, chosen by ``NetworkArgs.backbone = name``.

    What it is put on is called with the ``NetworkArgs``, the most tokens of a sample, and ``backbone_options`` by their
    names, and returns a module from ``hstu.layers.tokens.Tokens`` to hidden rows [T, D] (D = ``hidden_size``). No row
    may depend on a later one of its sample, on another sample, or (with candidates) on another candidate: the first
    two are tried out when a model is built. The module initialises its own weights, from the seed of the run, and
    each rank has all of them.

    Args:
        name: Of letters, digits and underscores.
        uses: Fields of ``NetworkArgs`` that other backbones refuse and this one reads, as ``("max_attn_len",)``.

    Raises:
        ValueError: for a name that is taken, and a field that does not exist.
    """
    if unknown := [field for field in uses if field not in _USES]:
        raise ValueError(f"backbone {name!r}: uses = {unknown[0]!r}: is none of {', '.join(_USES)}")
    return CUSTOM_BACKBONES.add(name, uses=(*uses, "num_position_buckets"))


PRESETS: dict[str, dict[str, Any]] = {
    "research": dict(relative_position_bias=True, relative_time_bias=True, gate="mul", norm_epsilon=1e-6),
    "production": dict(relative_position_bias=False, relative_time_bias=False, gate="mul", norm_epsilon=1e-5),
}


def backbone_defaults(network: NetworkArgs) -> dict[str, Any]:
    """Return the value of each field whose default is the backbone's: what its paper has."""
    width, ffn = network.hidden_size, dict(ffn_hidden_size=4 * network.hidden_size)
    own: dict[str, dict[str, Any]] = {
        "hstu": dict(PRESETS[network.preset], value_channels=network.kv_channels, scale_inputs=True),
        # Kang & McAuley 2018: feed-forward layers as wide as the stream.
        "sasrec": dict(ffn_hidden_size=width, norm_placement="pre", scale_inputs=True),
        # Touvron et al. 2023: a gate beside 8/3 of it.
        "llama": dict(ffn_hidden_size=swiglu_size(width), num_query_groups=network.num_attention_heads),
        "bert": dict(ffn, norm_placement="post"),
        **dict.fromkeys(("gru", "lstm", "mean"), {}),
        **{name: {} for name in CUSTOM_BACKBONES.names},
    }
    return dict(scale_inputs=False) | own.get(network.backbone, ffn)


def check_backbone(network: NetworkArgs) -> None:
    """Raise ``ConfigError`` for an unknown backbone, or a field that it has no use for."""
    name = "hf" if network.is_hugging_face else network.backbone
    custom = CUSTOM_BACKBONES.get(name)
    if name != "hf" and name not in BACKBONES[:-1] and custom is None:
        known = ", ".join(map(repr, (*BACKBONES, *CUSTOM_BACKBONES.names)))
        raise network.error("backbone", f"must be one of {known}; one of your own is registered by a module that "
                            "--import names")  # fmt: skip
    if network.pretrained_backbone and name != "hf":
        raise network.error(
            "pretrained_backbone", f"is for models of the transformers library, 'hf:DIRECTORY', not {name}"
        )
    if network.backbone_options and custom is None:
        raise network.error("backbone_options", f"are those of a registered backbone, which {name} is not")
    for field, (unset, users, what) in _USES.items():
        value = getattr(network, field)
        if custom is not None and field in custom.traits["uses"]:
            continue
        if name not in users and value != unset and value is not False:
            raise network.error(field, f"belongs to {what} ({', '.join(users)}), which {name} does not have")
    if name != "hstu" and network.kernel_backend == "triton":
        raise network.error("kernel_backend", f"the Triton kernels are those of hstu; use 'auto' for {name}")
    if network.recompute == "selective" and name != "hstu":
        raise network.error("recompute", f"belongs to the fused layer (hstu), which {name} does not have; use 'full'")
    if network.recompute == "full" and network.backbone not in _SPLIT:
        raise network.error("recompute", f"belongs to layers of attention ({', '.join(_SPLIT)}), not to {name}")
    if (fields := of_fused_layer(network)) and network.kernel_backend == "pytorch":
        raise network.error(fields[0], "needs the fused layer: NetworkArgs.kernel_backend = 'auto' or 'triton'")
    if network.is_causal == network.is_masked:
        trained = "masked items from both sides" if network.is_masked else "what follows"
        raise network.error("is_causal", f"{name} is trained to predict {trained}; leave it unset")
    if network.is_masked and (network.max_attn_len is not None or network.context_attention == "full"):
        field = "context_attention" if network.max_attn_len is None else "max_attn_len"
        raise network.error(field, "belongs to causal attention; masked items are predicted from both sides")
    if name == "llama":
        if network.num_attention_heads % network.num_query_groups:
            raise network.error("num_query_groups", f"must divide num_attention_heads = {network.num_attention_heads}")
        if network.kv_channels % 2:
            raise network.error(
                "kv_channels", "rotary positions rotate pairs of channels; use an even number for llama"
            )


def of_fused_layer(network: NetworkArgs) -> list[str]:
    """Return the fields that ask the fused layer to compute something again."""
    fields = [name for name in RECOMPUTE if getattr(network, name)]
    return fields if network.recompute != "selective" else ["recompute", *fields]


def swiglu_size(hidden_size: int) -> int:
    """Return the inner width of SwiGLU that costs what 4 D would without a gate: 8 D / 3, rounded up to 32."""
    return -(-int(8 * hidden_size / 3) // 32) * 32


def check_degrees(network: NetworkArgs, context: int, tensor: int) -> None:
    """Raise ``ConfigError`` for a network that ``context`` or ``tensor`` ranks cannot share: training and plan ask."""
    recomputed = of_fused_layer(network)
    if recomputed and (context > 1 or tensor > 1):
        other = "set it to False" if recomputed[0] in RECOMPUTE else "use 'full'"
        raise network.error(recomputed[0], f"needs whole weights and sequences on a rank; {other}, or "
                            "context_parallel_size and tensor_model_parallel_size to 1")  # fmt: skip
    whole = f"NetworkArgs.backbone = {network.backbone!r} "
    if context > 1 and network.backbone not in _SPLIT:
        reason = f"= {context}: {whole}needs whole sequences; use 1, or hstu, sasrec, llama or bert"
        raise ConfigError("ContextParallelArgs.context_parallel_size", reason)
    shared = ("num_attention_heads", "ffn_hidden_size", "num_query_groups")
    widths = {name: width for name in shared if (width := getattr(network, name)) is not None}
    reasons = [f"does not divide NetworkArgs.{name} = {width}" for name, width in widths.items() if width % tensor]
    if network.backbone not in _SPLIT:
        reasons = [f"{whole}cannot be cut by heads; use 1"]
    if tensor > 1 and reasons:
        raise ConfigError("TensorModelParallelArgs.tensor_model_parallel_size", f"= {tensor}: {reasons[0]}")
