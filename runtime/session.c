/* SPDX-License-Identifier: Apache-2.0 */
/* Reading captured batches. */
#include "runtime/session.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "config/file.h"
#include "config/json.h"

/* ---- session.jsonl ---- */

bool moe_session_phase_ok(const char *phase)
{
    size_t length = strspn(phase, "abcdefghijklmnopqrstuvwxyz0123456789_-");
    return length >= 1 && length <= MOE_SESSION_MAX_PHASE && phase[length] == 0;
}

static moe_status bad_field(const char *name, const cJSON *root, const char *key, const char *expected,
                            struct moe_error *err)
{
    char shown[80];
    return moe_fail(err, MOE_ERROR_FILE, "%s: '%s' is %s, expected %s", name, key,
                    moe_json_show(moe_json_get(root, key), shown, sizeof shown), expected);
}

static moe_status take_fields(const cJSON *root, const char *name, int64_t number, struct moe_session_line *line,
                              struct moe_error *err)
{
    int64_t index, layer;
    if (!moe_json_integer(moe_json_get(root, "index"), number, number, &index)) {
        char expected[32];
        snprintf(expected, sizeof expected, "%lld", (long long)number);
        return bad_field(name, root, "index", expected, err);
    }
    if (!moe_json_integer(moe_json_get(root, "layer"), 0, INT32_MAX, &layer))
        return bad_field(name, root, "layer", "an integer from 0 to 2147483647", err);
    line->layer = (int32_t)layer;
    if (!moe_json_integer(moe_json_get(root, "tokens"), 0, (int64_t)1 << 53, &line->tokens))
        return bad_field(name, root, "tokens", "an integer of 0 or more", err);

    const cJSON *time = moe_json_get(root, "time");
    if (!cJSON_IsNumber(time) || !(time->valuedouble >= 0 && time->valuedouble <= MOE_SESSION_MAX_TIME))
        return bad_field(name, root, "time", "seconds since 1970", err);
    line->time = time->valuedouble;

    const cJSON *phase = moe_json_get(root, "phase");
    if (!cJSON_IsString(phase) || !moe_session_phase_ok(phase->valuestring))
        return bad_field(name, root, "phase", "1 to 32 characters of a-z, 0-9, '_' and '-'", err);
    snprintf(line->phase, sizeof line->phase, "%s", phase->valuestring);

    const cJSON *file = moe_json_get(root, "file");
    if (!cJSON_IsString(file) || !moe_file_name_plain(file->valuestring))
        return bad_field(name, root, "file", "the name of a file in the session's directory", err);
    line->file = strdup(file->valuestring);
    if (line->file == NULL)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", name);
    return MOE_OK;
}

static moe_status grow(struct moe_session_index *index, int64_t *capacity, const char *name, struct moe_error *err)
{
    if (index->count < *capacity)
        return MOE_OK;
    int64_t wanted = *capacity == 0 ? 64 : *capacity * 2; /* lines of a file of at most 1 GiB: no overflow */
    struct moe_session_line *lines = realloc(index->lines, (size_t)wanted * sizeof *lines);
    if (lines == NULL)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %lld lines", name, (long long)wanted);
    index->lines = lines;
    *capacity = wanted;
    return MOE_OK;
}

/* One line without its newline. *cut: the line is not JSON. */
static moe_status parse_line(const char *text, size_t length, const char *name, int64_t number,
                             struct moe_session_line *line, bool *cut, struct moe_error *err)
{
    char where[512];
    snprintf(where, sizeof where, "%.480s:%lld", name, (long long)number + 1);
    if (length > MOE_SESSION_MAX_LINE)
        return moe_fail(err, MOE_ERROR_FILE, "%s: the line has %zu bytes, expected at most %d", where, length,
                        MOE_SESSION_MAX_LINE);
    cJSON *root;
    moe_status status = moe_json_parse(text, length, where, &root, err);
    *cut = status == MOE_ERROR_FILE;
    if (status != MOE_OK)
        return status;
    status = take_fields(root, where, number, line, err);
    cJSON_Delete(root);
    return status;
}

moe_status moe_session_parse(const char *text, size_t length, const char *name, struct moe_session_index *index,
                             struct moe_error *err)
{
    int64_t capacity = 0;
    memset(index, 0, sizeof *index);
    while (index->whole < length) {
        const char *line = text + index->whole;
        size_t left = length - index->whole;
        const char *newline = memchr(line, '\n', left);
        if (newline == NULL)
            break;
        size_t bytes = (size_t)(newline - line);
        bool cut = false;
        moe_status status = grow(index, &capacity, name, err);
        if (status == MOE_OK)
            status = parse_line(line, bytes, name, index->count, &index->lines[index->count], &cut, err);
        if (cut && bytes + 1 == left)
            break;
        if (status != MOE_OK) {
            moe_session_index_free(index);
            return status;
        }
        index->count++;
        index->whole += bytes + 1;
    }
    return MOE_OK;
}

moe_status moe_session_load(int fd, const char *path, uint64_t size, struct moe_session_index *index,
                            struct moe_error *err)
{
    memset(index, 0, sizeof *index);
    if (size > MOE_SESSION_MAX_BYTES)
        return moe_fail(err, MOE_ERROR_FILE, "%s: has %llu bytes, expected at most %llu", path,
                        (unsigned long long)size, (unsigned long long)MOE_SESSION_MAX_BYTES);
    char *text = malloc(size > 0 ? (size_t)size : 1);
    if (text == NULL)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %llu bytes", path,
                        (unsigned long long)size);
    moe_status status = moe_file_read(fd, path, 0, text, size, err);
    if (status == MOE_OK)
        status = moe_session_parse(text, (size_t)size, path, index, err);
    free(text);
    return status;
}

void moe_session_index_free(struct moe_session_index *index)
{
    for (int64_t i = 0; i < index->count; i++)
        free(index->lines[i].file);
    free(index->lines);
    memset(index, 0, sizeof *index);
}

/* ---- Batches ---- */

struct moe_session {
    moe_context *ctx;
    char *directory;
    struct moe_session_index index;
    char *buffer; /* the tensors of the record read last */
    size_t capacity;
};

/* What a tensor of a batch must be: [tokens, low to high columns] of one of some dtypes. */
struct want {
    const char *name;
    bool optional;
    unsigned dtypes; /* bits 1 << moe_dtype */
    const char *dtype_names;
    int64_t low, high;
};

static moe_status bad_shape(const char *path, const struct moe_st_tensor *tensor, int64_t tokens,
                            const struct want *want, struct moe_error *err)
{
    char shape[MOE_ST_SHAPE_TEXT], columns[48];
    if (want->low == want->high)
        snprintf(columns, sizeof columns, "%lld", (long long)want->low);
    else if (want->high == INT64_MAX)
        snprintf(columns, sizeof columns, "%lld or more", (long long)want->low);
    else
        snprintf(columns, sizeof columns, "%lld to %lld", (long long)want->low, (long long)want->high);
    return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' has shape %s, expected [%lld, %s]", path, want->name,
                    moe_st_show_shape(tensor->rank, tensor->shape, shape), (long long)tokens, columns);
}

/* *tensor is NULL if it is optional and not there. */
static moe_status find(const struct moe_st_file *file, int64_t tokens, const struct want *want,
                       const struct moe_st_tensor **tensor, struct moe_error *err)
{
    const char *path = moe_st_path(file);
    const struct moe_st_tensor *t = *tensor = moe_st_find(file, want->name);
    if (t == NULL)
        return want->optional ? MOE_OK : moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' is missing", path, want->name);
    if ((want->dtypes >> t->type & 1) == 0)
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' is %s, expected %s", path, want->name, t->dtype,
                        want->dtype_names);
    if (t->rank != 2 || t->shape[0] != tokens || t->shape[1] < want->low || t->shape[1] > want->high)
        return bad_shape(path, t, tokens, want, err);
    return MOE_OK;
}

enum { HIDDEN_STATES, TOPK_IDS, TOPK_WEIGHTS, ROUTER_LOGITS, OUTPUT, TENSORS };

static moe_status find_batch(const struct moe_st_file *file, int64_t tokens, const struct moe_st_tensor *batch[TENSORS],
                             struct moe_error *err)
{
    const unsigned f32 = 1u << MOE_F32;
    struct want want = {"hidden_states", false, 1u << MOE_BF16 | 1u << MOE_F16 | f32, "BF16, F16 or F32", 1, INT64_MAX};
    moe_status status = find(file, tokens, &want, &batch[HIDDEN_STATES], err);
    if (status != MOE_OK)
        return status;
    want = (struct want){"topk_ids", false, 1u << MOE_I32 | 1u << MOE_I64, "I32 or I64", 1, MOE_MAX_TOP_K};
    status = find(file, tokens, &want, &batch[TOPK_IDS], err);
    if (status != MOE_OK)
        return status;
    int64_t top_k = batch[TOPK_IDS]->shape[1];
    want = (struct want){"topk_weights", false, f32, "F32", top_k, top_k};
    status = find(file, tokens, &want, &batch[TOPK_WEIGHTS], err);
    if (status != MOE_OK)
        return status;
    want = (struct want){"router_logits", true, f32, "F32", 1, MOE_MAX_EXPERTS};
    status = find(file, tokens, &want, &batch[ROUTER_LOGITS], err);
    if (status != MOE_OK)
        return status;
    const struct moe_st_tensor *hidden = batch[HIDDEN_STATES];
    want = (struct want){"output", true, 1u << hidden->type, hidden->dtype, hidden->shape[1], hidden->shape[1]};
    return find(file, tokens, &want, &batch[OUTPUT], err);
}

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* Reads the tensors into the session's buffer; data[i] is NULL where there is no tensor. Reads rather than maps, so
 * that a file that shrinks meanwhile is an error and not a signal. */
static moe_status read_tensors(struct moe_session *session, const struct moe_st_file *file,
                               const struct moe_st_tensor *const batch[TENSORS], void *data[TENSORS],
                               struct moe_error *err)
{
    const char *path = moe_st_path(file);
    uint64_t bytes = 64; /* then what lies in one file without overlap, rounded up: far from 2^64 */
    for (int i = 0; i < TENSORS; i++)
        bytes += batch[i] != NULL ? aligned(batch[i]->bytes) : 0;
    if (bytes > session->capacity) {
        free(session->buffer);
        session->capacity = 0;
        session->buffer = aligned_alloc(64, bytes);
        if (session->buffer == NULL)
            return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %llu bytes", path,
                            (unsigned long long)bytes);
        session->capacity = bytes;
    }
    char *at = session->buffer;
    for (int i = 0; i < TENSORS; i++) {
        data[i] = NULL;
        if (batch[i] == NULL)
            continue;
        data[i] = at;
        at += aligned(batch[i]->bytes);
        moe_status status =
            moe_file_read(moe_st_descriptor(file), path, batch[i]->offset, data[i], batch[i]->bytes, err);
        if (status != MOE_OK)
            return status;
    }
    return MOE_OK;
}

/* In place; an id that fits no int32 is no expert's. */
static void narrow_ids(char *ids, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        int64_t wide;
        memcpy(&wide, ids + 8 * i, sizeof wide);
        int32_t id = wide < 0 || wide > INT32_MAX ? -1 : (int32_t)wide;
        memcpy(ids + 4 * i, &id, sizeof id);
    }
}

static moe_status read_batch(struct moe_session *session, const struct moe_st_file *file, moe_record *record,
                             struct moe_error *err)
{
    const struct moe_st_tensor *batch[TENSORS];
    void *data[TENSORS];
    moe_status status = find_batch(file, record->tokens, batch, err);
    if (status == MOE_OK)
        status = read_tensors(session, file, batch, data, err);
    if (status != MOE_OK)
        return status;
    if (batch[TOPK_IDS]->type == MOE_I64)
        narrow_ids(data[TOPK_IDS], batch[TOPK_IDS]->bytes / 8);
    record->hidden_size = batch[HIDDEN_STATES]->shape[1];
    record->num_experts = batch[ROUTER_LOGITS] != NULL ? (int32_t)batch[ROUTER_LOGITS]->shape[1] : 0;
    record->top_k = (int32_t)batch[TOPK_IDS]->shape[1];
    record->dtype = batch[HIDDEN_STATES]->type;
    record->hidden_states = data[HIDDEN_STATES];
    record->topk_ids = data[TOPK_IDS];
    record->topk_weights = data[TOPK_WEIGHTS];
    record->router_logits = data[ROUTER_LOGITS];
    record->output = data[OUTPUT];
    return MOE_OK;
}

/* ---- The handle ---- */

static moe_status load_index(moe_session *session, struct moe_error *err)
{
    char *path = moe_file_join(session->directory, MOE_SESSION_FILE);
    if (path == NULL)
        return MOE_ERROR_OUT_OF_MEMORY;
    int fd;
    uint64_t size;
    moe_status status = moe_file_open(path, &fd, &size, err);
    if (status == MOE_OK) {
        status = moe_session_load(fd, path, size, &session->index, err);
        close(fd);
    }
    if (status == MOE_OK && session->index.whole < size)
        moe_context_log(session->ctx, MOE_LOG_WARNING, "%s:%lld: the last line was cut short and is left out", path,
                        (long long)session->index.count + 1);
    free(path);
    return status;
}

moe_status moe_session_open(moe_context *ctx, const char *directory, moe_session **out)
{
    struct moe_error err = {{0}};
    if (ctx == NULL || directory == NULL || out == NULL)
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    moe_session *session = calloc(1, sizeof *session);
    if (session == NULL)
        return moe_context_report(ctx, MOE_ERROR_OUT_OF_MEMORY, NULL);
    session->ctx = ctx;
    session->directory = strdup(directory);
    moe_status status = session->directory == NULL ? MOE_ERROR_OUT_OF_MEMORY : load_index(session, &err);
    if (status != MOE_OK) {
        moe_session_close(session);
        return moe_context_report(ctx, status, &err);
    }
    *out = session;
    return MOE_OK;
}

void moe_session_close(moe_session *session)
{
    if (session == NULL)
        return;
    moe_session_index_free(&session->index);
    free(session->buffer);
    free(session->directory);
    free(session);
}

int64_t moe_session_count(const moe_session *session)
{
    return session != NULL ? session->index.count : 0;
}

moe_status moe_session_read(moe_session *session, int64_t index, moe_record *out)
{
    struct moe_error err = {{0}};
    if (session == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    if (index < 0 || index >= session->index.count) {
        moe_fail(&err, MOE_ERROR_INVALID_ARGUMENT, "%s: record %lld does not exist, the session has %lld",
                 session->directory, (long long)index, (long long)session->index.count);
        return moe_context_report(session->ctx, MOE_ERROR_INVALID_ARGUMENT, &err);
    }
    const struct moe_session_line *line = &session->index.lines[index];
    moe_record record = moe_record_init();
    record.layer = line->layer;
    record.phase = line->phase;
    record.tokens = line->tokens;
    record.time = line->time;

    char *path = moe_file_join(session->directory, line->file);
    if (path == NULL)
        return moe_context_report(session->ctx, MOE_ERROR_OUT_OF_MEMORY, NULL);
    struct moe_st_file *file = NULL;
    moe_status status = moe_st_open(path, &file, &err);
    if (status == MOE_OK) {
        status = read_batch(session, file, &record, &err);
        moe_st_close(file);
    }
    free(path);
    if (status == MOE_OK)
        status = moe_struct_out(out, &record, sizeof record, sizeof record, "moe_record", &err);
    return moe_context_report(session->ctx, status, &err);
}
