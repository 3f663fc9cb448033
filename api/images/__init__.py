"""Images from callers: fetched under guard, checked against limits, decoded to upright RGB.

May not know models, prompts or requests.
"""
