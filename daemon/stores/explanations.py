"""What a code means and what to do about it, for people."""

from __future__ import annotations

from typing import NamedTuple

from pointsman.daemon.stores.results import Code


class Explanation(NamedTuple):
    name: str
    meaning: str
    remedy: str


def explain(code: Code) -> Explanation | None:
    """None for a code that we know nothing of."""
    return _EXPLANATIONS.get(code)


_EXPLANATIONS: dict[Code, Explanation] = {
    # Mooncake
    -1: Explanation("INTERNAL_ERROR", "the Mooncake client failed within itself", "look at the log of the master"),
    -200: Explanation(
        "NO_AVAILABLE_HANDLE",
        "no member of the cluster has room: the memory is full of pinned objects, or no member has given any, as in the"
        " second after a restart of the master",
        "delete what is done, start another holder with a larger global_segment_size; if it was a restart, wait",
    ),
    -400: Explanation("INVALID_KEY", "Mooncake refuses this key", "use another"),
    -600: Explanation(
        "INVALID_PARAMS",
        "Mooncake refuses the request: an empty value, a buffer too small, or a client that is not set up",
        "if it came from setup: the hostname must have no port",
    ),
    -703: Explanation(
        "REPLICA_IS_NOT_READY",
        "a write to this key was interrupted, or is under way",
        "write it again; one more upsert mends it",
    ),
    -704: Explanation(
        "OBJECT_NOT_FOUND",
        "there is no such object: never written, deleted, evicted (only without hard_pin), or lost with its only holder"
        " or with a restart of the master",
        "write it again; against the loss of one holder use replicas=2; a master keeps nothing over its restart unless"
        " it runs with etcd and --enable_oplog",
    ),
    -706: Explanation("OBJECT_HAS_LEASE", "somebody has just read the object", "wait for the lease (10 s), or force"),
    -707: Explanation(
        "LEASE_EXPIRED",
        "the read took longer than the object was promised to stay, often because another key of the batch hung",
        "read again",
    ),
    -800: Explanation(
        "TRANSFER_FAIL",
        "the holder of the value does not answer: it has died, hangs, or a firewall is between; the master still lists"
        " the object until client_ttl has passed",
        "see whether the holders run and their ports are reachable (they choose them themselves); with one copy and a"
        " dead holder the value is lost",
    ),
    -801: Explanation(
        "CHECKSUM_MISMATCH", "the bytes changed in the holder's memory or on the way", "check the host's memory"
    ),
    -900: Explanation("RPC_FAIL", "the master does not answer", "is mooncake_master running at this address?"),
    -901: Explanation("RPC_TIMEOUT", "the master took too long", "is its host overloaded or the process stopped?"),
    -1010: Explanation("UNAVAILABLE_IN_CURRENT_STATUS", "the master is not ready to serve", "wait for the fail-over"),
    # The child process with Mooncake's client
    "child_hung": Explanation(
        "", "the Mooncake client gave no answer in time and was replaced", "see whether master and holders respond"
    ),
    "child_died": Explanation("", "the Mooncake client ended while it worked", "its last words are in the log"),
    "setup_failed": Explanation(
        "",
        "the Mooncake client could not join the cluster",
        "is mooncake_master running at this address, and the metadata server the one that the holders use?",
    ),
    "lanes_busy": Explanation("", "more calls at once than the client has lanes", "raise lanes="),
    "under_replicated": Explanation(
        "",
        "the value was written, but into fewer copies than asked for",
        "start as many holders as replicas, or allow fewer with min_replicas=",
    ),
    # SQLite
    "SQLITE_BUSY": Explanation("", "another process holds the file", "is a second gateway using the same file?"),
    "SQLITE_FULL": Explanation("", "the disk is full", "free some space"),
    "quota": Explanation("", "the values have reached max_bytes", "delete what is done, or raise max_bytes="),
    "SQLITE_CORRUPT": Explanation("", "the file is damaged", "move it away; what it held is lost"),
    "SQLITE_NOTADB": Explanation("", "the file is no database", "name another file"),
    "SQLITE_READONLY": Explanation("", "the file cannot be written", "check owner and mode of file and folder"),
    # Redis and Valkey
    "connection": Explanation("", "the server cannot be reached, or hung up", "is it running at this address?"),
    "timeout": Explanation("", "the server took too long", "is it overloaded, swapping or stopped?"),
    "OOM": Explanation("", "the server has reached maxmemory", "raise it, or delete what is done"),
    "NOAUTH": Explanation("", "the server wants a password", "redis://USER:PASSWORD@HOST"),
    "WRONGPASS": Explanation("", "the password is wrong", "redis://USER:PASSWORD@HOST"),
    "NOPERM": Explanation("", "the user may not do this", "it needs set, mset, mget, unlink, strlen, pttl"),
    "LOADING": Explanation("", "the server is reading its data from disk", "wait"),
    "READONLY": Explanation("", "this server is a replica", "name the primary; after a fail-over this passes"),
    "MISCONF": Explanation("", "the server cannot save to disk and refuses writes", "look at its log and disk"),
    # The engine
    "deadline": Explanation("", "the time for the call was over before this key's turn", "allow more time"),
    "cancelled": Explanation("", "the call was cancelled, or the store closed", ""),
    "result_count": Explanation("", "the backend gave another number of results than keys", "report it"),
    "short_read": Explanation("", "fewer bytes arrived than the value has", "read again"),
    "checksum": Explanation("", "the value is not what was written", "check the memory of the host that holds it"),
    "short": Explanation("", "the stored value is cut off", "write it again"),
    "head": Explanation("", "what lies there was not written by this program", "use a prefix, or another store"),
    "too_large": Explanation("", "the value is larger than the store takes", "use another store for it"),
    "duplicate_key": Explanation("", "the key was in one call twice", ""),
}
