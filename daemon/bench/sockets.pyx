"""Plain connections, read without the event loop's streams between: what they cost an event is more than the rest of us.

Theory of operation. All sockets are in one epoll set, which the event loop watches as one descriptor. When something is
there, a call takes what is ready (MOST_READY at a time: the loop's timers have to be right, too) and gives each
connection what one read brought. The set is level-triggered: what was left is ready again.

A connection may close others while it is told something, of which the set has just said that they are ready: a closed
socket stays in memory until the next call.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.string cimport strerror

from pointsman.daemon.bench.connection cimport Connection

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout_ms)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    MOST_READY = 64
    BUFFER_BYTES = 1 << 18

# One for the process: nothing of it is needed when the next is read.
cdef char buffer[BUFFER_BYTES]


cdef _error(int code):
    return OSError(code, strerror(code).decode())


cdef class PlainSocket:
    """A transport for `Connection`, and what that needs of one. A connection that aborts is not told `connection_lost`."""

    cdef Sockets _sockets
    cdef Connection _connection
    cdef int _fd
    cdef bytes _unsent
    cdef bint _awaits_room

    def write(self, bytes data not None):
        """At once, as far as the kernel takes it; the rest by and by."""
        if self._fd < 0:
            return
        if self._unsent is not None:
            self._unsent += data
        else:
            self._unsent = data
            self._send()

    def abort(self):
        self._sockets._drop(self)

    cdef int _send(self) except -1:
        """An error shows when the socket is read: an answer may have come before it."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self._unsent)
        cdef ssize_t sent = send(self._fd, PyBytes_AS_STRING(self._unsent), size, MSG_DONTWAIT | MSG_NOSIGNAL)
        cdef bint must_wait = 0 <= sent < size or (sent < 0 and (errno == EAGAIN or errno == EINTR))
        if not must_wait:
            self._unsent = None
        elif sent > 0:
            self._unsent = self._unsent[sent:]
        if must_wait != self._awaits_room:
            self._awaits_room = must_wait
            self._sockets._watch(EPOLL_CTL_MOD, self, EPOLLIN | EPOLLOUT if must_wait else EPOLLIN)
        return 0

    cdef int _read(self) except -1:
        cdef Connection connection = self._connection
        cdef ssize_t count = recv(self._fd, buffer, BUFFER_BYTES, MSG_DONTWAIT)
        if count > 0:
            connection.data_received(PyBytes_FromStringAndSize(buffer, count))
        elif count == 0 or (errno != EAGAIN and errno != EINTR):
            error = None if count == 0 else _error(errno)
            self._sockets._drop(self)
            connection.connection_lost(error)
        return 0


cdef class Sockets:
    """Of one event loop."""

    cdef object _loop
    cdef int _epoll
    cdef set _open
    cdef list _closed

    def __cinit__(self):
        self._epoll = -1

    def __init__(self, loop):
        """Raises OSError when the process has no file descriptor left."""
        self._loop = loop
        self._open = set()
        self._closed = []
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            raise _error(errno)
        loop.add_reader(self._epoll, self._ready)

    def adopt(self, connected, Connection connection not None):
        """`connected`: a socket, whose descriptor is ours from now on. Raises OSError, which closes it."""
        cdef PlainSocket made = PlainSocket()
        made._sockets = self
        made._connection = connection
        made._fd = connected.detach()
        if self._watch(EPOLL_CTL_ADD, made, EPOLLIN) < 0:
            error = _error(errno)
            close(made._fd)
            raise error
        self._open.add(made)
        connection.connection_made(made)

    def close(self):
        """No connection is told."""
        if self._epoll < 0:
            return
        self._loop.remove_reader(self._epoll)
        for each in tuple(self._open):
            self._drop(each)
        close(self._epoll)
        self._epoll = -1

    cpdef _ready(self):
        cdef epoll_event ready[MOST_READY]
        cdef PlainSocket each
        cdef int count = epoll_wait(self._epoll, ready, MOST_READY, 0)
        self._closed.clear()
        for i in range(count):
            each = <PlainSocket> ready[i].data.ptr
            if ready[i].events & EPOLLOUT and each._fd >= 0 and each._unsent is not None:
                each._send()
            if ready[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP) and each._fd >= 0:
                each._read()

    cdef int _watch(self, int operation, PlainSocket plain, uint32_t events) noexcept:
        cdef epoll_event event
        event.events = events
        event.data.ptr = <void *> plain
        return epoll_ctl(self._epoll, operation, plain._fd, &event)

    cdef int _drop(self, PlainSocket plain) except -1:
        """Its descriptor leaves the set as it is closed."""
        if plain._fd < 0:
            return 0
        close(plain._fd)
        plain._fd = -1
        plain._unsent = plain._connection = None
        self._open.discard(plain)
        self._closed.append(plain)
        return 0
