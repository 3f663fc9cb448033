"""Owns the model server: OpenAI-compatible HTTP in front of the engine in `api.engine`.
May not know the page or the checker. docs/architecture.md has the order in which its rooms import each other.
"""

__version__ = "0.1.0"
