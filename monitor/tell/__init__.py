"""Owns reporting: the JSON report, alerts, exports, the commands `status` and `history`.
May not know restarts, the lock of a run and operators' requests.
"""
