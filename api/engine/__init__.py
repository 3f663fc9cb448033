"""Owns tokens and tensors: one thread runs the model for all requests, in batched steps.
May not know HTTP, a wire format or the bundle's settings, only its EngineConfig."""
