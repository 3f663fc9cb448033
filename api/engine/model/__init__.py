"""Owns the forward pass and sampling: from sequences to tensors, from logits to tokens, as transformers' glm4v computes.
Knows no queue, no clock but an encoder's time limit, and nothing of how weights or kernels come to it."""
