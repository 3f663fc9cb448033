"""Owns the injection of each fault for real, and its undoing, also after Ctrl-C. A file for each thing that is broken."""
