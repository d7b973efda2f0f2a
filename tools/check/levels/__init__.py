"""The levels of a check, from files to pictures; each yields findings."""
