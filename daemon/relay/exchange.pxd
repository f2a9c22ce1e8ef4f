cimport cython

from pointsman.daemon.relay.context cimport ShardContext
from pointsman.daemon.relay.framing cimport BodyFraming
from pointsman.daemon.relay.heads cimport ResponseHead, client_head, joined, request_head
from pointsman.daemon.relay.inbound cimport Inbound
from pointsman.daemon.relay.routed cimport Caller, Routed
from pointsman.daemon.relay.telling cimport output_tokens, own_headers, report
from pointsman.daemon.relay.upstream cimport UpstreamConnection, UpstreamPool
from pointsman.daemon.relay.usage cimport holds_counts
from pointsman.daemon.resilience.timeouts cimport Watch
from pointsman.daemon.routing.table cimport Plan, Pool
from pointsman.daemon.shm.choosing cimport Booked

cdef object _COMPLETE, _CLIENT_LEFT
cdef long long _H_PAUSED_S, _H_RECORDING

cdef class Exchange(Routed):
    cdef public Watch watch
    cdef public bint is_held
    cdef public tuple failed
    cdef ResponseHead _held
    cdef bytes _held_data
    cdef object _metered, _permit, _told, _pause, _task
    cdef public bint is_pinged, is_unchunked
    cdef bint _has_free_permit, _is_probe

    @cython.locals(plan=Plan)
    cpdef start(self)
    cdef Pool _pool(self)
    cdef Plan _plan(self, long long prompt_tokens)
    cdef _watch(self, Plan plan)
    cdef _enter_and_pick(self, Plan plan, long long prompt_tokens)
    cdef bint _enter(self, Plan plan, long long prompt_tokens) except -1
    cdef _pick(self, long long prompt_tokens=*)
    @cython.locals(booked=Booked)
    cdef Booked _choose(self, Pool pool, long long prompt_tokens)
    cpdef take(self, Booked booked, Booked decision, bint is_probe=*)
    cdef bint _is_plain(self, Pool pool, Plan plan, double now) except -1
    cdef _tell_breaker(self, int verdict)
    cdef _unbook(self, double now, tokens, bint was_computed, int verdict=*)
    cdef long long _body_size(self) except -1
    cpdef bytes rest(self)
    cpdef send(self)
    cpdef send_now(self)
    cpdef note_sent(self, double now)
    cpdef bytes request_head_for(self, UpstreamPool pool, long long body_size)
    cdef _send_on(self, UpstreamConnection connection)
    cdef Py_ssize_t _first_event(
        self, ResponseHead head, BodyFraming framing, bytes data, Py_ssize_t position
    ) except? -2
    @cython.locals(plan=Plan, request=Inbound)
    cpdef Py_ssize_t open(
        self, ResponseHead head, BodyFraming framing, bytes data, Py_ssize_t position, bint has_failed=*
    ) except? -2
    cpdef forget_body(self)
    cdef _head_written(self, ResponseHead head, bytes out, bint is_whole=*)
    cpdef judge(self, int status)
    cdef _first_byte(self, ResponseHead head)
    cdef _note_usage(self, bytes data)
    cpdef end(self, int status, ending, int verdict=*)
    cpdef abandon_upstream(self)
    cdef _leave(self, tokens)
