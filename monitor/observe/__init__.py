"""Owns readings and probes: the kernel, the GPU driver, the API and the page as evidence.
May not know verdicts, the store and restarts.
"""
