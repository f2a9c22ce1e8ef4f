from libc.stdint cimport int64_t

from pointsman.daemon.routing.body cimport Features
from pointsman.daemon.routing.table cimport Plan, Pool
from pointsman.daemon.shm.choosing cimport Booked, Candidates, Chooser, Terms
from pointsman.daemon.shm.prefix cimport HashChain

cdef class ShortWay:
    cdef Chooser chooser
    cdef HashChain chain
    cdef object draw, unlocked, charge
    cdef Pool pool
    cdef Plan plan
    cdef Candidates candidates
    cdef Terms terms

    cpdef int64_t read_prompt(self, Features features) except -1
    cpdef Booked choose(
        self, Features features, int64_t body_bytes, Pool pool, Plan plan, int64_t prompt_tokens, double now, bint is_retry=*
    )
    cpdef bint finish(
        self, Booked booked, double now, output_tokens, bint was_computed=*, int64_t verdict=*
    ) except -1
