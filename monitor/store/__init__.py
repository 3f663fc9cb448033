"""logs/state.db: the rows that runs, the page and the console share, and the state kept from run to run.

It writes and reads rows only, and knows nothing of observing or of carrying a request out.
"""
