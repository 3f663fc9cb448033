"""Owns the images of callers: guarded fetching, limits, decoding to upright RGB.
May not know models, prompts or requests.
"""
