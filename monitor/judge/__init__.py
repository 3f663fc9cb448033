"""Evidence, verdicts, incidents, limits and holds: pure functions and records.

It does no I/O and reads no clock, and knows nothing of how evidence is observed or verdicts are carried out.
"""
