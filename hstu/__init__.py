"""HSTU generative recommenders: plain PyTorch modules on jagged tensors, trained on one process or many."""

__version__ = "0.1.0"
