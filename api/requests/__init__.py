"""Owns admission and the life of one request: prompt, sampling parameters, submission, events.
May not know routes, connections or HTTP.
"""
