"""What each path does; one module per group of paths."""
