"""What changes the service: restarts with their evidence, operators' requests, the nightly restart, the lock of a run.

It does not decide whether a restart is due; the verdict and the limiter in monitor/judge do.
"""
