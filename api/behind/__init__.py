"""Owns the way to an engine behind this API (GLM_ENGINE_URL): which kind it is, what it is asked, how its answer is read.
May not know tokens or tensors: it speaks the engine's HTTP, and hands on text.
"""
