"""What a trained model is for: recommendations, scores of candidates, vectors."""

from hstu.inference.recommend import item_vectors, recommend, score_candidates, user_vectors

__all__ = ["item_vectors", "recommend", "score_candidates", "user_vectors"]
