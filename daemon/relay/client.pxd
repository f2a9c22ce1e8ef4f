cimport cython

from pointsman.daemon.relay.context cimport ShardContext
from pointsman.daemon.relay.exchange cimport Exchange
from pointsman.daemon.relay.inbound cimport Inbound
from pointsman.daemon.relay.request_lines cimport whole_head, is_http_1_1
from pointsman.daemon.relay.routed cimport Caller
from pointsman.daemon.relay.routes cimport Route
from pointsman.daemon.routing.body cimport scan

cdef object _JSON, _FORM, _INFO, _LOCAL, _STREAMED, _COMPLETE, _REFUSED
cdef long long _DURATION, _G_REQUESTS
cdef long long _LONG_BODY_BYTES

cdef class ClientConnection(Caller):
    cdef object _parser, _tasks
    cdef list _queue
    cdef Inbound _request
    cdef bytes _answer_left
    cdef Py_ssize_t _head_bytes
    cdef long long _body_left
    cdef double _reading_since, _linger_until
    cdef bint _is_reading_paused, _waits_for_buffer, _is_1_1

    cpdef write_answer(self)
    cdef _feed(self, bytes data)
    cdef bint _parse(self, bytes data) except -1
    cdef bint _goes_past_parser(self, Inbound request) except -1
    cdef bytes _take_body(self, bytes data, Py_ssize_t start)
    cdef _keep_body(self, Inbound request, bytes data, Py_ssize_t start)
    cdef bint _is_streamed(self, bytes path) except -1
    cdef _recognize(self, Inbound request)
    cdef _stream(self, Inbound request, bytes chunk)
    cdef _passage_of(self, Inbound request)
    cdef _pause_reading(self)
    cdef _resume_reading(self)
    cdef _refuse(self, error)
    @cython.locals(request=Inbound)
    cdef _advance(self)
    @cython.locals(route=Route)
    cdef _serve(self, Inbound request)
    @cython.locals(route=Route)
    cdef Route _route(self, Inbound request)
    cdef Route _route_elsewhere(self, Inbound request)
    cdef _pass_on(self, Inbound request, Route route)
    @cython.locals(exchange=Exchange)
    cdef _exchange(self, Inbound request, Route route)
    cdef _done(self, Inbound request, Route route, int status, bint keep_alive)
    cdef _close(self, bint is_lingering)
