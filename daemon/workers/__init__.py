"""The engines behind the gateway: which exist, where they are, whether they answer. Runs in control only."""
