"""Owns the CUDA kernels in Triton, and the operations made of them; whoever cannot use them computes with torch.
May not know requests or the runner; implements the interface of api.engine.model.operations."""
