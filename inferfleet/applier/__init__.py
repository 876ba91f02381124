"""Runs on a host: makes its files, units and ensures what one request says, or leaves them alone.

Sent over the wire by `inferfleet.wire` and never installed: standard library, Python 3.8 or newer.
All it remembers lies in /var/lib/inferfleet:

    lock             flocked for as long as an apply runs; says who holds it
    owed             units whose restart or reload was promised and not yet done
    current.json     the manifest of the last finished run; generations/ holds the last few
    blobs/           the contents they name, by SHA-256
    transaction/     `journal` while files are staged; renamed to `commit`, they will be swapped in

So a run that is cut short is undone by the next one up to the commit, and finished from there on.
INFERFLEET_ROOT makes a folder the host: owners do not matter there and no command is run, unless
INFERFLEET_RUN is set. INFERFLEET_CRASH_AT=N ends the process as if killed, before its Nth change.
"""
