"""Every knob of a run, once. Class and field names are those of NVIDIA's recsys-examples; ours are added."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from hstu.config.backbones import CUSTOM_BACKBONES, HUGGING_FACE, backbone_defaults, check_backbone, check_degrees
from hstu.config.base import UNSET, Args, ConfigError
from hstu.config.dataset import DatasetArgs
from hstu.config.embedding import DynamicEmbeddingArgs, EmbeddingArgs
from hstu.config.features import FeatureArgs
from hstu.config.item_text import TEXT_WEIGHTS, ItemTextArgs
from hstu.config.memory import MemoryArgs
from hstu.config.ranking import RankingArgs
from hstu.config.retrieval import RetrievalArgs
from hstu.config.training import OptimizerArgs, TrainerArgs


@dataclass(frozen=True, kw_only=True)
class NetworkArgs(Args):
    """The backbone. Fields that another backbone has no use for are refused when set; see ``config/backbones.py``.

    ``preset`` fixes the published parametrisation of hstu; a field that is set overrides it. ``research``
    is the one behind the paper's public tables (relative position and time bias, no affine norm, alpha = 1);
    ``production`` is the one of the industrial systems (https://arxiv.org/abs/2402.17152).
    """

    #: Layers of the backbone.
    num_layers: int
    #: Width D of the token stream.
    hidden_size: int
    #: Heads H of attention.
    num_attention_heads: int
    #: Width of a query and key head, and unless value_channels says otherwise of a value head.
    kv_channels: int
    #: "hstu", "sasrec", "llama", "gru", "lstm", "mean" (of the sequence so far), or "bert", which predicts
    #: masked items from both sides (retrieval), or any HuggingFace model under our mask: "hf:gpt2" (a type, shaped by
    #: these fields) or "hf:DIRECTORY" (a config.json).
    backbone: str = "hstu"
    #: Start from the weights in DIRECTORY of "hf:DIRECTORY"; False: from random ones.
    pretrained_backbone: bool = False
    #: What a registered backbone is called with, by name.
    backbone_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    #: Published parametrisation of hstu, see above.
    preset: Literal["research", "production"] = "production"
    #: Width of the values of a head; None: kv_channels.
    value_channels: int = UNSET
    #: Add a learned bias by distance to the scores of attention (hstu); None: as preset has it.
    relative_position_bias: bool = UNSET
    #: Add a learned bias by difference of times to the scores of attention (hstu); None: as preset has it.
    relative_time_bias: bool = UNSET
    #: Buckets of that bias.
    num_bias_time_buckets: int = 128
    #: Time of the row in the time bias: its own event's, or the next event's ("request-time aware").
    bias_query_time: Literal["own", "next"] = "own"
    #: How u gates the attention output o (hstu): "mul": u * norm(o); "concat": [u, o, u * norm(o)].
    gate: Literal["mul", "concat"] = UNSET
    #: Inner width of feed-forward layers; None: what the backbone's paper uses.
    ffn_hidden_size: int = UNSET
    #: Heads of keys and values (llama); None: num_attention_heads.
    num_query_groups: int = UNSET
    #: Norm before each sublayer or after it; None: "pre" for sasrec, "post" for bert.
    norm_placement: Literal["pre", "post"] = UNSET
    #: Dropout of what a layer adds to the stream; of hstu, of the gated attention output.
    hidden_dropout: float = 0.2
    #: Dropout of the embedded tokens; None: hidden_dropout.
    input_dropout: float = UNSET
    #: Multiply embedded tokens by sqrt(hidden_size) (https://arxiv.org/abs/1706.03762, section 3.4). None: as the
    #: backbone's paper or its code has it: hstu and sasrec do.
    scale_inputs: bool = UNSET
    #: None: 1e-6 for the research preset of hstu, else 1e-5.
    norm_epsilon: float = UNSET
    #: None: what the backbone is trained for; of "hf:", False trains on masked items.
    is_causal: bool = UNSET
    #: The largest distance, in tokens, to a token of the history that is attended to; None: no limit.
    max_attn_len: int | None = None
    #: "full": context tokens also attend to the history after them.
    context_attention: Literal["causal", "full"] = "causal"
    #: Candidates attend to those before them in their group of this size; 1: to none.
    target_group_size: int = 1
    #: "interleave": item, action, item, action; "add": their sum, one token per event; "concat": side by side
    #: through a matrix, one token per event; "item": no actions.
    #: None: "interleave" for ranking, "item" for retrieval.
    token_layout: Literal["interleave", "add", "concat", "item"] = UNSET
    #: Rows of the position table; None: as many as the longest sequence that config and data allow has tokens.
    num_position_buckets: int = UNSET
    #: The constant that divides attention; -1: the tokens of the longest sequence that config and data allow.
    scaling_seqlen: int = -1
    #: Rows of a table of times that is added to the tokens; 0: no such table.
    num_time_buckets: int = 0
    #: "age": seconds before the request. Where several rows of a sample carry a loss, as in retrieval unless
    #: DatasetArgs.train_stride = 1, those would see the future in it. "gap": seconds since the event before.
    time_bucket_of: Literal["age", "gap"] = "age"
    #: What of the seconds numbers the row: their square root, or the logarithm of one more.
    time_bucket_fn: Literal["sqrt", "log"] = "sqrt"
    #: What an item's vector is made of: "local", a row of its own; "categorical", its features (the other columns of
    #: the items file) and its text (ItemTextArgs); "both". None: "both" where items have features or text.
    item_embedding: Literal["local", "categorical", "both"] = UNSET
    #: Width of the embeddings of items; -1: hidden_size.
    item_embedding_dim: int = -1
    #: Width of the embeddings of actions; -1: hidden_size.
    action_embedding_dim: int = -1
    #: Width of the embeddings of context features; -1: hidden_size.
    contextual_embedding_dim: int = -1
    #: None: "l2" for retrieval, "layer_norm" for ranking.
    output_norm: Literal["l2", "layer_norm", "none"] = UNSET
    #: How weights of matrices are drawn.
    dense_initializer_type: Literal["normal", "xavier_uniform"] = "normal"
    #: Standard deviation of "normal".
    dense_initializer_normal_std: float = 0.02
    #: Standard deviation of initial rows of tables.
    embedding_initializer_std: float = 0.02
    #: Of matrix products and attention; weights, norms and losses are float32.
    dtype_str: Literal["float32", "bfloat16"] = "float32"
    #: Of the stream between layers, for memory and bandwidth: bfloat16 with dtype_str = "bfloat16" alone, and not for
    #: gru, lstm, mean and hf.
    residual_dtype_str: Literal["float32", "bfloat16"] = "float32"
    #: Attention of hstu: "auto", by device; "pytorch", the plain definition; "triton", the GPU kernels.
    kernel_backend: Literal["auto", "pytorch", "triton"] = "auto"
    #: What the backward pass computes again instead of keeping it, for memory. "full": each layer, from its input
    #: alone, for a third more arithmetic, with the same loss and gradients (hstu, sasrec, llama, bert). "selective": of
    #: hstu, norm, SiLU and gate, which is all three of the switches below, for hardly any.
    recompute: Literal["none", "selective", "full"] = "none"
    #: Compute the norm of a layer's input again in the backward of hstu instead of keeping it, for memory.
    recompute_input_layernorm: bool = False
    #: Likewise SiLU of u, v, q and k.
    recompute_input_silu: bool = False
    #: Likewise the gated attention output.
    recompute_gate: bool = False

    limits: ClassVar = {
        **dict.fromkeys(("num_layers", "num_attention_heads", "num_query_groups"), (1, 1024)),
        **dict.fromkeys(("hidden_size", "kv_channels", "value_channels"), (1, 2**17)),
        "ffn_hidden_size": (1, 2**20),
        **dict.fromkeys(("item_embedding_dim", "action_embedding_dim", "contextual_embedding_dim"), (-1, 2**17)),
        **dict.fromkeys(("num_bias_time_buckets", "num_position_buckets"), (1, 2**24)),
        "num_time_buckets": (0, 2**24),
        **dict.fromkeys(("max_attn_len", "target_group_size"), (1, 2**31)),
        "scaling_seqlen": (-1, 2**31),
        **dict.fromkeys(("hidden_dropout", "input_dropout"), (0, 1)),
        **dict.fromkeys(("dense_initializer_normal_std", "embedding_initializer_std"), (1e-20, 100)),
        "norm_epsilon": (1e-20, 1),
        "backbone_options": (-(2**62), 2**62),
    }

    def resolve(self) -> None:
        width = self.hidden_size
        self.default(**backbone_defaults(self))
        self.default(item_embedding_dim=width, action_embedding_dim=width, contextual_embedding_dim=width)
        self.default(input_dropout=self.hidden_dropout, norm_epsilon=1e-5, is_causal=self.backbone != "bert")

    def validate(self) -> None:
        self.require_range("hidden_dropout", 0, 1)
        if self.residual_dtype_str == "bfloat16":
            if self.dtype_str != "bfloat16":
                raise self.error("residual_dtype_str", "needs NetworkArgs.dtype_str = 'bfloat16'")
            if self.backbone in ("gru", "lstm", "mean") or self.is_hugging_face or self.is_custom:
                raise self.error("residual_dtype_str", f"{self.backbone} has no stream of this library; use 'float32'")
        self.require_range("input_dropout", 0, 1)
        for name in (
            "scaling_seqlen",
            "item_embedding_dim",
            "action_embedding_dim",
            "contextual_embedding_dim",
        ):
            if getattr(self, name) != -1:
                self.require_positive(name)
        check_backbone(self)

    @property
    def is_masked(self) -> bool:
        """Whether the backbone is trained to predict masked items rather than what follows."""
        return self.backbone == "bert" or (self.is_hugging_face and self.is_causal is False)

    @property
    def is_custom(self) -> bool:
        """Whether the backbone is a registered one."""
        return CUSTOM_BACKBONES.get(self.backbone) is not None

    @property
    def is_hugging_face(self) -> bool:
        """Whether the backbone comes from the transformers library."""
        return self.backbone.startswith(HUGGING_FACE)


@dataclass(frozen=True, kw_only=True)
class ContextParallelArgs(Args):
    """Context parallelism: each rank holds a part of every sequence, for sequences too long for one."""

    #: Ranks that share a sequence.
    context_parallel_size: int = 1

    limits: ClassVar = {"context_parallel_size": (1, 2**16)}


@dataclass(frozen=True, kw_only=True)
class TensorModelParallelArgs(Args):
    """Tensor parallelism: each rank holds a part of the heads and of the feed-forward widths."""

    #: Ranks that share the heads and feed-forward widths of a layer.
    tensor_model_parallel_size: int = 1
    #: Also split tokens over these ranks between the products, where every rank would hold all of them.
    sequence_parallel: bool = False

    limits: ClassVar = {"tensor_model_parallel_size": (1, 1024)}

    def validate(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise self.error("sequence_parallel", "needs TensorModelParallelArgs.tensor_model_parallel_size above 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of. Exactly one of ``ranking`` and ``retrieval`` is set."""

    trainer: TrainerArgs
    dataset: DatasetArgs
    network: NetworkArgs
    optimizer: OptimizerArgs
    embedding: EmbeddingArgs = field(default_factory=EmbeddingArgs)
    dynamic_embedding: DynamicEmbeddingArgs = field(default_factory=DynamicEmbeddingArgs)
    feature: FeatureArgs = field(default_factory=FeatureArgs)
    item_text: ItemTextArgs = field(default_factory=ItemTextArgs)
    memory: MemoryArgs = field(default_factory=MemoryArgs)
    context_parallel: ContextParallelArgs = field(default_factory=ContextParallelArgs)
    tensor_model_parallel: TensorModelParallelArgs = field(default_factory=TensorModelParallelArgs)
    ranking: RankingArgs | None = None
    retrieval: RetrievalArgs | None = None

    def __post_init__(self) -> None:
        assert (self.ranking is None) != (self.retrieval is None), "exactly one task"
        network = replace(
            self.network,
            token_layout=self.network.token_layout or ("interleave" if self.ranking else "item"),
            output_norm=self.network.output_norm or ("layer_norm" if self.ranking else "l2"),
        )
        object.__setattr__(self, "network", network)
        if (factor := self.item_text.learning_rate_factor) != 1:
            factors = {TEXT_WEIGHTS: factor} | self.optimizer.learning_rate_factors
            object.__setattr__(self, "optimizer", replace(self.optimizer, learning_rate_factors=factors))
        object.__setattr__(self, "memory", self.memory.fitted(self.dataset, network))
        self.dynamic_embedding.check(self.embedding)
        if self.item_text.is_vector and network.item_embedding == "local":
            raise network.error("item_embedding", "gives items rows alone; with ItemTextArgs.model use 'both' or "
                                "'categorical', or ItemTextArgs.use = 'start'")  # fmt: skip
        if self.item_text.use == "start" and network.item_embedding == "categorical":
            raise network.error("item_embedding", "gives items no rows, which are to start from their texts; use "
                                "'both', or ItemTextArgs.use = 'vector'")  # fmt: skip
        check_degrees(
            network,
            self.context_parallel.context_parallel_size,
            self.tensor_model_parallel.tensor_model_parallel_size,
        )
        if network.is_masked and self.retrieval is None:
            raise network.error("backbone", "predicts masked items, not actions; use another one for ranking")
        if network.is_masked and network.token_layout != "item":
            raise network.error("token_layout", "the action of an item to be predicted is unknown; use 'item' with "
                                f"{network.backbone}")  # fmt: skip
        if self.retrieval is not None and self.retrieval.objective != "masked":
            self._check_objective(network, self.retrieval)
        if self.retrieval is not None and self.dataset.max_num_candidates:
            raise self.dataset.error("max_num_candidates", "retrieval has no candidates; use 0")
        if self.dataset.max_num_candidates == 0:
            self._check_no_future(network)
        if self.retrieval is None and network.token_layout != "interleave" and self.dataset.max_num_candidates == 0:
            raise network.error("token_layout", "ranking without candidates needs 'interleave': in any other "
                                "layout a row either holds the action it should predict or sees none")  # fmt: skip

    def _check_objective(self, network: NetworkArgs, retrieval: RetrievalArgs) -> None:
        """Raise ``ConfigError`` for a way of training on hidden items that does not fit the backbone."""
        if not network.is_masked:
            raise retrieval.error("objective", f"hides items, and NetworkArgs.backbone = {network.backbone!r} predicts "
                                  "what follows; use bert, or a hf: backbone with is_causal = False")  # fmt: skip
        if retrieval.objective == "permuted" and network.num_time_buckets and network.time_bucket_of == "gap":
            raise network.error("time_bucket_of", "knows the event before, and permuted events are not in time; use "
                                "'age'")  # fmt: skip

    def _check_no_future(self, network: NetworkArgs) -> None:
        """Raise ``ConfigError`` for what would tell rows that carry a loss of events after them."""
        use = "set DatasetArgs.max_num_candidates above 0" if self.ranking else "use it for ranking with candidates"
        reason = f"would show the future to rows that carry a loss; {use}"
        if network.context_attention == "full":
            raise network.error("context_attention", reason)
        one_row = network.is_masked or self.dataset.train_stride == 1
        if network.num_time_buckets and network.time_bucket_of == "age" and not one_row:
            raise network.error("num_time_buckets", f"times before the request {reason}, or "
                                "NetworkArgs.time_bucket_of = 'gap', or DatasetArgs.train_stride = 1")  # fmt: skip

    @property
    def task(self) -> Literal["ranking", "retrieval"]:
        return "ranking" if self.ranking is not None else "retrieval"

    @property
    def recent_targets(self) -> int | None:
        """The last events of a training sample that may carry a loss; None: all."""
        after = self.memory.recent_targets
        if self.memory.num_memory_tokens and self.dataset.sessions is not None:
            after = self.memory.recent_item_num  # the memory stands before the session
        if after is None or self.ranking is None:
            return after
        # Candidates stand after every block; without them the last event is one more beside those of the history.
        return None if self.dataset.max_num_candidates else after + 1

    @property
    def eval_metrics(self) -> tuple[str, ...]:
        task = self.ranking or self.retrieval
        assert task is not None
        return task.eval_metrics


__all__ = [
    "Config",
    "ConfigError",
    "DatasetArgs",
    "DynamicEmbeddingArgs",
    "EmbeddingArgs",
    "FeatureArgs",
    "ItemTextArgs",
    "MemoryArgs",
    "NetworkArgs",
    "OptimizerArgs",
    "RankingArgs",
    "RetrievalArgs",
    "TensorModelParallelArgs",
    "TrainerArgs",
]
