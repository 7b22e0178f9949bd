"""What the commands call. Each module here is one command."""
