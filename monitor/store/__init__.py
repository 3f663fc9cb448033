"""Owns logs/state.db: the rows shared by the checker and the console, and the checker's state between runs.
May not know how evidence is observed or how an operator's request is carried out.
"""
