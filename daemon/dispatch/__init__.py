"""Routing on the state that all shards share: the policies of `routing` over the rows, locks and index of `shm`."""
