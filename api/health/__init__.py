"""Owns what operators see of a running server: heartbeat file, metrics, and fault injection for drills.
May not know requests or HTTP; other rooms hand it functions that return their numbers.
"""
