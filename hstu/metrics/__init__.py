"""Metrics, as sums and exact statistics; definitions in one place for training, evaluation and tests."""
