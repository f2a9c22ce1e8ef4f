"""The native way from a JSON body to what routing needs to know of it: `body_scan.h` has the scan.

`scan` answers None whenever it is not certain; `routing.request.json_features` then asks a parser. Where `scan` answers,
a parser would have found exactly the same: that is fuzzed (scripts/fuzz-body).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Malloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from pointsman.daemon.shm.spans cimport JSON_IDS, Spans, json_span

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "json_string.h":
    void json_choose_width(bint is_wide_allowed)

cdef extern from "body_scan.h":
    ctypedef struct bs_text:
        const unsigned char *p
        size_t size
    ctypedef struct bs_range:
        size_t first, end
    ctypedef struct bs_result:
        bs_text model, lora, rid
        int64_t max_tokens
        int is_stream
        bs_range part[3]
        json_span *span
        unsigned char *ids
        size_t ids_size
    int bs_scan(bs_result *out, const unsigned char *body, size_t size)
    void bs_trim(bs_result *out)

cdef extern from *:
    """
    static bs_result scratch;
    """
    bs_result scratch  # whoever holds the GIL

json_choose_width(True)


@cython.freelist(64)
cdef class Features:
    """`model` is "" when the request names none (or not by a string: the worker will say what it thinks of that).

    `prompt`: JSON as it stands in the body, in the order of the prompt, or token ids of 4 bytes each (`has_ids`).
    `rid`: SGLang's own id of a single request, as the JSON string that it is.
    """

    def __init__(
        self, str model="", bint is_stream=False, str lora="", max_tokens=None, prompt=(), bint has_ids=False,
        bytes rid=b"",
    ):
        self.model, self.is_stream, self.lora, self.max_tokens = model, is_stream, lora, max_tokens
        self.prompt, self.has_ids, self.rid = prompt, has_ids, rid

    @property
    def salt(self) -> bytes:
        """What keeps equal texts apart: model, LoRA, and whether ids follow."""
        return self._salt()

    cdef bytes _salt(self):
        cdef Py_ssize_t model_size, lora_size, size
        cdef const char *model = PyUnicode_AsUTF8AndSize(self.model, &model_size)
        cdef const char *lora = PyUnicode_AsUTF8AndSize(self.lora, &lora_size)
        cdef bytes salt = PyBytes_FromStringAndSize(NULL, model_size + 1 + lora_size + (4 if self.has_ids else 0))
        cdef char *at = PyBytes_AS_STRING(salt)
        memcpy(at, model, model_size)
        at[model_size] = 0
        at += model_size + 1
        memcpy(at, lora, lora_size)
        if self.has_ids:
            memcpy(at + lora_size, b"\0ids", 4)
        return salt

    def __repr__(self):
        return (
            f"Features({self.model!r}, is_stream={self.is_stream}, lora={self.lora!r}, max_tokens={self.max_tokens}, "
            f"prompt={[bytes(part) for part in self.prompt]}, has_ids={self.has_ids}, rid={self.rid!r})"
        )


cpdef Features scan(bytes data, Py_ssize_t start=0):
    """The Features of the JSON object that `data` has from `start` on; None: not certain, ask a parser."""
    cdef Features found
    if data is None or not 0 <= start <= PyBytes_GET_SIZE(data):
        raise ValueError(f"no body begins at {start}")
    if not bs_scan(
        &scratch, <const unsigned char *> PyBytes_AS_STRING(data) + start, <size_t> (PyBytes_GET_SIZE(data) - start)
    ):
        bs_trim(&scratch)
        return None
    found = Features.__new__(Features)
    found.model, found.lora = _text(&scratch.model), _text(&scratch.lora)
    found.is_stream = scratch.is_stream
    found.max_tokens = None if scratch.max_tokens < 0 else scratch.max_tokens
    found.rid = b""
    if scratch.rid.p != NULL:
        found.rid = PyBytes_FromStringAndSize(<const char *> scratch.rid.p, scratch.rid.size)
    _put_prompt(found, data, start)
    bs_trim(&scratch)
    return found


cdef str _text(const bs_text *text):
    return "" if text.p == NULL else PyUnicode_DecodeUTF8(<char *> text.p, text.size, NULL)


cdef int _put_prompt(Features found, bytes data, Py_ssize_t start) except -1:
    cdef Spans spans
    cdef size_t n = 0, i
    cdef int part
    for part in range(3):
        n += scratch.part[part].end - scratch.part[part].first
    found.prompt = ()
    if n == 0:
        return 0
    spans = Spans.__new__(Spans)
    spans.span = <json_span *> PyMem_Malloc(n * sizeof(json_span))
    if spans.span == NULL:
        raise MemoryError
    for part in range(3):
        for i in range(scratch.part[part].first, scratch.part[part].end):
            spans.span[spans.n] = scratch.span[i]
            if scratch.span[i].kind == JSON_IDS:
                found.has_ids = True
            else:
                spans.span[spans.n].at += start
            spans.n += 1
    spans.body = data
    if found.has_ids:
        spans.ids = PyBytes_FromStringAndSize(<const char *> scratch.ids, scratch.ids_size)
    found.prompt = spans
    return 0


def use_wide(bint is_allowed):
    """Tests: whether strings may be scanned the wide way from now on (json_string.h)."""
    json_choose_width(is_allowed)
