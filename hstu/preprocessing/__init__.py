"""Published data sets: one module per family, and what reads, checks and downloads their files."""
