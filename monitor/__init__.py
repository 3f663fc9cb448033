"""The checker: observations become evidence, evidence becomes a verdict, a verdict may become a restart and an alert.

It talks to the API and the page over HTTP only, and never imports torch, transformers or streamlit.
"""
