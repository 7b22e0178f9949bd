"""Data sets on disk: schema, reader, writer, splits, encoding of interaction tables, planted data."""

from hstu.data.reader import SequenceDataset, Sequences
from hstu.data.schema import Feature, Schema, Statistics
from hstu.data.splits import Split, leave_one_out, make_splits
from hstu.data.synthetic import SyntheticConfig, generate, write_synthetic
from hstu.data.writer import EncodedDataset, write_dataset

__all__ = [
    "EncodedDataset",
    "Feature",
    "Schema",
    "SequenceDataset",
    "Sequences",
    "Split",
    "Statistics",
    "SyntheticConfig",
    "generate",
    "leave_one_out",
    "make_splits",
    "write_dataset",
    "write_synthetic",
]
