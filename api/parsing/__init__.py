"""What the model writes, read as it streams: reasoning, content, bounding boxes, tool calls.

May not know wire formats, requests or images.
"""
