"""Attention on a CPU: chunks of tiles that stay in cache."""
