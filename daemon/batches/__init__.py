"""Offline batches: OpenAI's Files and Batches API, served and run by a process of its own.

    shard ── unix socket ──> api ──> runner ──> data port (priority `bulk`) ──> shard ──> worker
                              │        │
                              └────────┴──> ledger (SQLite: what is known) and store (payloads)

Pure: lifecycle, input_lines, output_lines, grouping, attempts, concurrency. The ledger is the only truth: whatever this
process knows beyond it may be lost at any moment. A result is in the store before its line is marked done.
"""
