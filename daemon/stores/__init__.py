"""Payload stores: values of any size under text keys, one typed result a key, sent again where that can help.

    open_store(url) → RetransmittingStore (one engine) → SqliteBackend | RedisBackend | MooncakeBackend

A backend makes one attempt and says what happened to each key; the engine frames the values, cuts batches, sends the
failed keys again, and checks every frame that comes back. All calls block: in an event loop use `asyncio.to_thread`.
"""
