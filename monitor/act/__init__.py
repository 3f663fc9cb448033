"""Owns what changes the service: restarts, evidence bundles, operators' requests, the nightly restart, the lock of a run.
May not know whether a restart is due, which monitor/judge decides, nor who is alerted.
"""
