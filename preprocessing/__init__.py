"""The preprocessing command and one module per family of data sets."""
