"""The control process: admin API, file watcher, probes. Owns the configuration; no request ever waits for it.

Theory of operation. There are four kinds of truth here, each in one place:

    registry   which workers exist and who declared them (daemon/workers/registry.py)
    rules      the last good profiles file (`desired.Rules`)
    access     the last good key file, certificates and authorities (`desired.Access`)
    segment    which workers are up, down, pending or draining, and their load: shared with the shards

Whoever changes the registry or the rules calls `Publisher.publish`, which compiles both into a snapshot and returns
once every shard runs a generation that contains the change. Probes write the segment only, so a worker that goes up or
down makes no generation; models that an engine announces do.

A removed worker is first marked draining in the segment (from then on no pick can take it), then left out of the next
generation; its slot is emptied once its last request has ended (`drain`). A control process that dies takes nothing
with it: its successor gets the last snapshot from the supervisor and keeps ids, slots, addresses and statuses.

    __main__   the process: arguments, signals, exit codes          boot       puts the parts together
    channel    our end of the leash                                 tasks      the one owner of background work
    publisher  one rollout at a time, bursts coalesced              desired    registry + rules -> Snapshot (pure)
    files      what is on disk, read in one go                      reload     files -> registry and rules
    catalog    the admin API's view of the workers                  service    the admin API's port
    restore    the registry at the start                            views      what is shown (pure)
    drain      slots of removed workers                             admin      servers on the inherited sockets
"""
