"""The model server: OpenAI-compatible HTTP in front of the engine in `api.engine`."""

__version__ = "0.1.0"
