"""Requests and answers as OpenAI's API has them: bodies, validation, completions, /v1/responses.

May not know how a request is run, nor where its bytes come from.
"""
