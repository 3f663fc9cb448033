"""Owns the compiled CPU operations: their source, compiling, trying them out in a child process, loading.
Implements the interface of api.engine.model.operations; knows nothing of requests, and nobody in model knows of it."""
