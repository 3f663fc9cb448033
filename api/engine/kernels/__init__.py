"""Owns the compiled CPU kernels: source, compilation, trial in a child process, loading.
May not know requests or the runner; implements the interface of api.engine.model.operations."""
