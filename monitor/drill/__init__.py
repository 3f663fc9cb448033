"""Owns fault injection: breaks the running service on purpose and measures detection and recovery.
May not know the command line, its only caller.
"""
