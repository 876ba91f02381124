"""Runs on a host: looks at its GPUs, its machine, its containers and network; changes nothing.

Sent over the wire by `inferfleet.facts.ask` and never installed: standard library, Python 3.8 or
newer. What is missing or fails is left out of the answer and named in its `problems`.
"""
