"""Owns the images of a question: decoding, limits, encoding, and drawing an answer's boxes on them.
It may not know Streamlit, conversations, or their store.
"""
