"""A service that answers over HTTP what the commands and Python answer: recommendations, scores, similar items."""
