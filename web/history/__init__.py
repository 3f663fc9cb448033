"""Owns conversations: their turns, which of them are sent, their store, their list and their export.
It may not know the chat page, the console, or how to call the API.
"""
