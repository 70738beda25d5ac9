/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Appending captured batches. A batch is in the session when its line is: the batch's file is whole and on disk under
 * its name before the line is written, and the line goes out in one write. Whatever dies in between leaves a file that
 * no line names (the next batch replaces it) or a line without its end (readers leave it out, the next writer cuts it).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "config/convert.h"
#include "config/file.h"
#include "runtime/session.h"

struct moe_capture {
    moe_context *ctx;
    char *directory;
    int directory_fd;
    int fd; /* of session.jsonl; holds the lock that keeps other writers out */
    int64_t count;
    int64_t next_file; /* the number in the next batch file's name */
    uint64_t bytes;    /* of session.jsonl */
};

/* ---- Opening ---- */

static moe_status cannot(const moe_capture *capture, const char *file, const char *what, struct moe_error *err)
{
    int reason = errno;
    return moe_fail(err, MOE_ERROR_WRITE, "%s%s%s: cannot %s: %s", capture->directory, file[0] != 0 ? "/" : "", file,
                    what, strerror(reason));
}

/* Names become durable with their directory. Some file systems cannot do that and say EINVAL. */
static int sync_directory(int fd)
{
    return fsync(fd) != 0 && errno != EINVAL ? -1 : 0;
}

static moe_status lock(moe_capture *capture, uint64_t *size, struct moe_error *err)
{
    /* O_NONBLOCK and O_NOCTTY: whatever has the name must not be waited on before it is known to be a file. */
    capture->fd = openat(capture->directory_fd, MOE_SESSION_FILE,
                         O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0666);
    struct stat st;
    if (capture->fd < 0 || fstat(capture->fd, &st) != 0)
        return cannot(capture, MOE_SESSION_FILE, "open", err);
    if (!S_ISREG(st.st_mode))
        return moe_fail(err, MOE_ERROR_WRITE, "%s/%s: is not a regular file", capture->directory, MOE_SESSION_FILE);
    if (flock(capture->fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK)
            return moe_fail(err, MOE_ERROR_WRITE, "session %s is being written by another process", capture->directory);
        return cannot(capture, MOE_SESSION_FILE, "lock", err);
    }
    /* The size counts from here: until now another writer may have appended. */
    if (fstat(capture->fd, &st) != 0)
        return cannot(capture, MOE_SESSION_FILE, "read", err);
    *size = (uint64_t)st.st_size;
    return MOE_OK;
}

/* The number of the next file is the index of its batch, unless another program, which may number otherwise, made the
 * session: then it is past every number in use, so that no listed file is replaced. */
static int64_t next_file(const struct moe_session_index *index)
{
    const int64_t reachable = (int64_t)1 << 40;
    int64_t next = index->count;
    for (int64_t i = 0; i < index->count; i++) {
        const char *file = index->lines[i].file;
        long long number = strncmp(file, "batch-", 6) == 0 ? strtoll(file + 6, NULL, 10) : -1;
        if (number >= next && number < reachable)
            next = number + 1;
    }
    return next;
}

/* Counts the batches and cuts off what a writer that died left of a line. */
static moe_status resume(moe_capture *capture, uint64_t size, struct moe_error *err)
{
    char *path = moe_file_join(capture->directory, MOE_SESSION_FILE);
    if (path == NULL)
        return MOE_ERROR_OUT_OF_MEMORY;
    struct moe_session_index index;
    moe_status status = moe_session_load(capture->fd, path, size, &index, err);
    free(path);
    if (status != MOE_OK)
        return status;
    capture->count = index.count;
    capture->next_file = next_file(&index);
    capture->bytes = index.whole;
    moe_session_index_free(&index);
    if (capture->bytes == size)
        return MOE_OK;
    if (ftruncate(capture->fd, (off_t)capture->bytes) != 0 || fdatasync(capture->fd) != 0)
        return cannot(capture, MOE_SESSION_FILE, "cut off its unfinished last line", err);
    moe_context_log(capture->ctx, MOE_LOG_WARNING, "%s/%s:%lld: cut off an unfinished last line", capture->directory,
                    MOE_SESSION_FILE, (long long)capture->count + 1);
    return MOE_OK;
}

/* Removes the temporary files of writers that were killed; the lock says that none is at work. */
static void remove_leftovers(const moe_capture *capture)
{
    int fd = openat(capture->directory_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
    if (directory == NULL) {
        if (fd >= 0)
            close(fd);
        return; /* they take room, but harm nothing */
    }
    for (const struct dirent *entry; (entry = readdir(directory)) != NULL;)
        if (strncmp(entry->d_name, ".batch-", 7) == 0)
            unlinkat(capture->directory_fd, entry->d_name, 0);
    closedir(directory);
}

static moe_status open_session(moe_capture *capture, struct moe_error *err)
{
    bool made = mkdir(capture->directory, 0777) == 0;
    if (!made && errno != EEXIST)
        return cannot(capture, "", "make the directory", err);
    capture->directory_fd = open(capture->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (capture->directory_fd < 0)
        return cannot(capture, "", "open the directory", err);
    uint64_t size = 0;
    moe_status status = lock(capture, &size, err);
    if (status == MOE_OK && sync_directory(capture->directory_fd) != 0)
        status = cannot(capture, "", "flush the directory", err);
    if (made && status == MOE_OK) {
        int parent = openat(capture->directory_fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (parent >= 0) { /* a parent that may not be read can still hold the session */
            sync_directory(parent);
            close(parent);
        }
    }
    if (status == MOE_OK)
        status = resume(capture, size, err);
    if (status == MOE_OK)
        remove_leftovers(capture);
    if (made && status != MOE_OK)
        rmdir(capture->directory); /* fails, rightly, if something is in it */
    return status;
}

moe_status moe_capture_open(moe_context *ctx, const char *directory, moe_capture **out)
{
    struct moe_error err = {{0}};
    if (ctx == NULL || directory == NULL || out == NULL)
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    moe_capture *capture = calloc(1, sizeof *capture);
    if (capture == NULL)
        return moe_context_report(ctx, MOE_ERROR_OUT_OF_MEMORY, NULL);
    capture->ctx = ctx;
    capture->fd = capture->directory_fd = -1;
    capture->directory = strdup(directory);
    moe_status status = capture->directory == NULL ? MOE_ERROR_OUT_OF_MEMORY : open_session(capture, &err);
    if (status != MOE_OK) {
        moe_capture_close(capture);
        return moe_context_report(ctx, status, &err);
    }
    *out = capture;
    return MOE_OK;
}

void moe_capture_close(moe_capture *capture)
{
    if (capture == NULL)
        return;
    if (capture->fd >= 0)
        close(capture->fd);
    if (capture->directory_fd >= 0)
        close(capture->directory_fd);
    free(capture->directory);
    free(capture);
}

/* ---- Appending ---- */

/* A tensor of `columns` columns: its bytes must be countable, and there must be data if there are any. */
static moe_status check_tensor(const char *name, const void *data, int64_t tokens, int64_t columns, size_t element,
                               struct moe_error *err)
{
    int64_t bytes;
    if (__builtin_mul_overflow(tokens, columns, &bytes) || __builtin_mul_overflow(bytes, (int64_t)element, &bytes))
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_record.%s: [%lld, %lld] is too large", name,
                        (long long)tokens, (long long)columns);
    if (data == NULL && bytes > 0)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_record.%s is NULL", name);
    return MOE_OK;
}

static moe_status check_range(const char *name, int64_t value, int64_t low, int64_t high, struct moe_error *err)
{
    if (value >= low && value <= high)
        return MOE_OK;
    return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_record.%s is %lld, expected %lld to %lld", name,
                    (long long)value, (long long)low, (long long)high);
}

static moe_status check_record(const moe_record *r, struct moe_error *err)
{
    if (!moe_struct_ok(r, sizeof *r, "moe_record", err))
        return MOE_ERROR_INVALID_ARGUMENT;
    if (r->phase != NULL && !moe_session_phase_ok(r->phase))
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT,
                        "moe_record.phase is '%.40s', expected 1 to 32 characters of a-z, 0-9, '_' and '-'", r->phase);
    if (!(r->time >= 0 && r->time <= MOE_SESSION_MAX_TIME))
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_record.time is %g, expected seconds since 1970", r->time);
    if (!moe_dtype_is_float(r->dtype))
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_record.dtype is %d, expected bf16, f16 or f32",
                        (int)r->dtype);

    moe_status status = check_range("layer", r->layer, 0, INT32_MAX, err);
    if (status == MOE_OK)
        status = check_range("tokens", r->tokens, 0, (int64_t)1 << 53, err);
    if (status == MOE_OK)
        status = check_range("hidden_size", r->hidden_size, 1, (int64_t)1 << 53, err);
    if (status == MOE_OK)
        status = check_range("top_k", r->top_k, 1, MOE_MAX_TOP_K, err);
    if (status == MOE_OK && r->router_logits != NULL)
        status = check_range("num_experts", r->num_experts, 1, MOE_MAX_EXPERTS, err);

    if (status == MOE_OK)
        status =
            check_tensor("hidden_states", r->hidden_states, r->tokens, r->hidden_size, moe_dtype_size(r->dtype), err);
    if (status == MOE_OK)
        status = check_tensor("topk_ids", r->topk_ids, r->tokens, r->top_k, sizeof(int32_t), err);
    if (status == MOE_OK)
        status = check_tensor("topk_weights", r->topk_weights, r->tokens, r->top_k, sizeof(float), err);
    if (status == MOE_OK && r->router_logits != NULL)
        status = check_tensor("router_logits", r->router_logits, r->tokens, r->num_experts, sizeof(float), err);
    return status;
}

static struct moe_st_write_tensor tensor(const char *name, moe_dtype dtype, int64_t rows, int64_t columns,
                                         const void *data)
{
    return (struct moe_st_write_tensor){
        .name = name, .dtype = dtype, .rank = 2, .shape = {rows, columns}, .data = data};
}

static moe_status write_batch(const moe_capture *capture, const char *file, const moe_record *r, struct moe_error *err)
{
    struct moe_st_write_tensor tensors[5] = {
        tensor("hidden_states", r->dtype, r->tokens, r->hidden_size, r->hidden_states),
        tensor("topk_ids", MOE_I32, r->tokens, r->top_k, r->topk_ids),
        tensor("topk_weights", MOE_F32, r->tokens, r->top_k, r->topk_weights),
    };
    size_t count = 3;
    if (r->router_logits != NULL)
        tensors[count++] = tensor("router_logits", MOE_F32, r->tokens, r->num_experts, r->router_logits);
    if (r->output != NULL)
        tensors[count++] = tensor("output", r->dtype, r->tokens, r->hidden_size, r->output);

    char *path = moe_file_join(capture->directory, file);
    if (path == NULL)
        return MOE_ERROR_OUT_OF_MEMORY;
    moe_status status = moe_st_write(path, tensors, count, err);
    free(path);
    if (status == MOE_OK && sync_directory(capture->directory_fd) != 0)
        status = cannot(capture, "", "flush the directory", err);
    return status;
}

static int format_line(char *line, size_t bytes, const moe_capture *capture, const char *file, const moe_record *r)
{
    const char *phase = r->phase != NULL ? r->phase : r->tokens == 1 ? "decode" : "prefill";
    struct timespec now;
    int64_t micros;
    if (r->time > 0) {
        micros = llround(r->time * 1e6);
    } else {
        clock_gettime(CLOCK_REALTIME, &now);
        micros = (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
    }
    /* The time in two integers: with "%f" the host program's locale would choose the decimal point. */
    return snprintf(line, bytes,
                    "{\"index\":%lld,\"layer\":%d,\"phase\":\"%s\",\"tokens\":%lld,\"time\":%lld.%06d,"
                    "\"file\":\"%s\"}\n",
                    (long long)capture->count, (int)r->layer, phase, (long long)r->tokens,
                    (long long)(micros / 1000000), (int)(micros % 1000000), file);
}

static moe_status write_line(moe_capture *capture, const char *line, size_t bytes, struct moe_error *err)
{
    if (capture->bytes + bytes > MOE_SESSION_MAX_BYTES)
        return moe_fail(err, MOE_ERROR_WRITE, "%s/%s: is full, readers take at most %llu bytes", capture->directory,
                        MOE_SESSION_FILE, (unsigned long long)MOE_SESSION_MAX_BYTES);
    ssize_t written;
    do
        written = write(capture->fd, line, bytes);
    while (written < 0 && errno == EINTR);
    if (written >= 0 && (size_t)written < bytes)
        return moe_fail(err, MOE_ERROR_WRITE, "%s/%s: only %zd of a line's %zu bytes could be written: no space left?",
                        capture->directory, MOE_SESSION_FILE, written, bytes);
    if (written < 0 || fdatasync(capture->fd) != 0)
        return cannot(capture, MOE_SESSION_FILE, "append a line", err);
    return MOE_OK;
}

static moe_status append(moe_capture *capture, const moe_record *record, struct moe_error *err)
{
    moe_status status = check_record(record, err);
    if (status != MOE_OK)
        return status;
    /* Usually nothing to cut: only an earlier failure that could not be undone leaves the file longer. */
    if (ftruncate(capture->fd, (off_t)capture->bytes) != 0)
        return cannot(capture, MOE_SESSION_FILE, "undo an earlier failure", err);

    char file[48], line[256];
    snprintf(file, sizeof file, "batch-%06lld.safetensors", (long long)capture->next_file);
    int bytes = format_line(line, sizeof line, capture, file, record);
    status = write_batch(capture, file, record, err);
    if (status == MOE_OK)
        status = write_line(capture, line, (size_t)bytes, err);
    if (status != MOE_OK) {
        /* The file goes only once no line can name it. */
        if (ftruncate(capture->fd, (off_t)capture->bytes) == 0)
            unlinkat(capture->directory_fd, file, 0);
        return status;
    }
    capture->bytes += (uint64_t)bytes;
    capture->count++;
    capture->next_file++;
    return MOE_OK;
}

moe_status moe_capture_append(moe_capture *capture, const moe_record *record)
{
    struct moe_error err = {{0}};
    if (capture == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    return moe_context_report(capture->ctx, append(capture, record, &err), &err);
}
