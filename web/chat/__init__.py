"""Owns the chat page: its input, its controls, and how questions and answers look.
It may not know the console, SQLite, or the wire format of the API.
"""
