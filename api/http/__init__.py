"""Owns the client's connection: authentication, limits, bodies, server-sent events, and the request log.
May not know what a request asks for, nor the model.
"""
