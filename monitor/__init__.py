"""Owns the checker: evidence becomes a verdict, a verdict may become a restart and an alert.
May not know the API and the page except over HTTP, nor torch, transformers and streamlit.
"""
