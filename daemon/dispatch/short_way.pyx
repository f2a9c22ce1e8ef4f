"""The short way from a request to its worker and back: hash, match, score, book, finish.

For the policy that most requests go by. Two native calls lead there, since between them the plan is chosen, which may
go by the prompt's length. What a pool and a plan say is taken out of their objects once, not per request: a shard sees
the same ones again and again.
"""
from libc.stdint cimport int64_t

from pointsman.daemon.routing.body cimport Features
from pointsman.daemon.routing.table cimport Plan, Pool
from pointsman.daemon.shm.choosing cimport Booked, Candidates, Chooser, Terms
from pointsman.daemon.shm.prefix cimport HashChain

from pointsman.daemon.shm import bookings as _bookings
from pointsman.daemon.shm import choosing as _choosing

cdef int64_t CHARS_PER_TOKEN = 4
cdef int64_t NONE = _bookings.NONE
cdef enum:
    NOT_JUDGED = 0
if NOT_JUDGED != _choosing.NEUTRAL:
    raise ImportError("choosing.pyx and short_way.pyx do not agree on what a verdict is")


cdef class ShortWay:
    """`pool` and `plan`: which `candidates` and `terms` are of."""

    def __init__(self, Chooser chooser not None, HashChain chain not None, rng, unlocked, charge):
        """`unlocked(features, body_bytes, pool, prompt_tokens)` chooses when the routing mutex is not to be had,
        `charge(booked, now, output_tokens)` corrects what the request's user was charged."""
        self.chooser, self.chain, self.draw = chooser, chain, rng.random
        self.unlocked, self.charge = unlocked, charge

    cpdef int64_t read_prompt(self, Features features) except -1:
        """Hashes the prompt of the request that is routed next; returns its tokens, about, at least 1."""
        self.chain._load(features.prompt, features._salt(), not features.has_ids)
        return max((<int64_t> self.chain.total_chars + CHARS_PER_TOKEN - 1) // CHARS_PER_TOKEN, <int64_t> 1)

    cpdef Booked choose(
        self, Features features, int64_t body_bytes, Pool pool, Plan plan, int64_t prompt_tokens, double now,
        bint is_retry=False,
    ):
        """After `read_prompt`. Raises RequestError 503 when no worker of the pool is up."""
        if pool is not self.pool:
            self.candidates, self.pool = Candidates(pool.slots, pool.workers), pool
        if plan is not self.plan:
            self.terms, self.plan = _terms(plan), plan
        booked = self.chooser._choose(
            self.candidates, self.terms, body_bytes, prompt_tokens, not features.is_stream, now,
            self.draw(), is_retry,
        )
        if type(booked) is Booked:
            return <Booked> booked
        if booked is None:
            raise pool.nobody()
        return self.unlocked(features, body_bytes, pool, prompt_tokens)

    cpdef bint finish(
        self, Booked booked, double now, output_tokens, bint was_computed=True, int64_t verdict=NOT_JUDGED
    ) except -1:
        """The request is over; None: it failed or was cancelled. Once for everything that was booked, however chosen.

        Not `was_computed`: the worker failed it and holds nothing of it that it did not hold before. True: `verdict` is
        for `SharedResilience.record` to tell.
        """
        cdef bint is_news = self.chooser._finish(
            booked, now, NONE if output_tokens is None else <int64_t> output_tokens, was_computed, verdict
        )
        if booked.user_key:
            self.charge(booked, now, output_tokens or 0)
        return is_news


cdef Terms _terms(Plan plan):
    parameters, retry = plan.expected_cost, plan.retry
    return Terms(
        parameters.theta, parameters.theta_gain, parameters.gamma, parameters.kappa_s,
        retry.budget_ratio, retry.budget_min_per_s,
    )
