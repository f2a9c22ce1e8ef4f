"""Trace replay: the routing code of the daemon against simulated engines under a virtual clock."""
