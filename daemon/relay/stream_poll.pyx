"""Streams under way, read in rounds while their events are many.

Theory of operation. What an event of a stream costs is mostly that the process is woken for it. Thousands come in a
second, from hundreds of streams, and nobody sees whether one came a millisecond later. So it is done as network drivers
do with packets (NAPI): interrupts while little happens, polling while much does.

While few events come, the event loop reads them, one by one. When they are many (`pace`), rounds begin, and streams join
at their next event, if some have passed as they are, in whole chunks, from a plain socket to a plain socket: the event loop
stops reading a stream's source, an epoll set of ours watches it instead, and a timer looks into the set once a round. A
round reads each socket once, and a stream that is faster than anybody reads only in every third: the events that came
meanwhile are one read and one write. When a round finds too little to do, all streams are the event loop's again.

What is not a number of whole chunks (the end of an answer, a chunk in two pieces, nonsense) is given to the
connection's `data_received` as if the event loop had read it, so there is one place that knows what an answer may be.
When the source has ended or failed, it is the event loop's again, which meets that by itself. What the sink does not take
at once goes to its transport, which keeps it and tells when there is too much: back-pressure is the transport's, too.
Nobody else writes to the sink meanwhile.

Both sockets are duplicates of the transports' (dup): a transport that closes by itself leaves a number that the next
connection gets, and an event must not go there. They are closed when the stream leaves, whose connection does that
wherever it lets go of its request. For want of descriptors, or of room in epoll, a stream stays where it is.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.time cimport time_t

from pointsman.daemon.relay.framing cimport BodyFraming
from pointsman.daemon.relay.pace cimport Pace
from pointsman.daemon.relay.receiver cimport Receiver
from pointsman.daemon.relay.usage cimport counts_in
from pointsman.daemon.shm.native cimport monotonic

from pointsman.daemon.relay.pace import SAMPLE_EVENTS

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint32_t u32
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLIN
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout_ms)

cdef extern from "<sys/timerfd.h>" nogil:
    cdef struct timespec:
        time_t tv_sec
        long tv_nsec
    cdef struct itimerspec:
        timespec it_interval, it_value
    int TFD_CLOEXEC, TFD_NONBLOCK
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)

cdef extern from "<time.h>" nogil:
    int CLOCK_MONOTONIC

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)

cdef extern from "<fcntl.h>" nogil:
    int F_DUPFD_CLOEXEC
    int fcntl(int fd, int command, ...)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t read(int fd, void *buffer, size_t size)

cdef enum:
    JOINS_AFTER = 4  # events: a shorter stream would not earn the calls that joining costs
    MOST_READY = 2  # streams that are read before the event loop looks after requests again
    BUFFER_BYTES = 65536
    REST_ROUNDS = 3  # between two reads of one stream: fewer would not be seen, in text that comes that fast

cdef Py_ssize_t _SAMPLE_EVENTS = SAMPLE_EVENTS

# One for the process: nothing of it is needed when the next is read.
cdef unsigned char buffer[BUFFER_BYTES]
cdef epoll_event ready[MOST_READY]


cdef class Polled:
    """A stream that has joined."""


cdef class StreamPoll:
    """`round_began` is called for each round. Nothing is opened before the first stream joins."""

    def __init__(self, loop, Pace pace, round_began):
        self._loop = loop
        self._pace = pace
        self._round_began = round_began
        self._epoll = self._timer = -1
        self._polled = []
        self._free = []

    def __len__(self):
        return self._count

    cdef bint event_passed(self, Receiver receiver) except -1:
        """By the event loop: whether its stream may join. A stream that is alone with its events is not many."""
        if self.is_in_rounds:
            return receiver.events >= JOINS_AFTER
        if <void *> receiver == self._last:
            return False
        self._last = <void *> receiver
        self._passed += 1
        if self._passed >= _SAMPLE_EVENTS:
            self._passed = 0
            if self._pace.sample(monotonic()):
                self._begin_rounds()
        return False

    cpdef Polled join(self, connection, Receiver receiver, BodyFraming framing, source):
        """From now on what `source` (a transport) receives goes to `receiver.sink`; None if one of them is not a plain
        socket, or there are no descriptors left.
        """
        cdef Polled polled
        sink = receiver.sink
        if source.get_extra_info("sslcontext") is not None or sink.get_extra_info("sslcontext") is not None:
            return None
        source_socket, sink_socket = source.get_extra_info("socket"), sink.get_extra_info("socket")
        if source_socket is None or sink_socket is None:
            return None
        polled = Polled()
        polled.source_fd = fcntl(source_socket.fileno(), F_DUPFD_CLOEXEC, 0)
        polled.sink_fd = fcntl(sink_socket.fileno(), F_DUPFD_CLOEXEC, 0)
        polled.slot = self._free[len(self._free) - 1] if self._free else len(self._polled)
        if polled.source_fd < 0 or polled.sink_fd < 0 or not self._watch(EPOLL_CTL_ADD, polled):
            _close(polled)
            return None
        if self._free:
            self._free.pop()
            self._polled[polled.slot] = polled
        else:
            self._polled.append(polled)
        polled.connection, polled.receiver, polled.framing = connection, receiver, framing
        polled.sink, polled.unsent, polled.may_be_behind = sink, sink.get_write_buffer_size, True
        self._count += 1
        source.pause_reading()
        return polled

    cpdef leave(self, Polled polled):
        """The event loop does not read for it again by itself: that is for the connection to say. May be said twice."""
        if polled.connection is None:
            return
        if not polled.is_held:
            self._watch(EPOLL_CTL_DEL, polled)
        _close(polled)
        self._polled[polled.slot] = None
        self._free.append(polled.slot)
        self._count -= 1
        polled.connection = polled.receiver = None

    cpdef hold(self, Polled polled):
        """Read no more, until `release`."""
        if not polled.is_held and polled.connection is not None:
            polled.is_held = True
            self._watch(EPOLL_CTL_DEL, polled)

    cpdef release(self, Polled polled):
        if polled.is_held and polled.connection is not None:
            if self._watch(EPOLL_CTL_ADD, polled):
                polled.is_held = False
            else:
                polled.connection.read_by_loop()

    def close(self):
        """Forget all streams."""
        cdef Polled polled
        for polled in [polled for polled in self._polled if polled is not None]:
            self.leave(polled)
        if self._epoll >= 0:
            self._loop.remove_reader(self._timer)
            close(self._timer)
            close(self._epoll)
            self._epoll = self._timer = -1

    # --- what is read

    cdef int _read_ready(self) except -1:
        """Whoever has something to read is read once; returns how many these were."""
        cdef int count = epoll_wait(self._epoll, ready, MOST_READY, 0), i
        cdef Polled polled
        for i in range(count):
            polled = self._polled[ready[i].data.u32]
            if polled is None:
                continue  # what came before in this round has ended it
            if self.rounds - polled.read_in < REST_ROUNDS:
                continue
            polled.read_in = self.rounds
            try:
                self._read(polled)
            except Exception as error:  # what the event loop does about a protocol that fails
                connection = polled.connection
                self._loop.call_exception_handler({"message": "a polled stream failed", "exception": error})
                if connection is not None:
                    connection.transport.abort()
        return max(count, 0)

    cdef _read(self, Polled polled):
        cdef Receiver receiver = polled.receiver
        cdef Py_ssize_t size = recv(polled.source_fd, buffer, BUFFER_BYTES, MSG_DONTWAIT), chunks, sent = 0
        if size <= 0:
            if size == 0 or not (errno == EAGAIN or errno == EINTR):
                polled.connection.read_by_loop()
            return
        chunks = polled.framing.take_chunks_at(buffer, size)
        if not chunks:
            polled.may_be_behind = True
            polled.connection.data_received(PyBytes_FromStringAndSize(<char *> buffer, size))
            return
        receiver.bytes_out += size
        receiver.events += chunks
        if counts_in(<char *> buffer, size):
            receiver.usage_data = PyBytes_FromStringAndSize(<char *> buffer, size)
        if polled.may_be_behind and not polled.unsent():
            polled.may_be_behind = False
        if not polled.may_be_behind:
            sent = max(send(polled.sink_fd, buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL), 0)
        if sent < size and not polled.sink.is_closing():  # it is full, or broken, which its transport finds out
            polled.may_be_behind = True
            polled.sink.write(PyBytes_FromStringAndSize(<char *> buffer + sent, size - sent))

    # --- when it is read

    cdef _begin_rounds(self):
        if self._epoll < 0 and not self._open():
            return
        self.is_in_rounds = True
        self._set_timer(self._pace.round_s)

    def _round(self):
        """The timer."""
        cdef uint64_t expirations
        if read(self._timer, &expirations, sizeof(expirations)) < 0:
            return  # set anew meanwhile
        self.rounds += 1
        self._round_began()
        is_looking = self._left > 0  # the round before has not come to its end
        self._left = max(self._count, 1)
        if not is_looking:
            self._look()

    def _look(self):
        """At the next few streams of the round."""
        cdef int count
        if self._epoll < 0:
            return  # closed meanwhile
        count = self._read_ready()
        self._found += count
        self._left -= count
        if count == MOST_READY and self._left > 0:
            self._loop.call_soon(self._look)
            return
        if self._pace.round_over(self._found):
            self._end_rounds()
        self._found = self._left = 0

    cdef _end_rounds(self):
        cdef Polled polled
        self.is_in_rounds = False
        self._set_timer(0.0)
        for polled in [polled for polled in self._polled if polled is not None]:
            polled.connection.read_by_loop()

    # --- descriptors

    cdef bint _open(self) except -1:
        """False: there are no descriptors left."""
        cdef int timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if timer < 0:
            return False
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            close(timer)
            return False
        self._timer = timer
        self._loop.add_reader(timer, self._round)
        return True

    cdef bint _watch(self, int operation, Polled polled) noexcept:
        """False: the kernel watches no more sockets for this user (fs.epoll.max_user_watches)."""
        cdef epoll_event event
        event.events = EPOLLIN
        event.data.u32 = polled.slot
        return epoll_ctl(self._epoll, operation, polled.source_fd, &event) == 0

    cdef int _set_timer(self, double period_s) except -1:
        """0 stops it."""
        cdef itimerspec spec
        spec.it_interval.tv_sec = <time_t> period_s
        spec.it_interval.tv_nsec = <long> ((period_s - <time_t> period_s) * 1e9)
        spec.it_value = spec.it_interval
        if timerfd_settime(self._timer, 0, &spec, NULL) < 0:
            raise OSError(errno, "timerfd_settime")
        return 0


cdef _close(Polled polled):
    if polled.source_fd >= 0:
        close(polled.source_fd)
    if polled.sink_fd >= 0:
        close(polled.sink_fd)
    polled.source_fd = polled.sink_fd = -1
