"""The daemon: its processes, what they share, and the command line."""
