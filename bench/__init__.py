"""What the published numbers come from: servers side by side, latencies under load, memory over time."""
