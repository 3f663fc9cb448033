"""Owns requests and answers as OpenAI's API defines them: schemas, completions, /v1/responses.
May not know how a request is run, nor where its bytes come from.
"""
