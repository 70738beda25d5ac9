/* SPDX-License-Identifier: Apache-2.0 */
/* A layer of random weights and the tokens that it routes as the user asked. */
#include <math.h>
#include <stdlib.h>

#include "config/convert.h"
#include "kernels/cpu/pool.h"
#include "runtime/load.h"
#include "tools/bench/bench.h"
#include "tools/cli.h"
#include "tools/normal.h"

enum { SEED = 1, CHUNK_BYTES = 16 << 20 };

#define SHAPE(...) {__VA_ARGS__},
static const struct bench_shape shapes[] = {BENCH_SHAPE_MAP(SHAPE, SHAPE)};
#undef SHAPE

const struct bench_shape *bench_shape_at(size_t i)
{
    return i < sizeof shapes / sizeof *shapes ? &shapes[i] : NULL;
}

const struct bench_shape *bench_shape_find(const char *name)
{
    for (size_t i = 0; bench_shape_at(i); i++) {
        if (strcmp(name, shapes[i].name) == 0)
            return &shapes[i];
    }
    return NULL;
}

moe_status bench_weights_alloc(moe_context *ctx, uint64_t bytes, void **pointer)
{
    if (ctx->info.device == MOE_DEVICE_CUDA)
        return moe_buffer_alloc(ctx, (size_t)bytes, pointer);
    struct moe_error err;
    moe_status status = moe_host_alloc(bytes, pointer);
    if (status == MOE_OK)
        return MOE_OK;
    moe_fail(&err, status, "cannot allocate %llu bytes of memory for weights", (unsigned long long)bytes);
    return moe_context_report(ctx, status, &err);
}

void bench_weights_free(moe_context *ctx, void *pointer, uint64_t bytes)
{
    if (ctx->info.device == MOE_DEVICE_CUDA)
        moe_buffer_free(ctx, pointer);
    else
        moe_host_free(pointer, bytes);
}

struct chunk {
    const struct normal *stream;
    int64_t first, count;
    char *to;
};

/* Each thread of the pool makes its share of a chunk: a multiple of 4 elements, as normal_fill asks. */
static void fill_share(void *argument, int32_t thread, int32_t threads)
{
    const struct chunk *chunk = argument;
    int64_t share = (chunk->count / threads + 4) / 4 * 4;
    int64_t at = thread * share, left = chunk->count - at;
    if (left > 0)
        normal_fill(chunk->stream, (uint64_t)(chunk->first + at), left < share ? left : share,
                    chunk->to + (size_t)at * moe_dtype_size(chunk->stream->dtype));
}

/* count normal elements on the device. */
static moe_status fill(moe_context *ctx, void *device, moe_dtype dtype, int64_t count, double deviation,
                       const char *name)
{
    struct normal *stream = malloc(sizeof *stream);
    bool staged = ctx->info.device == MOE_DEVICE_CUDA;
    char *stage = staged ? malloc(CHUNK_BYTES) : NULL;
    moe_status status = stream && (stage || !staged) ? MOE_OK : MOE_ERROR_OUT_OF_MEMORY;
    int64_t size = (int64_t)moe_dtype_size(dtype), step = CHUNK_BYTES / size;
    if (status == MOE_OK) {
        normal_init(stream, dtype, deviation);
        normal_seek(stream, SEED, name);
    }
    struct cli_progress progress = {.what = name};
    for (int64_t done = 0; status == MOE_OK && done < count; done += step) {
        int64_t n = count - done < step ? count - done : step;
        char *place = (char *)device + done * size;
        struct chunk chunk = {stream, done, n, staged ? stage : place};
        moe_pool_run(ctx->exec.pool, fill_share, &chunk);
        if (staged)
            status = moe_copy_in(ctx, place, stage, (size_t)(n * size), NULL);
        cli_progress_update(&progress, (uint64_t)((done + n) * size), (uint64_t)(count * size));
    }
    cli_progress_end(&progress);
    free(stage);
    free(stream);
    return status;
}

/*
 * Skewed routing by the router itself: element 0 of every biased hidden state is 1 (bench_workload_tokens), so that
 * column 0 of the gate is a bias on the logits.
 */
static double logit_bias(enum bench_routing routing, int32_t expert, int32_t top_k)
{
    switch (routing) {
    case BENCH_ZIPF:
        return -log(1.0 + expert);
    case BENCH_SINGLE:
        return expert < top_k ? 32 : 0;
    default:
        return 0;
    }
}

static moe_status bias_gate(moe_context *ctx, void *gate, const moe_layer_desc *desc, enum bench_routing routing)
{
    size_t size = moe_dtype_size(desc->gate_dtype), row = (size_t)desc->hidden_size * size;
    moe_status status = MOE_OK;
    for (int32_t e = 0; status == MOE_OK && e < desc->num_experts; e++) {
        float value;
        moe_store_f32(&value, desc->gate_dtype, 0, (float)logit_bias(routing, e, desc->top_k));
        status = moe_copy_in(ctx, (char *)gate + (size_t)e * row, &value, size, NULL);
    }
    return status;
}

/* What the workload says of its row-major layer. */
static moe_status describe(struct bench_workload *w)
{
    const moe_layer *layer = w->layers[MOE_LAYOUT_ROW_MAJOR];
    w->desc = moe_layer_desc_init(MOE_DTYPE_NONE);
    w->weights = moe_layer_weights_init();
    moe_status status = moe_layer_describe(layer, &w->desc);
    return status == MOE_OK ? moe_layer_weights_get(layer, &w->weights) : status;
}

moe_status bench_workload_create(struct bench_workload *w, moe_context *ctx, const struct bench_shape *shape,
                                 moe_dtype dtype, enum bench_routing routing)
{
    memset(w, 0, sizeof *w);
    w->ctx = ctx;
    moe_layer_desc desc = moe_layer_desc_init(dtype);
    desc.hidden_size = shape->hidden;
    desc.intermediate_size = shape->intermediate;
    desc.num_experts = shape->experts;
    desc.top_k = shape->top_k;

    int64_t h = desc.hidden_size, i = desc.intermediate_size, e = desc.num_experts;
    const struct {
        const char *name;
        int64_t count;
        double deviation;
    } parts[MOE_PART_COUNT] = {[MOE_PART_GATE] = {"making the gate", e * h, 1 / sqrt((double)h)},
                               [MOE_PART_W13] = {"making w13", 2 * e * i * h, 1 / sqrt((double)h)},
                               [MOE_PART_W2] = {"making w2", e * h * i, 1 / sqrt((double)i)}};
    moe_status status = MOE_OK;
    for (int p = 0; status == MOE_OK && p < MOE_PART_COUNT; p++) {
        w->part_bytes[p] = (uint64_t)parts[p].count * moe_dtype_size(dtype);
        status = bench_weights_alloc(ctx, w->part_bytes[p], &w->parts[p]);
        if (status == MOE_OK)
            status = fill(ctx, w->parts[p], dtype, parts[p].count, parts[p].deviation, parts[p].name);
    }
    if (status == MOE_OK && routing != BENCH_UNIFORM)
        status = bias_gate(ctx, w->parts[MOE_PART_GATE], &desc, routing);

    moe_layer_weights weights = moe_layer_weights_init();
    weights.gate = w->parts[MOE_PART_GATE];
    weights.w13 = w->parts[MOE_PART_W13];
    weights.w2 = w->parts[MOE_PART_W2];
    if (status == MOE_OK)
        status = moe_layer_create(ctx, &desc, &weights, &w->layers[MOE_LAYOUT_ROW_MAJOR]);
    return status == MOE_OK ? describe(w) : status;
}

moe_status bench_workload_adopt(struct bench_workload *w, moe_context *ctx, moe_layer *layer)
{
    memset(w, 0, sizeof *w);
    w->ctx = ctx;
    w->layers[MOE_LAYOUT_ROW_MAJOR] = layer;
    return describe(w);
}

moe_status bench_workload_pack(struct bench_workload *w)
{
    return moe_layer_pack(w->layers[MOE_LAYOUT_ROW_MAJOR], &w->layers[MOE_LAYOUT_PACKED]);
}

moe_status bench_workload_route(struct bench_workload *w, enum bench_routing routing)
{
    moe_status status = bias_gate(w->ctx, w->parts[MOE_PART_GATE], &w->desc, routing);
    return status == MOE_OK && w->chain ? bench_chain_route(w->chain, w) : status;
}

moe_status bench_workload_tokens(struct bench_workload *w, int64_t max_tokens, bool biased)
{
    moe_dtype dtype = w->desc.dtype;
    int64_t h = w->desc.hidden_size;
    size_t row = (size_t)h * moe_dtype_size(dtype), bytes = (size_t)max_tokens * row;
    size_t slots = (size_t)max_tokens * (size_t)w->desc.top_k;
    moe_status status = moe_buffer_alloc(w->ctx, bytes, &w->hidden_states);
    if (status == MOE_OK)
        status = moe_buffer_alloc(w->ctx, bytes, &w->output);
    if (status == MOE_OK)
        status = moe_buffer_alloc(w->ctx, slots * sizeof *w->ids, (void **)&w->ids);
    if (status == MOE_OK)
        status = moe_buffer_alloc(w->ctx, slots * sizeof *w->topk_weights, (void **)&w->topk_weights);
    if (status == MOE_OK)
        status = fill(w->ctx, w->hidden_states, dtype, max_tokens * h, 1, "making tokens");
    float one;
    moe_store_f32(&one, dtype, 0, 1);
    for (int64_t t = 0; status == MOE_OK && biased && t < max_tokens; t++)
        status = moe_copy_in(w->ctx, (char *)w->hidden_states + (size_t)t * row, &one, moe_dtype_size(dtype), NULL);
    return status;
}

void bench_workload_free(struct bench_workload *w)
{
    if (!w->ctx)
        return;
    bench_chain_free(w->chain);
    for (int layout = 0; layout < BENCH_LAYOUTS; layout++)
        moe_layer_destroy(w->layers[layout]);
    for (int p = 0; p < MOE_PART_COUNT; p++)
        bench_weights_free(w->ctx, w->parts[p], w->part_bytes[p]);
    moe_buffer_free(w->ctx, w->hidden_states);
    moe_buffer_free(w->ctx, w->output);
    moe_buffer_free(w->ctx, w->ids);
    moe_buffer_free(w->ctx, w->topk_weights);
    memset(w, 0, sizeof *w);
}

/* Lists the experts that the workload's ids name. */
static moe_status count_touched(struct bench_point *p, const struct bench_workload *w)
{
    int32_t *ids = malloc((size_t)p->rows * sizeof *ids);
    if (!ids)
        return MOE_ERROR_OUT_OF_MEMORY;
    moe_status status = moe_copy_out(w->ctx, ids, w->ids, (size_t)p->rows * sizeof *ids, NULL);
    bool seen[MOE_MAX_EXPERTS] = {false};
    for (int64_t i = 0; status == MOE_OK && i < p->rows; i++) {
        if (ids[i] >= 0 && ids[i] < w->desc.num_experts)
            seen[ids[i]] = true;
    }
    p->touched = 0;
    for (int32_t e = 0; e < w->desc.num_experts; e++) {
        if (seen[e])
            p->touched_ids[p->touched++] = e;
    }
    free(ids);
    return status;
}

/* Has the layer route the point's tokens, and lists the experts. */
static moe_status route(struct bench_point *p, const struct bench_workload *w, const moe_layer *layer)
{
    moe_limits limits = moe_limits_init();
    limits.max_tokens = p->tokens;
    size_t bytes;
    void *workspace = NULL;
    moe_status status = moe_workspace_size(layer, &limits, &bytes);
    if (status == MOE_OK)
        status = moe_buffer_alloc(w->ctx, bytes, &workspace);
    moe_batch batch = moe_batch_init();
    batch.tokens = p->tokens;
    batch.dtype = w->desc.dtype;
    batch.hidden_states = w->hidden_states;
    batch.topk_ids_out = w->ids;
    batch.topk_weights_out = w->topk_weights;
    if (status == MOE_OK)
        status = moe_route(layer, &batch, workspace, bytes, NULL);
    if (status == MOE_OK)
        status = moe_synchronize(w->ctx, NULL);
    moe_buffer_free(w->ctx, workspace);
    return status == MOE_OK ? count_touched(p, w) : status;
}

/* All layers of the chain touch equally many experts, but for ties between logits, which go to the lowest id. */
static moe_status route_chain(struct bench_point *p, const struct bench_workload *w)
{
    const moe_layout layout =
        bench_chain_layer(w->chain, MOE_LAYOUT_PACKED, 0) ? MOE_LAYOUT_PACKED : MOE_LAYOUT_ROW_MAJOR;
    moe_status status = MOE_OK;
    p->chain_touched = 0;
    for (int32_t i = 0; status == MOE_OK && i < BENCH_CHAIN_LAYERS; i++) {
        status = route(p, w, bench_chain_layer(w->chain, layout, i));
        p->chain_touched += (double)p->touched / BENCH_CHAIN_LAYERS;
    }
    return status;
}

moe_status bench_point_set(struct bench_point *p, const struct bench_workload *w, int64_t tokens)
{
    const moe_layer_desc *d = &w->desc;
    p->tokens = tokens;
    p->rows = tokens * d->top_k;
    p->hidden = d->hidden_size;
    p->intermediate = d->intermediate_size;
    p->dtype = d->dtype;
    p->w13 = w->weights.w13;
    p->w2 = w->weights.w2;
    p->matrix_bytes = (uint64_t)d->hidden_size * (uint64_t)d->intermediate_size * moe_dtype_size(d->dtype);

    moe_status status = w->chain ? route_chain(p, w) : MOE_OK;
    if (status == MOE_OK) /* last: its ids stay in the workload, and its experts in the point */
        status = route(p, w, w->layers[MOE_LAYOUT_ROW_MAJOR]);

    double t = (double)tokens, h = (double)d->hidden_size, i = (double)d->intermediate_size, e = d->num_experts;
    p->weight_bytes = (double)p->touched * (double)cli_expert_bytes(d) + (double)cli_gate_bytes(d);
    p->activation_bytes = 2 * t * h * (double)moe_dtype_size(d->dtype);
    p->flops = 6 * (double)p->rows * h * i + 2 * t * h * e;
    return status;
}
