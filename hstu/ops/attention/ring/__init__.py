"""Attention between shards of a batch, for context parallelism."""
