"""What a trained model is for: recommendations, scores of candidates, vectors."""

from hstu.inference.recommend import catalogue_part, recommend, score_candidates, user_vectors

__all__ = ["catalogue_part", "recommend", "score_candidates", "user_vectors"]
