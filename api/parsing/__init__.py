"""Owns the parsing of the model's text as it streams: reasoning, content, bounding boxes, tool calls.
May not know wire formats, requests or images.
"""
