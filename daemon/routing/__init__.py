"""Which worker gets a request. Pure: no I/O, no clock, no randomness of its own."""
