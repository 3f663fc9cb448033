"""Owns the chat page: input, controls, and how questions and answers look.
It may not know the console, SQLite, or what the API's HTTP and event stream look like.
"""
