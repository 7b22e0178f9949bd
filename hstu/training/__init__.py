"""Training: one trainer for every task, its optimizers, checkpoints, evaluation and records."""
