"""Breaks the running service on purpose and measures how the checker detects and cures each fault.

It uses every other room; nothing but the command line knows it.
"""
