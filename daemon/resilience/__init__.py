"""Retries, breakers, admission, rates and deadlines as state machines without I/O, clock or randomness of their own."""
