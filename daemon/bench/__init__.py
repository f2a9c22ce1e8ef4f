"""The load generator and what it measures with: `pointsman bench`, docs/bench.md.

Theory of operation. A *workload* says what is asked, a *loop* when: a closed loop has so many clients that ask again
when they were answered, an open loop has arrivals that wait for nobody. Every request has an *intended* start, and all
its times count from there: a generator or a server that is late makes latencies longer instead of requests fewer. A
*driver* has the connections to one target, plain ones by `Sockets` (native) instead of the event loop's transports;
each reads its answers with an `Answer` (native), which finds the end of a message, stamps its tokens and says what is
wrong with it. `judge` turns that into one class of outcome, a `Recorder` adds it up, warm-up apart. `summarise` makes
the report of it, which `markdown` and `html` only show.

Pure, that is without sockets and clocks: histogram, answer, outcome, tally, timeline, steady, arrivals, dialects,
workloads, trace_load, model, summary, diff, markdown, html, svg. Nothing of the daemon imports this package.
"""
