from pointsman.daemon.relay.context cimport ShardContext
from pointsman.daemon.relay.framing cimport BodyFraming
from pointsman.daemon.relay.heads cimport ResponseHead
from pointsman.daemon.relay.inbound cimport Inbound
from pointsman.daemon.relay.routes cimport Route
from pointsman.daemon.relay.receiver cimport Receiver
from pointsman.daemon.relay.upstream cimport UpstreamConnection
from pointsman.daemon.relay.usage cimport Usage
from pointsman.daemon.routing.body cimport Features
from pointsman.daemon.routing.table cimport Plan, Pool, RoutingTable
from pointsman.daemon.shm.choosing cimport Booked

cdef class Caller:
    cdef public ShardContext context
    cdef public object transport, exchange
    cdef public bint is_closed, is_write_paused
    cdef public str peer
    cdef public bytes peer_bytes

    cpdef release_body(self, Inbound request)
    cpdef hold(self, Inbound request, long long more_bytes)
    cpdef bint write_error(self, Inbound request, error, tuple headers=*) except -1
    cpdef write_soon(self, bytes answer)
    cpdef exchange_ended(self, Inbound request, bint is_keep_alive)
    cpdef spawn(self, work)

cdef class Routed(Receiver):
    cdef public Caller client
    cdef public ShardContext context
    cdef public Inbound request
    cdef public UpstreamConnection upstream
    cdef public ResponseHead head
    cdef public BodyFraming framing
    cdef public Features features
    cdef public Booked booked, decision
    cdef public Route route
    cdef public RoutingTable table
    cdef public Plan plan
    cdef public Pool pool
    cdef public Usage usage
    cdef public object worker, taken, blame, continued, pair
    cdef public str asked_strategy
    cdef public int status, attempts, resends, continuations
    cdef public bint is_exhausted, is_keep_alive, is_ended
    cdef public double queued_s, connected_at, first_byte_at

    cdef _begin(self, Caller client, Inbound request, Route route, Features features, RoutingTable table)
