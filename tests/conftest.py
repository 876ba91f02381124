from fleetkit import booted_fleet  # noqa: F401 - one lab for all modules that ask for it
