"""What clients speak: each front parses requests of one format and shapes its answers."""
