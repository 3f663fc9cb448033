"""Owns the HTTP exchange with the API: health, info, metrics, the streamed answer, and the classification of errors.
It may not know Streamlit, conversations, the page's texts, or `api`.
"""
