"""Owns the forward pass and sampling: sequences to tensors, logits to tokens, with the arithmetic of transformers' glm4v.
May not know the queue, or how weights and kernels are loaded."""
