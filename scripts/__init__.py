"""What goes with the daemon but is not part of it: the simulated engine, benches, tools."""
