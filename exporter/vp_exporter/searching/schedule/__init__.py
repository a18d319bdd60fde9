"""The search for how many tokens a reducer removes at each block."""
