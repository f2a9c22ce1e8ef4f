"""Stand-ins for what the daemon talks to, and harnesses that run parts of it for real."""
