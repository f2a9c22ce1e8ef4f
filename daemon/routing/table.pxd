cdef class Pool:
    cdef readonly tuple workers, slots, weights, positions
    cdef readonly str model, role
    cdef readonly bint has_buckets

cdef class Plan:
    cdef readonly str profile
    cdef readonly object selection, expected_cost, retry, timeouts, limits, key_limits, pd
    cdef readonly long long prompt_tokens_min, prompt_tokens_max
    cdef readonly int priority
    cdef readonly Plan prefill, decode
    cdef readonly bint is_pd, is_rate_limited, continues_streams
    cdef readonly bytes profile_line, strategy_line, profile_json, policy_text
    cdef object _profile, _sections

cdef class RoutingTable:
    cdef readonly object snapshot, breaker, admission, keys
    cdef readonly long long generation
    cdef readonly dict model_index
    cdef readonly Pool everyone
    cdef readonly bint has_pairs
    cdef readonly tuple every_slot, model_names
    cdef readonly Plan only_plan
    cdef object _undeclared_pairs
    cdef dict _by_role, _fleets, _pairs, _pools, _plans, _hints
    cdef tuple _regular, _fallbacks, _rules
    cdef Plan _default

    cpdef Pool fleet(self, str role)
    cpdef Pool pool_for(self, str model)
