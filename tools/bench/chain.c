/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a device that decodes sees of a model: layers of one shape, one after the other, whose weights come from memory
 * each time. So many layers need not fit: they share copies of the weights, as many as fill half of the memory. What is
 * routed is the same in every layer, but to other experts, because the rows of its gate are turned by its place in the
 * chain: so a copy that comes round again is asked for others, and all layers have as much to read.
 */
#include <stdlib.h>

#include "runtime/internal.h"
#include "tools/bench/bench.h"
#include "tools/cli.h"

enum { LEAST_COPIES = 3 };
static const uint64_t memory_share = 2; /* the copies get one part in so many */

struct bench_chain {
    moe_context *ctx;
    int32_t copies;
    moe_layer *packed[BENCH_CHAIN_LAYERS];                /* each owns a copy; the first one is the workload's */
    void *parts[BENCH_CHAIN_LAYERS][MOE_PART_COUNT];      /* row-major copies, likewise */
    uint64_t part_bytes[MOE_PART_COUNT];                  /* of a row-major copy */
    uint64_t copy_bytes;                                  /* of a copy in all its layouts */
    size_t gate_bytes, gate_stride;                       /* of a gate, and from one to the next */
    char *gates;                                          /* [BENCH_CHAIN_LAYERS], on the device */
    moe_layer *layers[BENCH_LAYOUTS][BENCH_CHAIN_LAYERS]; /* a copy's weights, and a gate */
};

static uint64_t part_bytes(const moe_layer_desc *desc, enum moe_part part, moe_layout layout)
{
    const struct moe_weights_view view = moe_part_view(desc, part, layout, NULL);
    return moe_view_bytes(&view);
}

/* As many as memory has room for, in all the layouts at once. */
static moe_status count_copies(struct bench_chain *c, const moe_layer_desc *desc, const bool layouts[BENCH_LAYOUTS],
                               struct moe_error *err)
{
    const uint64_t room = c->ctx->info.memory_bytes / memory_share;
    for (int layout = MOE_LAYOUT_ROW_MAJOR; layout < BENCH_LAYOUTS; layout++) {
        if (layouts[layout])
            c->copy_bytes += part_bytes(desc, MOE_PART_W13, layout) + part_bytes(desc, MOE_PART_W2, layout);
    }
    const uint64_t copies = room / c->copy_bytes;
    c->copies = copies < BENCH_CHAIN_LAYERS ? (int32_t)copies : BENCH_CHAIN_LAYERS;
    if (c->copies >= LEAST_COPIES)
        return MOE_OK;
    char one[32], half[32];
    return moe_fail(err, MOE_ERROR_UNSUPPORTED,
                    "bench: --decode needs %d copies of the layer's weights (%s each), and half of the memory is %s",
                    LEAST_COPIES, cli_show_bytes((double)c->copy_bytes, one, sizeof one),
                    cli_show_bytes((double)room, half, sizeof half));
}

static moe_status copy(moe_context *ctx, void *to, const void *from, uint64_t bytes, struct moe_error *err)
{
    if (ctx->info.device == MOE_DEVICE_CUDA)
        return moe_cuda_copy(ctx->info.device_index, to, from, (size_t)bytes, NULL, err);
    memcpy(to, from, (size_t)bytes);
    return MOE_OK;
}

static moe_status copy_rows(struct bench_chain *c, const struct bench_workload *w, int32_t index, struct moe_error *err)
{
    const void *const from[MOE_PART_COUNT] = {[MOE_PART_W13] = w->weights.w13, [MOE_PART_W2] = w->weights.w2};
    moe_status status = MOE_OK;
    for (int part = MOE_PART_W13; status == MOE_OK && part <= MOE_PART_W2; part++) {
        c->part_bytes[part] = part_bytes(&w->desc, (enum moe_part)part, MOE_LAYOUT_ROW_MAJOR);
        status = bench_weights_alloc(c->ctx, c->part_bytes[part], &c->parts[index][part]);
        if (status == MOE_OK)
            status = copy(c->ctx, c->parts[index][part], from[part], c->part_bytes[part], err);
    }
    return status;
}

static moe_status make_copies(struct bench_chain *c, const struct bench_workload *w, const bool layouts[BENCH_LAYOUTS],
                              struct moe_error *err)
{
    struct cli_progress progress = {.what = "copying the layer"};
    moe_status status = MOE_OK;
    for (int32_t i = 1; status == MOE_OK && i < c->copies; i++) {
        if (layouts[MOE_LAYOUT_ROW_MAJOR])
            status = copy_rows(c, w, i, err);
        if (status == MOE_OK && layouts[MOE_LAYOUT_PACKED])
            status = moe_layer_pack(w->layers[MOE_LAYOUT_ROW_MAJOR], &c->packed[i]);
        cli_progress_update(&progress, (uint64_t)i * c->copy_bytes, (uint64_t)(c->copies - 1) * c->copy_bytes);
    }
    cli_progress_end(&progress);
    return status;
}

/* The weights that a layer reads, but for its gate. */
static moe_status weights_of(const struct bench_chain *c, const struct bench_workload *w, moe_layout layout,
                             int32_t index, moe_layer_weights *weights)
{
    *weights = moe_layer_weights_init();
    if (layout == MOE_LAYOUT_PACKED)
        return moe_layer_weights_get(index > 0 ? c->packed[index] : w->layers[layout], weights);
    weights->layout = layout;
    weights->w13 = index > 0 ? c->parts[index][MOE_PART_W13] : w->weights.w13;
    weights->w2 = index > 0 ? c->parts[index][MOE_PART_W2] : w->weights.w2;
    return MOE_OK;
}

static moe_status make_layers(struct bench_chain *c, const struct bench_workload *w, moe_layout layout)
{
    moe_status status = MOE_OK;
    for (int32_t i = 0; status == MOE_OK && i < BENCH_CHAIN_LAYERS; i++) {
        moe_layer_weights weights;
        status = weights_of(c, w, layout, i % c->copies, &weights);
        weights.gate = c->gates + (size_t)i * c->gate_stride;
        if (status == MOE_OK)
            status = moe_layer_create(c->ctx, &w->desc, &weights, &c->layers[layout][i]);
    }
    return status;
}

moe_status bench_chain_create(struct bench_workload *w, const bool layouts[BENCH_LAYOUTS], struct moe_error *err)
{
    struct bench_chain *c = w->chain = calloc(1, sizeof *c);
    if (!c)
        return MOE_ERROR_OUT_OF_MEMORY;
    c->ctx = w->ctx;
    c->gate_bytes = (size_t)cli_gate_bytes(&w->desc);
    c->gate_stride = (c->gate_bytes + MOE_WORKSPACE_ALIGNMENT - 1) / MOE_WORKSPACE_ALIGNMENT * MOE_WORKSPACE_ALIGNMENT;
    moe_status status = count_copies(c, &w->desc, layouts, err);
    if (status == MOE_OK)
        status = moe_buffer_alloc(c->ctx, BENCH_CHAIN_LAYERS * c->gate_stride, (void **)&c->gates);
    if (status == MOE_OK)
        status = make_copies(c, w, layouts, err);
    for (int layout = MOE_LAYOUT_ROW_MAJOR; status == MOE_OK && layout < BENCH_LAYOUTS; layout++) {
        if (layouts[layout])
            status = make_layers(c, w, (moe_layout)layout);
    }
    return status == MOE_OK ? bench_chain_route(c, w) : status;
}

moe_status bench_chain_route(struct bench_chain *c, const struct bench_workload *w)
{
    char *gate = malloc(c->gate_bytes);
    if (!gate)
        return MOE_ERROR_OUT_OF_MEMORY;
    moe_status status = moe_copy_out(c->ctx, gate, w->weights.gate, c->gate_bytes, NULL);
    const size_t experts = (size_t)w->desc.num_experts, row = c->gate_bytes / experts;
    for (size_t i = 0; status == MOE_OK && i < BENCH_CHAIN_LAYERS; i++) {
        char *to = c->gates + i * c->gate_stride;
        const size_t turned = i % experts * row, rest = c->gate_bytes - turned;
        status = moe_copy_in(c->ctx, to + turned, gate, rest, NULL);
        if (status == MOE_OK)
            status = moe_copy_in(c->ctx, to, gate + rest, turned, NULL);
    }
    free(gate);
    return status;
}

const moe_layer *bench_chain_layer(const struct bench_chain *c, moe_layout layout, int32_t place)
{
    return c->layers[layout][place];
}

int32_t bench_chain_copies(const struct bench_chain *c)
{
    return c->copies;
}

void bench_chain_free(struct bench_chain *c)
{
    if (!c)
        return;
    for (int i = 0; i < BENCH_CHAIN_LAYERS; i++) {
        for (int layout = 0; layout < BENCH_LAYOUTS; layout++)
            moe_layer_destroy(c->layers[layout][i]);
        moe_layer_destroy(c->packed[i]);
        for (int part = 0; part < MOE_PART_COUNT; part++)
            bench_weights_free(c->ctx, c->parts[i][part], c->part_bytes[part]);
    }
    moe_buffer_free(c->ctx, c->gates);
    free(c);
}
