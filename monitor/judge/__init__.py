"""Owns evidence, verdicts, incidents, limits and holds, as records and pure functions.
May not know clocks, files and networks: neither how evidence is observed nor how a verdict is acted on.
"""
