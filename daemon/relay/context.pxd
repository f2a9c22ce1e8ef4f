from pointsman.daemon.dispatch.resilience cimport SharedResilience
from pointsman.daemon.dispatch.short_way cimport ShortWay
from pointsman.daemon.relay.buffers cimport BodyBuffers
from pointsman.daemon.relay.request_lines cimport numbered
from pointsman.daemon.relay.upstream cimport UpstreamPools
from pointsman.daemon.relay.wheel cimport Wheel
from pointsman.daemon.routing.table cimport RoutingTable
from pointsman.daemon.shm.choosing cimport Chooser
from pointsman.daemon.shm.native cimport Words, monotonic
from pointsman.daemon.telemetry.access_log cimport LineWriter
from pointsman.daemon.telemetry.series cimport Series

cdef object _COMPLETE
cdef long long _H_PHASE, _PHASE_RUNNING, _H_PAUSE, _H_ACCESS_UNSAMPLED

cdef class ShardContext:
    cdef public object settings, segment, cells, loop, rng, router, admitting, pausing, pairs, explanations
    cdef public object recording, internal_token, elsewhere, guard, key_counts
    cdef public BodyBuffers buffers
    cdef public Series series
    cdef public Words words
    cdef readonly ShortWay short_way
    cdef readonly Chooser chooser
    cdef public SharedResilience resilience
    cdef public long long shard
    cdef public Wheel wheel
    cdef public UpstreamPools upstreams
    cdef public dict routes
    cdef public set connections
    cdef list _answering
    cdef public bint is_draining, is_retired
    cdef public double next_sample
    cdef readonly long long max_headers, max_header_bytes, max_payload_bytes
    cdef object _tables, _call_soon, _write_all
    cdef RoutingTable _table
    cdef LineWriter _log
    cdef long long _gauges, _generation, _requests
    cdef double _wall_offset
    cdef bytes _id_prefix, _line_start
    cdef bint _is_logging, _is_text

    cpdef double now(self) noexcept
    cpdef RoutingTable table(self)
    cpdef bint is_stopping(self) noexcept
    cpdef bint closes_connections(self) noexcept
    cpdef bint is_paused(self) noexcept
    cpdef bint is_sample_due(self, double now) noexcept
    cpdef count(self, long long word, long long amount=*)
    cpdef answer_soon(self, connection)
    cpdef long long wall_us(self, double now) noexcept
    cpdef bytes new_request_id(self)
    cpdef bint is_line_due(self, int status, ending) except -1
    cpdef log_line(self, bytes line)
