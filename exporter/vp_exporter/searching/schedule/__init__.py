"""Search for the number of tokens that a reducer removes at each block."""
