"""Owns the operator's console: the checker's history, the API's figures, logs, settings and requested actions.
It may not know the chat page or conversations, and it has no power of its own: actions are rows for the checker.
"""
