"""Train or score a generative ranking model: see ``--help``."""

from hstu.cli.train import main

if __name__ == "__main__":
    main("ranking")
