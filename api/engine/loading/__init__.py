"""Owns the way from a model's name to a loaded model: download, placement and its reasons, weights, choice of operations.
Knows nothing of requests; once the model is loaded it is out of the way."""
