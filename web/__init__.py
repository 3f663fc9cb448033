"""Owns everything that Streamlit serves: the page on which people ask about images, and the operator's console.
It may not know `api`: it reaches the model over HTTP only.
"""
