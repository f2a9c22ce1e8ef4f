from pointsman.daemon.relay.context cimport ShardContext
from pointsman.daemon.relay.heads cimport ResponseHead, own_lines
from pointsman.daemon.relay.inbound cimport Inbound
from pointsman.daemon.relay.lines cimport request_line
from pointsman.daemon.relay.routed cimport Routed
from pointsman.daemon.relay.upstream cimport UpstreamPool
from pointsman.daemon.relay.usage cimport Usage, read_usage
from pointsman.daemon.shm.choosing cimport Booked
from pointsman.daemon.telemetry.series cimport Series

cdef object _COMPLETE
cdef dict _known_models
cdef long long _DURATION, _FIRST_BYTE

cpdef bytes own_headers(Routed exchange)
cpdef output_tokens(Routed exchange, ending)
cdef long long _counted_tokens(Routed exchange) except? -1
cpdef report(Routed exchange, int status, ending, double now)
cdef _note_decision(Routed exchange, Booked decision, int status, double now)
cdef bytes _log_line(Routed exchange, int status, ending, double now)
cdef bytes _json_of(str model)
cdef bytes _reason_text(long long reason)
