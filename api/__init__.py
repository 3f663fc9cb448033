"""The model server: OpenAI-compatible HTTP in front of the engine in `api.engine`.

Rooms import downwards only: app, routes, requests, protocol, images, http, health, parsing, engine.
"""

__version__ = "0.1.0"
