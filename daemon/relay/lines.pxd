from libc.stdint cimport int64_t

cpdef bytes request_line(
    double ts_s, bytes request_id, int64_t shard, bytes client, bytes key, bytes method, bytes path, int64_t status,
    bytes model, bint is_stream, bytes profile, bytes policy, int64_t generation, bytes worker, bytes prefill,
    double prefill_ms, double transfer_ms, int64_t attempts, double queue_ms, double connect_ms, double first_byte_ms, double total_ms, int64_t bytes_in, int64_t bytes_out,
    int64_t resends, int64_t continuations, bytes reason, prompt_tokens, int64_t matched_tokens, cached_tokens,
    output_tokens, bytes end, bytes termination,
)
