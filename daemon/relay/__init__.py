"""From a client's connection to a worker's and back: protocols, framing, pools."""
