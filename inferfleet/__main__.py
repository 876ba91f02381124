"""`python -m inferfleet` is the `inferfleet` command."""

from inferfleet.cli import main

main()
