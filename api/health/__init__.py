"""What operators see of a running server: heartbeat file, metrics, and fault injection for drills.

May not know requests or HTTP; numbers of other rooms come through functions that are handed in.
"""
