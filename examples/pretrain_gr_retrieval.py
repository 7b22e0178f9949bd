"""Train or score a generative retrieval model: see ``--help``."""

from hstu.cli.train import main

if __name__ == "__main__":
    main("retrieval")
