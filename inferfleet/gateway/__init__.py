"""The gateway: one address for every client and every engine.

Runs on its own hosts from its own small wheel, so nothing here imports the rest of inferfleet.
"""
