"""Readings and probes: turns the kernel, the GPU driver, the API and the page into evidence.

It judges nothing, and knows of no verdict, no store and no restart.
"""
