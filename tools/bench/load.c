/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loading a layer, against what any program could do with a loop around pread: the same bytes, in file order, by one
 * thread, into fresh memory of the same kind. On a GPU that loop fills a host buffer and copies it to the device. Both
 * take turns; the files were read once before, so that the page cache holds them.
 */
#include <stdio.h>
#include <stdlib.h>

#include "runtime/load.h"
#include "tools/bench/bench.h"
#include "tools/cli.h"

enum { COPY_BYTES = 16 << 20 };

struct trial {
    moe_context *ctx;
    moe_checkpoint *checkpoint;
    int32_t layer;
    struct moe_layer_source source;
    uint64_t bytes; /* of the layer */
    void *chunk;    /* [COPY_BYTES] on the host, for a GPU */
};

static moe_status read_segment(const struct trial *t, const struct moe_segment *segment, char *to,
                               struct moe_error *err)
{
    if (!t->chunk)
        return moe_segment_read(segment, 0, to, segment->bytes, err);
    moe_status status = MOE_OK;
    for (uint64_t at = 0; status == MOE_OK && at < segment->bytes; at += COPY_BYTES) {
        uint64_t n = segment->bytes - at < COPY_BYTES ? segment->bytes - at : COPY_BYTES;
        status = moe_segment_read(segment, at, t->chunk, n, err);
        if (status == MOE_OK)
            status = moe_copy_in(t->ctx, to + at, t->chunk, (size_t)n, NULL);
    }
    return status == MOE_OK ? moe_synchronize(t->ctx, NULL) : status;
}

static moe_status time_plain(const struct trial *t, double *seconds, struct moe_error *err)
{
    void *parts[MOE_PART_COUNT] = {NULL};
    moe_status status = MOE_OK;
    double start = cli_now();
    for (int p = 0; status == MOE_OK && p < MOE_PART_COUNT; p++)
        status = bench_weights_alloc(t->ctx, t->source.part_bytes[p], &parts[p]);
    for (size_t i = 0; status == MOE_OK && i < t->source.segment_count; i++) {
        const struct moe_segment *segment = &t->source.segments[i];
        status = read_segment(t, segment, (char *)parts[segment->part] + segment->part_offset, err);
    }
    *seconds = cli_now() - start;
    for (int p = 0; p < MOE_PART_COUNT; p++)
        bench_weights_free(t->ctx, parts[p], t->source.part_bytes[p]);
    return status;
}

static moe_status time_load(const struct trial *t, double *seconds)
{
    moe_layer *layer = NULL;
    double start = cli_now();
    moe_status status = moe_layer_load(t->checkpoint, t->layer, NULL, &layer);
    *seconds = cli_now() - start;
    moe_layer_destroy(layer);
    return status;
}

static moe_status open_trial(struct trial *t, struct moe_error *err)
{
    moe_status status = moe_model_layer(t->checkpoint->model, t->layer, &t->source, err);
    for (size_t i = 0; status == MOE_OK && i < t->source.segment_count; i++)
        t->bytes += t->source.segments[i].bytes;
    if (status == MOE_OK && t->ctx->info.device == MOE_DEVICE_CUDA)
        status = moe_host_alloc(COPY_BYTES, &t->chunk);
    return status;
}

moe_status bench_load(struct bench_load *result, moe_context *ctx, moe_checkpoint *checkpoint, int32_t layer,
                      int64_t reps, struct moe_error *err)
{
    struct trial t = {.ctx = ctx, .checkpoint = checkpoint, .layer = layer};
    double *plain = calloc((size_t)reps, sizeof *plain), *load = calloc((size_t)reps, sizeof *load), first;
    moe_status status = plain && load ? open_trial(&t, err) : MOE_ERROR_OUT_OF_MEMORY;
    if (status == MOE_OK)
        status = time_plain(&t, &first, err); /* fills the page cache */
    struct cli_progress progress = {.what = "loading"};
    for (int64_t i = 0; status == MOE_OK && i < reps; i++) {
        status = time_plain(&t, &plain[i], err);
        if (status == MOE_OK)
            status = time_load(&t, &load[i]);
        cli_progress_update(&progress, (uint64_t)(i + 1) * t.bytes, (uint64_t)reps * t.bytes);
    }
    cli_progress_end(&progress);
    if (status == MOE_OK)
        *result = (struct bench_load){t.bytes, bench_time_of(plain, (int32_t)reps), bench_time_of(load, (int32_t)reps)};
    moe_layer_source_free(&t.source);
    moe_host_free(t.chunk, COPY_BYTES);
    free(plain);
    free(load);
    return status;
}
