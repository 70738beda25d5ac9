/* SPDX-License-Identifier: Apache-2.0 */
/* session.jsonl as the writer (capture.c) and the reader (session.c) of captured batches share it. */
#ifndef MOE_RUNTIME_SESSION_H
#define MOE_RUNTIME_SESSION_H

#include "runtime/internal.h"

#define MOE_SESSION_FILE      "session.jsonl"
#define MOE_SESSION_MAX_BYTES ((uint64_t)1 << 30)
#define MOE_SESSION_MAX_LINE  65536
#define MOE_SESSION_MAX_PHASE 32
#define MOE_SESSION_MAX_TIME  253402300799.0 /* the end of the year 9999 */

struct moe_session_line {
    int32_t layer;
    int64_t tokens;
    double time;
    char phase[MOE_SESSION_MAX_PHASE + 1];
    char *file; /* a name in the session's directory */
};

struct moe_session_index {
    struct moe_session_line *lines;
    int64_t count;
    uint64_t whole; /* bytes of the whole lines; what follows them is a last line that was cut short */
};

/* Parses the text of a session.jsonl; `name` is for messages. A last line that has no newline or is not JSON is what a
 * crash leaves: it is not counted. Anything else that is wrong is MOE_ERROR_FILE and names the line. On success *index
 * owns memory: moe_session_index_free. */
moe_status moe_session_parse(const char *text, size_t length, const char *name, struct moe_session_index *index,
                             struct moe_error *err);
/* The same, read from an open file of `size` bytes. */
moe_status moe_session_load(int fd, const char *path, uint64_t size, struct moe_session_index *index,
                            struct moe_error *err);
void moe_session_index_free(struct moe_session_index *index);

/* 1 to 32 characters of a-z, 0-9, '_' and '-'. */
bool moe_session_phase_ok(const char *phase);

#endif
