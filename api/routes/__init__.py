"""Owns the endpoints, one file for each family: what is called in which order for a request.
May not know the application that they are part of; only this room reads ServerState.
"""
