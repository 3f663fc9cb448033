"""Owns the operator's console: the checker's history, the API's figures, logs, settings and requested actions.
It may not know the chat page or conversations, nor act itself: it writes requests for the checker.
"""
