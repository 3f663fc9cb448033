"""Owns the steps from a model's name to a loaded model: download, placement and its reasons, weights, choice of operations.
May not know requests; nothing here runs once the model is loaded."""
