/* SPDX-License-Identifier: Apache-2.0 */
/* From what the caller gave to what the steps read: every check that a forward needs is here, before anything runs. */
#include "config/convert.h"
#include "runtime/internal.h"

bool moe_rows_ok(int64_t tokens, int32_t slots, struct moe_error *err)
{
    if (tokens < 0 || tokens > INT32_MAX) {
        moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "tokens is %lld, expected 0 to %d", (long long)tokens, INT32_MAX);
        return false;
    }
    if (slots < 1 || slots > MOE_MAX_TOP_K) {
        moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "top_k is %d, expected 1 to %d", (int)slots, MOE_MAX_TOP_K);
        return false;
    }
    if (tokens * slots > INT32_MAX) {
        moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "tokens * top_k is %lld, expected at most %d: split the batch",
                 (long long)tokens * slots, INT32_MAX);
        return false;
    }
    return true;
}

void moe_call_shape(struct moe_call *call, const moe_layer *layer, int64_t tokens, int32_t slots, moe_dtype io_dtype)
{
    const moe_layer_desc *d = &layer->desc;
    const moe_layer_weights *w = &layer->weights;
    *call = (struct moe_call){
        .exec = &layer->ctx->exec,
        .tokens = tokens,
        .hidden = d->hidden_size,
        .intermediate = d->intermediate_size,
        .slots = slots,
        .dtype = d->dtype,
        .activation = d->activation,
        .w13 = moe_part_view(d, MOE_PART_W13, w->layout, w->w13),
        .w2 = moe_part_view(d, MOE_PART_W2, w->layout, w->w2),
        .io_dtype = io_dtype,
        .gate = {.tokens = tokens,
                 .hidden = d->hidden_size,
                 .experts = d->num_experts,
                 .top_k = d->top_k,
                 .x_dtype = d->dtype,
                 .gate_dtype = d->gate_dtype,
                 .logits_dtype = d->logits_dtype,
                 .topk_weight_dtype = d->topk_weight_dtype,
                 .renormalize = d->renormalize,
                 .gate = w->gate},
        .plan = {.tokens = tokens,
                 .slots = slots,
                 .experts = d->num_experts,
                 .groups = d->num_experts,
                 .ids_dtype = MOE_I32},
    };
}

static moe_status check_batch(const moe_layer *layer, const moe_batch *batch, unsigned stages, int32_t slots,
                              struct moe_error *err)
{
    if (!moe_rows_ok(batch->tokens, slots, err))
        return MOE_ERROR_INVALID_ARGUMENT;
    if (!moe_dtype_is_float(batch->dtype))
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.dtype is %d, expected MOE_BF16, MOE_F16 or MOE_F32",
                        (int)batch->dtype);
    if (batch->max_sms < 0)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.max_sms is %d, expected 0 or more",
                        (int)batch->max_sms);
    const bool routes = stages & MOE_STAGE_TOPK, experts = stages & MOE_STAGE_COMBINE;
    if (routes && layer->weights.gate == NULL)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "the layer has no gate weights: use moe_experts_forward");
    if (!routes && batch->ids_dtype != MOE_DTYPE_NONE && batch->ids_dtype != MOE_I32 && batch->ids_dtype != MOE_I64)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.ids_dtype is %d, expected MOE_I32 or MOE_I64",
                        (int)batch->ids_dtype);
    if (batch->tokens == 0)
        return MOE_OK;

    const char *missing = batch->hidden_states == NULL             ? "hidden_states"
                          : experts && batch->output == NULL       ? "output"
                          : !routes && batch->topk_ids == NULL     ? "topk_ids"
                          : !routes && batch->topk_weights == NULL ? "topk_weights"
                                                                   : NULL;
    if (missing != NULL)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.%s is NULL", missing);
    const uintptr_t bytes =
        (uintptr_t)batch->tokens * (uintptr_t)layer->desc.hidden_size * moe_dtype_size(batch->dtype);
    const uintptr_t pairs = (uintptr_t)batch->tokens * (uintptr_t)slots;
    const uintptr_t in = (uintptr_t)batch->hidden_states, out = (uintptr_t)batch->output;
    const struct {
        const char *name;
        uintptr_t begin, bytes;
    } inputs[] = {
        {"hidden_states", in, bytes},
        {"topk_ids", (uintptr_t)batch->topk_ids, pairs * (batch->ids_dtype == MOE_I64 ? 8 : 4)},
        {"topk_weights", (uintptr_t)batch->topk_weights, pairs * sizeof(float)},
    };
    const size_t count = routes ? 1 : sizeof inputs / sizeof inputs[0];
    for (size_t i = 0; experts && i < count; i++)
        if (inputs[i].begin < out + bytes && out < inputs[i].begin + inputs[i].bytes)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.output overlaps %s", inputs[i].name);
    /* Kernels load and store 16 bytes at a time where rows allow it. */
    if (in % 16 != 0 || (experts && out % 16 != 0))
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.%s is not aligned to 16 bytes",
                        in % 16 != 0 ? "hidden_states" : "output");
    return MOE_OK;
}

static moe_status check_config(const moe_context *ctx, const struct moe_path_info *path, int32_t config,
                               struct moe_error *err)
{
    if (config == 0 || moe_path_config_name(path->path, config) != NULL)
        return moe_choose_config(ctx, path, config, err);
    int32_t last = 0;
    while (moe_path_config_name(path->path, last + 1) != NULL)
        last++;
    return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.config is %d, expected 0 to %d on path '%s'",
                    (int)config, (int)last, moe_path_name(path->path));
}

static moe_status check_workspace(const void *workspace, size_t bytes, size_t needed, struct moe_error *err)
{
    if (workspace == NULL)
        return moe_fail(err, MOE_ERROR_WORKSPACE, "the workspace is NULL, %zu bytes are needed", needed);
    if ((uintptr_t)workspace % MOE_WORKSPACE_ALIGNMENT != 0)
        return moe_fail(err, MOE_ERROR_WORKSPACE, "the workspace is not aligned to %d bytes", MOE_WORKSPACE_ALIGNMENT);
    if (bytes < needed)
        return moe_fail(err, MOE_ERROR_WORKSPACE, "the workspace has %zu bytes, %zu are needed", bytes, needed);
    return MOE_OK;
}

moe_status moe_call_prepare(struct moe_call *call, const moe_layer *layer, const moe_batch *given, unsigned stages,
                            void *workspace, size_t bytes, void *stream, const struct moe_path_info **path,
                            struct moe_error *err)
{
    const bool routes = stages & MOE_STAGE_TOPK;
    moe_batch whole;
    const moe_batch *batch = &whole;
    if (!moe_struct_in(&whole, given, MOE_BATCH_FIRST, sizeof whole, "moe_batch", err))
        return MOE_ERROR_INVALID_ARGUMENT;
    const int32_t slots = !routes && batch->top_k != 0 ? batch->top_k : layer->desc.top_k;
    moe_status status = check_batch(layer, batch, stages, slots, err);
    if (status != MOE_OK)
        return status;
    struct moe_choice choice;
    status = moe_choose(layer, batch->path, batch->tokens, &choice, err);
    *path = choice.path;
    if (status == MOE_OK)
        status = check_config(layer->ctx, *path, batch->config, err);
    if (status != MOE_OK)
        return status;

    moe_call_shape(call, layer, batch->tokens, slots, batch->dtype);
    call->stream = stream;
    call->error = err;
    call->stages = stages;
    call->max_sms = batch->max_sms;
    /* A table's configurations were measured on all SMs; on fewer the path knows better. */
    call->config = batch->config != 0 ? batch->config : batch->max_sms == 0 ? choice.config : 0;
    call->input = batch->hidden_states;
    call->output = stages & MOE_STAGE_COMBINE ? batch->output : NULL;
    if (batch->tokens == 0)
        return MOE_OK;
    status = check_workspace(workspace, bytes, moe_workspace_carve(call, *path, NULL), err);
    if (status != MOE_OK)
        return status;
    moe_workspace_carve(call, *path, workspace);

    call->gate.x = call->x;
    if (batch->router_logits_out != NULL)
        call->gate.logits = batch->router_logits_out;
    if (batch->topk_ids_out != NULL)
        call->gate.ids = batch->topk_ids_out;
    if (batch->topk_weights_out != NULL)
        call->gate.weights = batch->topk_weights_out;
    call->plan.ids = call->gate.ids;
    call->plan.weights = call->gate.weights;
    if (!routes) {
        call->plan.ids = batch->topk_ids;
        call->plan.weights = batch->topk_weights;
        call->plan.ids_dtype = batch->ids_dtype == MOE_I64 ? MOE_I64 : MOE_I32;
    }
    return MOE_OK;
}
