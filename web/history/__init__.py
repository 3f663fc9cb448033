"""Owns conversations: their turns, what of them is sent, their store, their list and their export.
It may not know the chat page or the console, and it calls the API nowhere.
"""
