"""Configuration: read, checked, and compiled into the snapshots that shards load."""
