/* SPDX-License-Identifier: Apache-2.0 */
#include "models/safetensors.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/json.h"
#include "config/output.h"
#include "models/st_dtypes.h"

struct moe_st_writer {
    char *path; /* for messages */
    struct moe_output *output;
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

static void free_writer(struct moe_st_writer *writer)
{
    free(writer->path);
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

    moe_status status = make_header(path, tensors, count, &header, &length, &writer->left, err);
    if (status == MOE_OK)
        status = moe_output_open(path, &writer->output, err);
    if (status == MOE_OK)
        status = moe_output_write(writer->output, header, length, err);
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
    return moe_output_write(writer->output, data, bytes, err);
}

moe_status moe_st_writer_commit(struct moe_st_writer *writer, struct moe_error *err)
{
    if (writer->left) {
        moe_status status = moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: %llu bytes of data did not come",
                                     writer->path, (unsigned long long)writer->left);
        moe_st_writer_abort(writer);
        return status;
    }
    moe_status status = moe_output_commit(writer->output, err);
    free_writer(writer);
    return status;
}

void moe_st_writer_abort(struct moe_st_writer *writer)
{
    if (!writer)
        return;
    moe_output_abort(writer->output);
    free_writer(writer);
}

moe_status moe_st_writer_finish(struct moe_st_writer *writer, const struct moe_st_write_tensor *tensors, size_t count,
                                struct moe_error *err)
{
    moe_status status = MOE_OK;
    for (size_t i = 0; i < count && status == MOE_OK; i++) {
        uint64_t bytes = 0;
        moe_st_shape_bytes(moe_st_dtype_by_type(tensors[i].dtype), tensors[i].rank, tensors[i].shape, &bytes);
        if (bytes && !tensors[i].data)
            status = moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: tensor '%.200s' has no data", writer->path,
                              tensors[i].name);
        else
            status = moe_st_writer_data(writer, tensors[i].data, (size_t)bytes, err);
    }
    if (status == MOE_OK)
        return moe_st_writer_commit(writer, err);
    moe_st_writer_abort(writer);
    return status;
}

moe_status moe_st_write(const char *path, const struct moe_st_write_tensor *tensors, size_t count,
                        struct moe_error *err)
{
    struct moe_st_writer *writer;
    moe_status status = moe_st_writer_open(path, tensors, count, &writer, err);
    return status == MOE_OK ? moe_st_writer_finish(writer, tensors, count, err) : status;
}
