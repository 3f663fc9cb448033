"""Owns the benchmarks behind the published numbers: servers compared, latencies under load, memory over time.
May not know the code of the page or the checker; no server imports it."""
