/* SPDX-License-Identifier: Apache-2.0 */
#include "models/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "config/json.h"
#include "models/st_dtypes.h"

struct moe_st_writer {
    char *path, *temporary;
    int fd;
    uint64_t left; /* bytes of data still to come */
};

/* ---- The header ---- */

static void put_string(FILE *out, const char *text)
{
    fputc('"', out);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            fprintf(out, "\\%c", *text);
        else if ((unsigned char)*text < 0x20)
            fprintf(out, "\\u%04x", *text);
        else
            fputc(*text, out);
    }
    fputc('"', out);
}

static moe_status put_tensors(FILE *out, const char *path, const struct moe_st_write_tensor *tensors, size_t count,
                              uint64_t *end, struct moe_error *err)
{
    *end = 0;
    /* transformers refuses a file that does not say which framework it is for. */
    fputs("{\"__metadata__\":{\"format\":\"pt\"}", out);
    for (size_t i = 0; i < count; i++) {
        const struct moe_st_write_tensor *t = &tensors[i];
        const struct moe_st_dtype *dtype = moe_st_dtype_by_type(t->dtype);
        uint64_t begin = *end, bytes;
        if (!dtype)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: tensor '%.200s': dtype is %d, expected a moe_dtype",
                            path, t->name, (int)t->dtype);
        if (t->rank < 0 || t->rank > MOE_ST_MAX_RANK)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: tensor '%.200s': rank is %d, expected 0 to %d", path,
                            t->name, (int)t->rank, MOE_ST_MAX_RANK);
        if (!moe_st_shape_bytes(dtype, t->rank, t->shape, &bytes) || __builtin_add_overflow(begin, bytes, end) ||
            *end >= 1ull << 53)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: tensor '%.200s': shape is negative or too large",
                            path, t->name);
        fputc(',', out);
        put_string(out, t->name);
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtype->name);
        for (int32_t d = 0; d < t->rank; d++)
            fprintf(out, "%s%lld", d ? "," : "", (long long)t->shape[d]);
        fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begin, (unsigned long long)*end);
    }
    fputc('}', out);
    return MOE_OK;
}

/* Length and header, padded so that the data is aligned to 8. *text belongs to the caller. */
static moe_status make_header(const char *path, const struct moe_st_write_tensor *tensors, size_t count, char **text,
                              size_t *length, uint64_t *data_bytes, struct moe_error *err)
{
    *text = NULL;
    FILE *out = open_memstream(text, length);
    if (!out)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for the header", path);
    fwrite("\0\0\0\0\0\0\0\0", 1, 8, out);
    moe_status status = put_tensors(out, path, tensors, count, data_bytes, err);
    for (long at = ftell(out); at % 8; at++)
        fputc(' ', out);
    bool failed = ferror(out) != 0;
    failed |= fclose(out) != 0;
    if (failed && status == MOE_OK)
        status = moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for the header", path);
    if (status != MOE_OK)
        return status;

    if (*length - 8 > MOE_ST_MAX_HEADER)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: header would have %zu bytes, expected at most %u", path,
                        *length - 8, MOE_ST_MAX_HEADER);
    for (int i = 0; i < 8; i++)
        (*text)[i] = (char)((uint64_t)(*length - 8) >> (8 * i));

    /* Reading it back finds names that no file may have: a duplicate, "__metadata__", bytes that are not UTF-8. */
    cJSON *root;
    status = moe_json_parse(*text + 8, *length - 8, path, &root, err);
    cJSON_Delete(root);
    return status == MOE_ERROR_FILE ? MOE_ERROR_INVALID_ARGUMENT : status;
}

/* ---- The file ---- */

static moe_status write_failed(const char *path, const char *what, struct moe_error *err)
{
    return moe_fail(err, MOE_ERROR_WRITE, "%s: cannot %s: %s", path, what, strerror(errno));
}

static moe_status write_all(const struct moe_st_writer *writer, const void *data, size_t bytes, struct moe_error *err)
{
    const char *from = data;
    while (bytes) {
        ssize_t done = write(writer->fd, from, bytes < (1u << 30) ? bytes : 1u << 30);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return write_failed(writer->path, "write", err);
        from += done;
        bytes -= (size_t)done;
    }
    return MOE_OK;
}

/* Length of the directory part of path, its last slash included; 0 without one. */
static size_t directory_length(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) + 1 : 0;
}

/* Makes .NAME.XXXXXX beside the path, with the permissions that open() would give (mkstemp would give 0600). */
static moe_status open_temporary(struct moe_st_writer *writer, struct moe_error *err)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    size_t directory = directory_length(writer->path), bytes = strlen(writer->path) + sizeof "..XXXXXX";
    writer->temporary = malloc(bytes);
    if (!writer->temporary)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", writer->path);

    for (int attempt = 0; attempt < 100; attempt++) {
        unsigned char random[6];
        char suffix[7] = "";
        if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
            break;
        for (int i = 0; i < 6; i++)
            suffix[i] = letters[random[i] % (sizeof letters - 1)];
        snprintf(writer->temporary, bytes, "%.*s.%s.%s", (int)directory, writer->path, writer->path + directory,
                 suffix);
        writer->fd = open(writer->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (writer->fd >= 0)
            return MOE_OK;
        if (errno != EEXIST)
            break;
    }
    return write_failed(writer->path, "create a temporary file beside it", err);
}

static moe_status check_target(const char *path, struct moe_error *err)
{
    struct stat st;
    size_t directory = directory_length(path);
    if (!path[directory])
        return moe_fail(err, MOE_ERROR_WRITE, "%s: names no file", *path ? path : "output path");
    /* A rename would put a file in the place of a device or a FIFO. */
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return moe_fail(err, MOE_ERROR_WRITE, "%s: is %s, expected a file or nothing", path,
                        S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
    return MOE_OK;
}

static void free_writer(struct moe_st_writer *writer)
{
    free(writer->path);
    free(writer->temporary);
    free(writer);
}

moe_status moe_st_writer_open(const char *path, const struct moe_st_write_tensor *tensors, size_t count,
                              struct moe_st_writer **out, struct moe_error *err)
{
    char *header = NULL;
    size_t length = 0;
    struct moe_st_writer *writer = calloc(1, sizeof *writer);
    *out = NULL;
    if (!writer || !(writer->path = strdup(path))) {
        free(writer);
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", path);
    }
    writer->fd = -1;

    moe_status status = make_header(path, tensors, count, &header, &length, &writer->left, err);
    if (status == MOE_OK)
        status = check_target(path, err);
    if (status == MOE_OK)
        status = open_temporary(writer, err);
    if (status == MOE_OK)
        status = write_all(writer, header, length, err);
    free(header);
    if (status != MOE_OK) {
        moe_st_writer_abort(writer);
        return status;
    }
    *out = writer;
    return MOE_OK;
}

moe_status moe_st_writer_data(struct moe_st_writer *writer, const void *data, size_t bytes, struct moe_error *err)
{
    if (bytes > writer->left)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: %zu bytes of data come, expected at most %llu",
                        writer->path, bytes, (unsigned long long)writer->left);
    writer->left -= bytes;
    return write_all(writer, data, bytes, err);
}

/* Makes the rename last. A file system that cannot sync a directory keeps its own promises. */
static void sync_directory(const char *path)
{
    char *copy = strdup(path);
    if (!copy)
        return;
    size_t length = directory_length(path);
    copy[length] = 0;
    int fd = open(length ? copy : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(copy);
}

moe_status moe_st_writer_commit(struct moe_st_writer *writer, struct moe_error *err)
{
    moe_status status = MOE_OK;
    if (writer->left)
        status = moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: %llu bytes of data did not come", writer->path,
                          (unsigned long long)writer->left);
    else if (fsync(writer->fd))
        status = write_failed(writer->path, "flush", err);
    if (status == MOE_OK) {
        int fd = writer->fd;
        writer->fd = -1; /* whatever close says, the descriptor is gone */
        if (close(fd))
            status = write_failed(writer->path, "close", err);
        else if (rename(writer->temporary, writer->path))
            status = write_failed(writer->path, "rename the temporary file", err);
        if (status != MOE_OK)
            unlink(writer->temporary);
    }
    if (status != MOE_OK) {
        moe_st_writer_abort(writer);
        return status;
    }
    sync_directory(writer->path);
    free_writer(writer);
    return MOE_OK;
}

void moe_st_writer_abort(struct moe_st_writer *writer)
{
    if (!writer)
        return;
    if (writer->fd >= 0) {
        close(writer->fd);
        unlink(writer->temporary);
    }
    free_writer(writer);
}

moe_status moe_st_write(const char *path, const struct moe_st_write_tensor *tensors, size_t count,
                        struct moe_error *err)
{
    struct moe_st_writer *writer;
    moe_status status = moe_st_writer_open(path, tensors, count, &writer, err);
    for (size_t i = 0; i < count && status == MOE_OK; i++) {
        uint64_t bytes = 0;
        moe_st_shape_bytes(moe_st_dtype_by_type(tensors[i].dtype), tensors[i].rank, tensors[i].shape, &bytes);
        if (bytes && !tensors[i].data)
            status =
                moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: tensor '%.200s' has no data", path, tensors[i].name);
        else
            status = moe_st_writer_data(writer, tensors[i].data, (size_t)bytes, err);
    }
    if (status != MOE_OK) {
        moe_st_writer_abort(writer);
        return status;
    }
    return moe_st_writer_commit(writer, err);
}
