"""What an operator sees: logs, access lines, metrics."""
