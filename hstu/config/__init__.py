"""Configuration: frozen dataclasses with the reference system's names, read from gin files."""

from hstu.config.args import (
    Config,
    ContextParallelArgs,
    DatasetArgs,
    DynamicEmbeddingArgs,
    EmbeddingArgs,
    FeatureArgs,
    ItemTextArgs,
    MemoryArgs,
    NetworkArgs,
    OptimizerArgs,
    RankingArgs,
    RetrievalArgs,
    TensorModelParallelArgs,
    TrainerArgs,
)
from hstu.config.backbones import RECOMPUTE
from hstu.config.base import Args, ConfigError
from hstu.config.load import LoadedConfig, find_config, load_config, operative_gin, read_settings, task_of

__all__ = [
    "RECOMPUTE",
    "Args",
    "Config",
    "ConfigError",
    "ContextParallelArgs",
    "DatasetArgs",
    "DynamicEmbeddingArgs",
    "EmbeddingArgs",
    "FeatureArgs",
    "ItemTextArgs",
    "LoadedConfig",
    "MemoryArgs",
    "NetworkArgs",
    "OptimizerArgs",
    "RankingArgs",
    "RetrievalArgs",
    "TensorModelParallelArgs",
    "TrainerArgs",
    "find_config",
    "load_config",
    "operative_gin",
    "read_settings",
    "task_of",
]
