"""Prefill/decode disaggregation, as decisions: events in, commands out. No socket, no clock, no randomness of its own.

rooms        SGLang's numbers of one transfer
bodies       what a request asks for, and the bodies that its two legs receive
legs         events and commands of the two machines
bootstrap    SGLang: both legs at once
two_step     vLLM: prefill first, then decode with what it told
ledger       how pairs of workers fared: whom a failure is charged to, which pairs are left alone for a while
logprobs     SGLang's input logprobs, which only the prefill worker knows
"""
