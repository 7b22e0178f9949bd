"""What a trained model is for: recommendations, scores of candidates, vectors."""

from hstu.inference.opened import Opened, open_trained
from hstu.inference.recommend import item_vectors, recommend, score_candidates, user_vectors
from hstu.inference.run import Run, open_run

__all__ = [
    "Opened",
    "Run",
    "item_vectors",
    "open_run",
    "open_trained",
    "recommend",
    "score_candidates",
    "user_vectors",
]
