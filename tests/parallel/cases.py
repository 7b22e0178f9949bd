"""What is trained on several numbers of ranks and compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hstu.config import Config, load_config
from tests.tiny import BINDINGS


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        name: Of the test.
        task: ``"ranking"`` or ``"retrieval"``.
        bindings: On top of ``BINDINGS``.
        data: Data set: ``"even"``, ``"short"`` whose last global batch is one sample, ``"declared"`` with features,
            ``"rare"`` whose features next to nobody has, ``"text"`` whose items have texts.
        global_batch: Samples of a step over all ranks.
        plain_steps: Steps over which plain PyTorch gives the same losses; 0: it lacks the tables' optimizer.
        steps: Steps.
        context: Context ranks, of several ranks.
        tensor: Tensor ranks, of several ranks.
        begins_as: The case whose state it goes on from, where one is loaded; None: its own.
    """

    name: str
    task: str
    bindings: tuple[str, ...] = ()
    data: str = "even"
    global_batch: int = 32
    plain_steps: int = 10
    steps: int = 30
    context: int = 1
    tensor: int = 1
    begins_as: str | None = None


SGD = ("OptimizerArgs.optimizer_str='sgd'", "OptimizerArgs.learning_rate=0.02")
FAST_TABLES = ("OptimizerArgs.sparse_learning_rate=0.02",)
IN_BATCH = ("RetrievalArgs.num_negatives=-1", "RetrievalArgs.sampling_strategy='in_batch'")
FULL = ("RetrievalArgs.loss='full_softmax'",)
LLAMA_BCE = ("NetworkArgs.backbone='llama'", "RetrievalArgs.loss='bce'", "RetrievalArgs.num_negatives=1")
BPR = ("RetrievalArgs.loss='bpr'",)
BERT = ("NetworkArgs.backbone='bert'", "NetworkArgs.kv_channels=8")
PERMUTED = ("RetrievalArgs.objective='permuted'", "RetrievalArgs.mask_probability=0.4")
REPLACED = ("RetrievalArgs.objective='replaced'", "RetrievalArgs.mask_probability=0.4")
SASREC_MOL = (
    "NetworkArgs.backbone='sasrec'",
    "RetrievalArgs.similarity='mol'",
    "RetrievalArgs.mol_dropout=0.0",
    "RetrievalArgs.mol_mutual_information=0.1",
    "RetrievalArgs.sampling_strategy='log_uniform'",
    "RetrievalArgs.logq_correction=True",
)
BOTH = ("NetworkArgs.item_embedding='both'", "FeatureArgs.unknown_rate=0.3")
PIPELINED = ("TrainerArgs.pipeline_type='native'", "TrainerArgs.eval_interval=7")
ACCUMULATED = ("TrainerArgs.gradient_accumulation_steps=2",)
# Of 16 events the 6 most recent stay as they are; most histories are shorter than all.
MEMORY = (
    "MemoryArgs.num_memory_tokens=3",
    "MemoryArgs.insert_method=[[4, 1], [10, 2]]",
    "MemoryArgs.recent_item_num=6",
)
SESSIONS = (
    "DatasetArgs.sessions='2h'",
    "MemoryArgs.num_memory_tokens=2",
    "MemoryArgs.pretrain_item_num=10",
)
WIDTHS = ("NetworkArgs.item_embedding_dim=22", "NetworkArgs.action_embedding_dim=6")
# Features of every level and kind; values and items are lost and swapped.
DECLARED = (
    "DatasetArgs.dataset_name='small'",
    "NetworkArgs.item_embedding='both'",
    "FeatureArgs.unknown_rate=0.1",
    "FeatureArgs.swap_rate=0.2",
    "FeatureArgs.widths={'likes': 6}",
)
FROZEN_TEXT = (
    "DatasetArgs.dataset_name='small'",
    "NetworkArgs.item_embedding='both'",
    "ItemTextArgs.model='bert'",
    "ItemTextArgs.max_tokens=16",
)
TEXT_RATE = "ItemTextArgs.learning_rate_factor=0.3"
NCE = (
    "RetrievalArgs.learned_temperature=True",
    "RetrievalArgs.temperature=0.07",
    "RetrievalArgs.closest_negative=0.99",
)
TEXT_ALONE = "NetworkArgs.item_embedding='categorical'"
TEXT = (*FROZEN_TEXT, "ItemTextArgs.freeze=False", "ItemTextArgs.micro_batch_tokens=100")
TASKS = (
    "RankingArgs.tasks=(('did', 'binary', 'action'), ('watch', 'regression', 'watched'))",
    "RankingArgs.prediction_head_arch=[16, 2]",
    "RankingArgs.eval_metrics=('AUC', 'RMSE', 'SPEARMAN/watch')",
)


def sharding(kind: str, **by_table: str) -> tuple[str, str]:
    """Return the bindings of a sharding type for all tables, and for some another one."""
    return f"EmbeddingArgs.sharding_type='{kind}'", f"EmbeddingArgs.table_sharding_types={by_table!r}"


def dynamic(strategy: str = "lru", **capacity: int) -> tuple[str, str]:
    """Return the bindings of tables with so many rows."""
    return f"DynamicEmbeddingArgs.capacity={capacity!r}", f"DynamicEmbeddingArgs.evict_strategy={strategy!r}"


CASES = {
    case.name: case
    for case in (
        Case("ranking-adam-row", "ranking", FAST_TABLES),
        Case("ranking-sgd-row", "ranking", SGD),
        Case("ranking-sgd-table", "ranking", (*SGD, *sharding("table_wise"), "OptimizerArgs.sgd_momentum=0.5")),
        # Column-wise shards are 128 wide.
        Case("ranking-adam-column", "ranking", (*sharding("column_wise"), "NetworkArgs.item_embedding_dim=256")),
        Case("ranking-sgd-column", "ranking", (*SGD, *sharding("column_wise"), "NetworkArgs.item_embedding_dim=256")),
        Case("ranking-adam-replicated", "ranking", (*FAST_TABLES, *sharding("data_parallel"))),
        Case(
            "ranking-adamw-widths",
            "ranking",
            (
                *WIDTHS,
                *FAST_TABLES,
                *sharding("row_wise", segment="table_wise", action="data_parallel"),
                "OptimizerArgs.optimizer_str='adamw'",
                "OptimizerArgs.weight_decay=0.3",
                "OptimizerArgs.clip_grad=0.05",
                "OptimizerArgs.warmup_steps=4",
                "OptimizerArgs.lr_schedule='cosine'",
            ),
        ),
        Case(
            "ranking-adam-l2-short",
            "ranking",
            ("OptimizerArgs.weight_decay=0.3", "DatasetArgs.max_num_candidates=4", *sharding("table_wise")),
            data="short",
        ),
        Case(
            "ranking-adam-distributed",
            "ranking",
            (
                "OptimizerArgs.use_distributed_optimizer=True",
                "OptimizerArgs.overlap_grad_reduce=True",
                "OptimizerArgs.clip_grad=0.05",
                *sharding("row_wise", segment="data_parallel"),
            ),
        ),
        # Two batches of each rank a step; nothing but dense weights, which step once.
        Case(
            "ranking-adam-accumulated",
            "ranking",
            (
                *ACCUMULATED,
                *FAST_TABLES,
                "OptimizerArgs.use_distributed_optimizer=True",
                "OptimizerArgs.overlap_grad_reduce=True",
                "OptimizerArgs.clip_grad=0.05",
                *sharding("data_parallel"),
            ),
        ),
        Case(
            "retrieval-sgd-accumulated-short",
            "retrieval",
            (*SGD, *ACCUMULATED, *FULL, *sharding("data_parallel")),
            "short",
        ),
        Case(
            "retrieval-adam-auto",
            "retrieval",
            (*sharding("auto", segment="row_wise"), "EmbeddingArgs.uvm_caching_tables=('item_id',)"),
        ),
        Case(
            "ranking-adam-pipelined-short",
            "ranking",
            (*PIPELINED, *WIDTHS, *FAST_TABLES, *sharding("row_wise", segment="data_parallel")),
            data="short",
            plain_steps=0,
        ),
        Case("ranking-adam-dynamic", "ranking", (*FAST_TABLES, *dynamic(item_id=67)), plain_steps=0),
        Case(
            "retrieval-adam-dynamic",
            "retrieval",
            (*IN_BATCH, *BOTH, *dynamic("lfu", item_id=70)),
            plain_steps=0,
        ),
        Case(
            "retrieval-adam-dynamic-uniform",
            "retrieval",
            (*dynamic(item_id=100), "DynamicEmbeddingArgs.min_count=2", *PIPELINED),
            plain_steps=0,
        ),
        Case("retrieval-adam-pipelined", "retrieval", (*PIPELINED, *BOTH, *IN_BATCH, *sharding("table_wise"))),
        Case(
            "ranking-adagrad-clipped",
            "ranking",
            ("OptimizerArgs.sparse_optimizer_str='adagrad'", "OptimizerArgs.sparse_max_gradient=1e-4"),
            plain_steps=0,
        ),
        Case("retrieval-sgd-sessions-short", "retrieval", (*SGD, *SESSIONS), "short"),
        Case("retrieval-adam-uniform", "retrieval", ("NetworkArgs.preset='research'",)),
        Case("retrieval-sgd-uniform", "retrieval", (*SGD, *sharding("table_wise"))),
        Case("retrieval-adam-in-batch", "retrieval", (*IN_BATCH, *BOTH, *sharding("table_wise"))),
        Case("retrieval-sgd-in-batch-short", "retrieval", (*SGD, *IN_BATCH), data="short"),
        Case(
            "ranking-adam-declared",
            "ranking",
            (
                *FAST_TABLES,
                *DECLARED,
                *TASKS,
                "DatasetArgs.max_num_candidates=3",
                *sharding("row_wise", brand="table_wise", ending="data_parallel"),
            ),
            data="declared",
            plain_steps=0,
        ),
        Case("ranking-adam-memory", "ranking", (*FAST_TABLES, *MEMORY, "NetworkArgs.preset='research'")),
        Case("retrieval-adam-full", "retrieval", (*FULL, "RetrievalArgs.item_bias=True")),
        Case(
            "retrieval-sgd-full-short",
            "retrieval",
            (*SGD, *FULL, *sharding("row_wise", segment="data_parallel")),
            data="short",
        ),
        Case("retrieval-adam-text", "retrieval", (*TEXT, *IN_BATCH, TEXT_RATE), data="text", plain_steps=0),
        Case("retrieval-sgd-text-alone", "retrieval", (*SGD, *TEXT, *IN_BATCH, *NCE, TEXT_ALONE), data="text"),
        Case("ranking-adam-frozen-text", "ranking", FROZEN_TEXT, data="text", plain_steps=0),
        Case("retrieval-sgd-llama-bce", "retrieval", (*SGD, *LLAMA_BCE), plain_steps=0),
        Case("retrieval-sgd-replaced-short", "retrieval", (*SGD, *BERT, *REPLACED), "short", plain_steps=0),
        Case("retrieval-sgd-bpr-short", "retrieval", (*SGD, *BPR, *IN_BATCH), data="short"),
        Case("retrieval-sgd-sasrec-mol-short", "retrieval", (*SGD, *SASREC_MOL), data="short", plain_steps=0),
        Case(
            "retrieval-rowwise-adagrad",
            "retrieval",
            ("OptimizerArgs.sparse_optimizer_str='rowwise_adagrad'",),
            plain_steps=0,
        ),
    )
}

# For three ranks, of which one has no row of the smallest tables; compared with one rank.
THREES = {
    case.name: case
    for case in (
        Case("ranking-adam-three", "ranking", (*WIDTHS, "FeatureArgs.unknown_rate=0"), global_batch=30),
        Case("retrieval-sgd-three", "retrieval", (*SGD, *IN_BATCH), data="short", global_batch=30),
        Case("ranking-dynamic-three", "ranking", (*FAST_TABLES, *dynamic(item_id=67)), global_batch=30),
    )
}


# For two ranks or four, split otherwise than by samples; compared with one rank.
RESEARCH = ("NetworkArgs.preset='research'", "NetworkArgs.bias_query_time='next'")
LLAMA_GROUPS = ("NetworkArgs.backbone='llama'", "NetworkArgs.num_attention_heads=4", "NetworkArgs.num_query_groups=2")
SASREC = ("NetworkArgs.backbone='sasrec'",)
SEQUENCE = ("TensorModelParallelArgs.sequence_parallel=True",)
CANDIDATES = ("DatasetArgs.max_num_candidates=4", "NetworkArgs.target_group_size=2")
DISTRIBUTED = ("OptimizerArgs.use_distributed_optimizer=True", "OptimizerArgs.clip_grad=0.05")
TOP1 = ("RetrievalArgs.loss='top1'",)
TOP1_MAX = ("RetrievalArgs.loss='top1_max'", *IN_BATCH)
BPR_MAX = (
    "RetrievalArgs.loss='bpr_max'",
    "RetrievalArgs.num_negatives=-1",
    "RetrievalArgs.sampling_strategy='all'",
    "RetrievalArgs.temperature=0.5",  # squared scores of 20 would make rounding grow
)
SAVED_STEP = 4
RECOMPUTED = "NetworkArgs.recompute='full'"
SPLITS = {
    case.name: case
    for case in (
        Case("context-ranking-candidates", "ranking", (*CANDIDATES, *DISTRIBUTED), "short", context=2, steps=12),
        Case("context-retrieval-research", "retrieval", (*RESEARCH, *IN_BATCH), "short", context=2, steps=12),
        Case("context-retrieval-sasrec-mol", "retrieval", (*SGD, *BOTH, *SASREC_MOL), context=2, steps=12),
        Case("context-retrieval-llama-bce", "retrieval", (*SGD, *LLAMA_BCE), context=2, steps=12),
        Case("context-retrieval-top1-max", "retrieval", (*SGD, *RESEARCH, *TOP1_MAX), "short", context=2, steps=12),
        Case("tensor-retrieval-bpr-max", "retrieval", (*SGD, *SASREC, *BPR_MAX), tensor=2, steps=12),
        Case("sequence-retrieval-top1", "retrieval", (*SGD, *SASREC, *SEQUENCE, *TOP1), tensor=2, steps=12),
        Case("context-ranking-dynamic", "ranking", (*SGD, *dynamic("lfu", item_id=67)), context=2, steps=12),
        Case("tensor-ranking-dynamic", "ranking", (*FAST_TABLES, *dynamic("lfu", item_id=67)), tensor=2, steps=12),
        Case("context-retrieval-memory", "retrieval", (*RESEARCH, *MEMORY, *IN_BATCH), "short", context=2, steps=12),
        Case("context-retrieval-llama-memory", "retrieval", (*SGD, *LLAMA_BCE, *MEMORY), context=2, steps=12),
        Case("context-ranking-sessions", "ranking", (*SGD, *CANDIDATES, *SESSIONS), "short", context=2, steps=12),
        Case("tensor-ranking-memory", "ranking", (*SGD, *CANDIDATES, *MEMORY), tensor=2, steps=12),
        Case("sequence-sasrec-memory", "retrieval", (*SGD, *SASREC, *SEQUENCE, *MEMORY), tensor=2, steps=12),
        Case("context-ranking-declared", "ranking", (*FAST_TABLES, *DECLARED, *TASKS), "declared", context=2, steps=12),
        Case(
            "context-retrieval-declared",
            "retrieval",
            (
                *FAST_TABLES,
                *DECLARED,
                *IN_BATCH,
                "FeatureArgs.context_merge='concat'",
                "NetworkArgs.token_layout='add'",
            ),
            "declared",
            context=2,
            steps=12,
        ),
        Case(
            "sequence-retrieval-declared",
            "retrieval",
            (*SEQUENCE, *DECLARED, "FeatureArgs.merge='multiply'", "FeatureArgs.item_merge='concat'"),
            "declared",
            tensor=2,
            steps=12,
        ),
        Case("context-retrieval-text", "retrieval", (*SGD, *TEXT, *IN_BATCH, TEXT_ALONE), "text", context=2, steps=12),
        Case("tensor-retrieval-text", "retrieval", (*SGD, *TEXT, *IN_BATCH), "text", tensor=2, steps=12),
        Case("context-retrieval-permuted", "retrieval", (*SGD, *BERT, *PERMUTED), "short", context=2, steps=12),
        Case("context-retrieval-replaced", "retrieval", (*SGD, *BERT, *REPLACED), "short", context=2, steps=12),
        Case("sequence-retrieval-replaced", "retrieval", (*SGD, *BERT, *REPLACED, *SEQUENCE), tensor=2, steps=12),
        Case("tensor-retrieval-permuted", "retrieval", (*SGD, *BERT, *PERMUTED, *FULL), tensor=2, steps=12),
        Case("context-retrieval-bert", "retrieval", (*SGD, *BERT), context=2, steps=12),
        Case(
            "tensor-ranking-concat",
            "ranking",
            (*CANDIDATES, *DISTRIBUTED, "NetworkArgs.gate='concat'", "NetworkArgs.hidden_dropout=0.2"),
            tensor=2,
            steps=12,
        ),
        Case("tensor-retrieval-research", "retrieval", (*SGD, *RESEARCH), "short", tensor=2, steps=12),
        Case("tensor-retrieval-llama", "retrieval", LLAMA_GROUPS, tensor=2, steps=12),
        Case("sequence-retrieval-sasrec", "retrieval", (*SGD, *SASREC, *SEQUENCE), "short", tensor=2, steps=12),
        Case("context-retrieval-recomputed", "retrieval", (*RESEARCH, *IN_BATCH, RECOMPUTED), context=2, steps=12),
        Case("sequence-retrieval-recomputed", "retrieval", (*SGD, *SASREC, *SEQUENCE, RECOMPUTED), tensor=2, steps=12),
        Case("sequence-ranking", "ranking", (*SEQUENCE, *FAST_TABLES, *DISTRIBUTED), tensor=2, steps=12),
        Case("sequence-retrieval-research", "retrieval", (*RESEARCH, *SEQUENCE), tensor=2, steps=12),
    )
}
# For four ranks.
GRIDS = {
    case.name: case
    for case in (
        Case("context-4-retrieval", "retrieval", (*SGD, *RESEARCH), "short", context=4, steps=12),
        Case("data-2-context-2-ranking", "ranking", (*CANDIDATES, *DISTRIBUTED), "short", context=2, steps=12),
        Case("data-2-context-2-retrieval", "retrieval", (*RESEARCH, *IN_BATCH), "short", context=2, steps=12),
        Case("pipeline-context-2", "retrieval", (*RESEARCH, "TrainerArgs.pipeline_type='native'"), context=2, steps=12),
        Case("data-2-context-2-declared", "ranking", (*DECLARED, *CANDIDATES), "declared", context=2, steps=12),
        Case("data-2-context-2-memory", "ranking", (*SGD, *CANDIDATES, *MEMORY), "short", context=2, steps=12),
        Case("context-2-tensor-2-memory", "retrieval", (*SGD, *RESEARCH, *MEMORY), context=2, tensor=2, steps=12),
        Case("data-4-dynamic", "ranking", (*FAST_TABLES, *dynamic(item_id=67)), steps=12),
        Case("data-2-context-2-dynamic", "ranking", (*FAST_TABLES, *dynamic(item_id=67)), context=2, steps=12),
        Case("data-2-tensor-2-ranking", "ranking", (*SGD, *CANDIDATES), tensor=2, steps=12),
        Case("context-2-tensor-2-retrieval", "retrieval", (*SGD, *RESEARCH), context=2, tensor=2, steps=12),
        Case(
            "context-2-sequence-2-llama", "retrieval", (*SGD, *LLAMA_GROUPS, *SEQUENCE), context=2, tensor=2, steps=12
        ),
    )
}

# Features of all levels and kinds at once, known before and after, with as many tasks, over every layout of ranks.
EVERY_TASK = (
    "RankingArgs.tasks=(('did', 'binary', 'action'), ('watch', 'regression', 'watched'), "
    "('end', 'multiclass', 'ending'))",
    "RankingArgs.task_weights={'watch': 0.5}",
    "RankingArgs.prediction_head_arch=[16, 5]",
    "RankingArgs.eval_metrics=('AUC', 'RMSE', 'SPEARMAN/watch', 'ACCURACY/end')",
)
EVERY_FEATURE = (*DECLARED, *FAST_TABLES, "NetworkArgs.num_attention_heads=4", "NetworkArgs.kv_channels=4")
EVERY = {
    "ranking": (*EVERY_FEATURE, *EVERY_TASK, "DatasetArgs.max_num_candidates=3", "FeatureArgs.context_merge='concat'"),
    "retrieval": (*EVERY_FEATURE, *IN_BATCH, "FeatureArgs.merge='multiply'", "FeatureArgs.item_merge='concat'"),
}
LAYOUTS = {1: ((1, 1),), 2: ((1, 1), (2, 1), (1, 2)), 4: ((1, 1), (4, 1), (1, 4), (2, 1), (1, 2), (2, 2))}
#: Ranks -> name -> case; name: of task, data, ranks and the context and the tensor ranks among them.
FEATURES = {
    ranks: {
        name: Case(name, task, EVERY[task], data, context=context, tensor=tensor, steps=12)
        for task in EVERY
        for context, tensor in layouts
        for data in ("declared", *(["rare"] if context == tensor else []))
        for name in (f"{task}-{data}-{ranks}-{context}-{tensor}",)
    }
    for ranks, layouts in LAYOUTS.items()
}
# Where the state was written, and where training goes on.
MOVES = (
    ((2, 2, 1), (2, 1, 2)),
    ((2, 1, 2), (4, 2, 1)),
    ((2, 1, 1), (4, 2, 2)),
    ((4, 2, 2), (2, 1, 1)),
    ((4, 1, 4), (1, 1, 1)),
)
#: Ranks that go on -> name -> case.
MOVED: dict[int, dict[str, Case]] = {1: {}, 2: {}, 4: {}}
for before, after in MOVES:
    for task in EVERY:
        old, new = ("-".join(map(str, (task, "declared", *layout))) for layout in (before, after))
        case = replace(FEATURES[after[0]][new], name=f"{old} as {new}", begins_as=old)
        MOVED[after[0]][case.name] = case


def config_of(case: Case, world_size: int) -> Config:
    """Return the config of ``case`` on ``world_size`` ranks."""
    micro_batches = 2 if set(ACCUMULATED) <= set(case.bindings) else 1
    bindings = [*BINDINGS[case.task], f"TrainerArgs.max_train_iters={case.steps}", *case.bindings]
    data_ranks = world_size
    if world_size == 1:
        bindings = [line for line in bindings if line not in SEQUENCE]
    else:
        data_ranks //= case.context * case.tensor
        bindings += [
            f"ContextParallelArgs.context_parallel_size={case.context}",
            f"TensorModelParallelArgs.tensor_model_parallel_size={case.tensor}",
        ]
    bindings.append(f"TrainerArgs.train_batch_size={case.global_batch // data_ranks // micro_batches}")
    return load_config(case.task, [], bindings).config  # type: ignore[arg-type]


BFLOAT16 = ("NetworkArgs.dtype_str='bfloat16'", "NetworkArgs.residual_dtype_str='bfloat16'")
#: Sets of items are left out: how many ids they hold only the device knows.
NO_SETS = ("FeatureArgs.item_features=('brand', 'weight', 'image')",)
# For one rank on a GPU, whose host waits for nothing in a step.
WAITLESS = {
    case.name: case
    for case in (
        Case("ranking", "ranking", BFLOAT16),
        Case("retrieval", "retrieval", (*BFLOAT16, "NetworkArgs.preset='research'")),
        Case("pipelined", "retrieval", (*PIPELINED, *BFLOAT16)),
        Case("clipped", "ranking", ("OptimizerArgs.clip_grad=0.05",)),
        Case("in-batch", "retrieval", IN_BATCH),
        Case("one-negative", "retrieval", ("RetrievalArgs.loss='bce'", "RetrievalArgs.num_negatives=1")),
        Case("mixture", "retrieval", ("RetrievalArgs.similarity='mol'",)),
        Case("masked", "retrieval", BERT),
        Case("replaced", "retrieval", (*BERT, *REPLACED)),
        Case("memory", "ranking", (*MEMORY, "NetworkArgs.preset='research'")),
        Case("declared", "ranking", (*DECLARED, *TASKS, *NO_SETS), "declared"),
        Case("dynamic", "ranking", dynamic(item_id=67)),
        Case("dynamic-pipelined", "retrieval", (*dynamic("lfu", item_id=100), *PIPELINED)),
    )
}
