"""Owns the HTTP exchange with the API: health, info, metrics, the streamed answer, and the names of failures.
It may not know Streamlit, conversations or the page's texts, and it never imports `api`.
"""
