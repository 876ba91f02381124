"""`invoke --list`: the same tasks that `inferfleet` has."""

from inferfleet.cli import namespace as ns

__all__ = ["ns"]
