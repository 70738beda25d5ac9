/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/synth_fill.h"

#include <math.h>
#include <stdlib.h>

enum { BUFFER_BYTES = 16 << 20, FILL_ELEMENTS = 1 << 16 };

/* A piece of a tensor. */
struct piece {
    struct moe_pool *pool;
    const struct normal *stream;
    uint64_t first;
    int64_t count;
    char *to;
};

static void fill_thread(void *argument, int32_t thread, int32_t threads)
{
    const struct piece *piece = argument;
    size_t element = moe_dtype_size(piece->stream->dtype);
    (void)thread;
    (void)threads;
    for (;;) {
        int64_t at = moe_pool_next(piece->pool, FILL_ELEMENTS);
        if (at >= piece->count)
            return;
        int64_t n = piece->count - at < FILL_ELEMENTS ? piece->count - at : FILL_ELEMENTS;
        normal_fill(piece->stream, piece->first + (uint64_t)at, n, piece->to + (size_t)at * element);
    }
}

bool synth_fill_init(struct synth_fill *fill, const moe_layer_desc *desc, int64_t threads)
{
    const double deviations[SYNTH_STREAMS] = {1 / sqrt((double)desc->hidden_size),
                                              1 / sqrt((double)desc->intermediate_size), 1};
    for (int i = 0; i < SYNTH_STREAMS; i++) {
        fill->streams[i] = malloc(sizeof *fill->streams[i]);
        if (!fill->streams[i])
            return false;
        normal_init(fill->streams[i], desc->dtype, deviations[i]);
    }
    fill->buffer = malloc(BUFFER_BYTES);
    return fill->buffer && moe_pool_create((int32_t)threads, &fill->pool) == MOE_OK;
}

void synth_fill_free(struct synth_fill *fill)
{
    for (int i = 0; i < SYNTH_STREAMS; i++)
        free(fill->streams[i]);
    free(fill->buffer);
    moe_pool_destroy(fill->pool);
}

static moe_status write_tensor(struct synth_fill *fill, struct moe_st_writer *writer,
                               const struct moe_st_write_tensor *tensor, enum synth_stream which, struct moe_error *err)
{
    struct normal *stream = fill->streams[which];
    size_t element = moe_dtype_size(tensor->dtype);
    int64_t count = tensor->shape[0] * tensor->shape[1], room = (int64_t)(BUFFER_BYTES / element);
    normal_seek(stream, (uint64_t)fill->seed, tensor->name);
    for (int64_t at = 0; at < count; at += room) {
        const struct piece piece = {fill->pool, stream, (uint64_t)at, count - at < room ? count - at : room,
                                    fill->buffer};
        moe_pool_run(fill->pool, fill_thread, (void *)&piece);
        size_t bytes = (size_t)piece.count * element;
        moe_status status = moe_st_writer_data(writer, fill->buffer, bytes, err);
        if (status == MOE_OK && *fill->stop != 0)
            status = moe_fail(err, MOE_ERROR_WRITE, "interrupted");
        if (status != MOE_OK)
            return status;
        fill->bytes += bytes;
        cli_progress_update(&fill->progress, fill->bytes, fill->bytes_total);
    }
    return MOE_OK;
}

moe_status synth_fill_file(struct synth_fill *fill, const char *path, const struct moe_st_write_tensor *tensors,
                           const enum synth_stream *streams, size_t count, struct moe_error *err)
{
    struct moe_st_writer *writer = NULL;
    moe_status status = moe_st_writer_open(path, tensors, count, &writer, err);
    if (status != MOE_OK)
        return status;
    for (size_t i = 0; status == MOE_OK && i < count; i++)
        status = write_tensor(fill, writer, &tensors[i], streams[i], err);
    if (status == MOE_OK)
        return moe_st_writer_commit(writer, err);
    moe_st_writer_abort(writer);
    return status;
}
