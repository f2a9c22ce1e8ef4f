"""How much of their prompts engines find cached behind the gateway: recorded traffic, a client, the comparison."""
