"""What people and other systems are told: the report, alerts, exports, the status and history commands.

It restarts nothing, and knows of no lock and no operator's request.
"""
