/* A piece of a request body. */
#ifndef POINTSMAN_JSON_SPAN_H
#define POINTSMAN_JSON_SPAN_H

#include <stddef.h>

enum {
    JSON_RAW,     /* a JSON value as it stands */
    JSON_TEXT,    /* a string without escapes; with its quotes, as the next one */
    JSON_ESCAPED, /* a string with escapes */
    JSON_IDS,     /* token ids of four bytes each, kept beside the body */
};

typedef struct {
    size_t at, size;
    int kind;
} json_span;

#endif
