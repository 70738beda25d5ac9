/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/runner.h"

#include <stdlib.h>

#include "tools/cli.h"

moe_status runner_init(struct runner *r, moe_context *ctx, const moe_layer *layer, moe_path wanted)
{
    memset(r, 0, sizeof *r);
    r->ctx = ctx;
    r->layer = layer;
    r->wanted = wanted;
    r->desc = moe_layer_desc_init(MOE_DTYPE_NONE);
    return moe_layer_describe(layer, &r->desc);
}

void runner_free(struct runner *r)
{
    struct runner_buffer *device[] = {&r->x,      &r->ids,     &r->weights,     &r->output,
                                      &r->logits, &r->ids_out, &r->weights_out, &r->workspace};
    for (size_t i = 0; r->ctx && i < sizeof device / sizeof device[0]; i++)
        moe_buffer_free(r->ctx, device[i]->data);
    free(r->host_output.data);
    free(r->host_logits.data);
    free(r->host_ids.data);
    free(r->host_weights.data);
    memset(r, 0, sizeof *r);
}

/* At least `bytes`, and never none, so that the pointer of an empty batch is not NULL. */
static moe_status grow(struct runner *r, struct runner_buffer *buffer, size_t bytes)
{
    bytes += bytes == 0;
    if (bytes <= buffer->bytes)
        return MOE_OK;
    moe_buffer_free(r->ctx, buffer->data);
    buffer->data = NULL;
    buffer->bytes = 0;
    moe_status status = moe_buffer_alloc(r->ctx, bytes, &buffer->data);
    if (status == MOE_OK)
        buffer->bytes = bytes;
    return status;
}

static moe_status copy_in(struct runner *r, struct runner_buffer *buffer, const void *host, size_t bytes)
{
    moe_status status = grow(r, buffer, bytes);
    return status == MOE_OK ? moe_copy_in(r->ctx, buffer->data, host, bytes, NULL) : status;
}

static moe_status load_routing(struct runner *r, const struct host_batch *b)
{
    size_t ids = (size_t)b->tokens * (size_t)b->top_k;
    moe_status status = copy_in(r, &r->ids, b->topk_ids, ids * moe_dtype_size(b->ids_dtype));
    if (status == MOE_OK)
        status = copy_in(r, &r->weights, b->topk_weights, ids * sizeof(float));
    r->batch.topk_ids = r->ids.data;
    r->batch.topk_weights = r->weights.data;
    r->batch.ids_dtype = b->ids_dtype;
    r->batch.top_k = b->top_k;
    return status;
}

static moe_status prepare_routing(struct runner *r, const struct host_batch *b)
{
    size_t slots = (size_t)b->tokens * (size_t)r->desc.top_k;
    moe_status status = grow(r, &r->logits, (size_t)b->tokens * (size_t)r->desc.num_experts * sizeof(float));
    if (status == MOE_OK)
        status = grow(r, &r->ids_out, slots * sizeof(int32_t));
    if (status == MOE_OK)
        status = grow(r, &r->weights_out, slots * sizeof(float));
    r->batch.router_logits_out = r->logits.data;
    r->batch.topk_ids_out = r->ids_out.data;
    r->batch.topk_weights_out = r->weights_out.data;
    return status;
}

moe_status runner_load(struct runner *r, const struct host_batch *b)
{
    size_t bytes = (size_t)b->tokens * (size_t)b->hidden * moe_dtype_size(b->dtype);
    moe_status status = moe_path_choose(r->layer, r->wanted, b->tokens, &r->path, r->reason, sizeof r->reason);
    if (status != MOE_OK)
        return status;
    r->batch = moe_batch_init();
    r->routes = !b->topk_ids;
    status = copy_in(r, &r->x, b->hidden_states, bytes);
    if (status == MOE_OK)
        status = grow(r, &r->output, bytes);
    if (status == MOE_OK)
        status = r->routes ? prepare_routing(r, b) : load_routing(r, b);

    moe_limits limits = moe_limits_init();
    limits.max_tokens = b->tokens;
    limits.top_k = r->batch.top_k;
    limits.path = r->path;
    size_t workspace = 0;
    if (status == MOE_OK)
        status = moe_workspace_size(r->layer, &limits, &workspace);
    if (status == MOE_OK)
        status = grow(r, &r->workspace, workspace);
    r->batch.tokens = b->tokens;
    r->batch.dtype = b->dtype;
    r->batch.hidden_states = r->x.data;
    r->batch.output = r->output.data;
    r->batch.path = r->path;
    return status;
}

moe_status runner_run(struct runner *r)
{
    moe_status status = r->routes
                            ? moe_forward(r->layer, &r->batch, r->workspace.data, r->workspace.bytes, NULL)
                            : moe_experts_forward(r->layer, &r->batch, r->workspace.data, r->workspace.bytes, NULL);
    return status == MOE_OK ? moe_synchronize(r->ctx, NULL) : status;
}

static moe_status copy_out(struct runner *r, struct runner_buffer *host, const void *device, size_t bytes)
{
    if (bytes > host->bytes || !host->data) {
        free(host->data);
        host->data = malloc(bytes + (bytes == 0));
        host->bytes = host->data ? bytes : 0;
        if (!host->data)
            return MOE_ERROR_OUT_OF_MEMORY;
    }
    return moe_copy_out(r->ctx, host->data, device, bytes, NULL);
}

moe_status runner_fetch(struct runner *r, struct runner_result *result)
{
    size_t tokens = (size_t)r->batch.tokens, slots = tokens * (size_t)r->desc.top_k;
    memset(result, 0, sizeof *result);
    moe_status status = copy_out(r, &r->host_output, r->output.data,
                                 tokens * (size_t)r->desc.hidden_size * moe_dtype_size(r->batch.dtype));
    result->output = r->host_output.data;
    if (status != MOE_OK || !r->routes)
        return status;
    status = copy_out(r, &r->host_logits, r->logits.data, tokens * (size_t)r->desc.num_experts * sizeof(float));
    if (status == MOE_OK)
        status = copy_out(r, &r->host_ids, r->ids_out.data, slots * sizeof(int32_t));
    if (status == MOE_OK)
        status = copy_out(r, &r->host_weights, r->weights_out.data, slots * sizeof(float));
    result->router_logits = r->host_logits.data;
    result->topk_ids = r->host_ids.data;
    result->topk_weights = r->host_weights.data;
    return status;
}

uint64_t runner_weight_bytes(const moe_layer_desc *desc, const void *ids, moe_dtype ids_dtype, int64_t count,
                             bool routes)
{
    bool seen[MOE_MAX_EXPERTS] = {false};
    uint64_t distinct = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t id = ids_dtype == MOE_I64 ? ((const int64_t *)ids)[i] : ((const int32_t *)ids)[i];
        if (id >= 0 && id < desc->num_experts && !seen[id]) {
            seen[id] = true;
            distinct++;
        }
    }
    return distinct * cli_expert_bytes(desc) + (routes && count > 0 ? cli_gate_bytes(desc) : 0);
}
