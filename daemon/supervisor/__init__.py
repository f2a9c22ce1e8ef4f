"""The process that owns the process tree, the listening sockets and the shared segment. No HTTP, no event loop."""
