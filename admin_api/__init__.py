"""The admin API. It knows the daemon only through its ports."""
