"""The shared-memory segment: its layout, and the atomic and locked operations on it."""
