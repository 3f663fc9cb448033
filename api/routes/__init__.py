"""One file for each family of endpoints: what is called in which order for a request.

The only room that knows ServerState. Nothing below may import it.
"""
