"""Knows tokens and tensors, no HTTP. Imports nothing from the packages above it."""

import os

# Read by the OpenMP runtime when torch is imported, which only modules of this package do. Threads that wait for work
# must sleep soon: by default they spin for milliseconds on the cores that HTTP needs, and on a busy machine two
# spinning threads that wait for each other are a hundred times slower than one.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
