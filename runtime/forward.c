/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The layer, from hidden states to hidden states. Read this first.
 *
 *   entry -> logits -> topk -> plan -> gather -> gemm1 -> activation -> gemm2 -> combine
 *   └───── moe_route ─────┘   └──────────────── moe_experts_forward ────────────────┘
 *   └────────────────────────────── moe_forward ────────────────────────────────────┘
 *
 * A path (paths.c) is a list of steps, each covering one or more of these stages; kernels/kernels.h says what each
 * stage reads and writes. call.c checks the caller's batch and lays out the workspace; here the steps only run.
 */
#include "runtime/internal.h"

static moe_status run_on_device(const struct moe_call *call, const struct moe_path_info *path, unsigned stages)
{
    for (const struct moe_step *step = path->steps; step->run != NULL; step++) {
        if ((step->stages & stages) == 0)
            continue;
        moe_status status = step->run(call);
        if (status != MOE_OK)
            return status;
    }
    return MOE_OK;
}

/* On a GPU: with the layer's device current for this thread, as it was before afterwards, and not inside a capture if
 * the path cannot be captured. */
static moe_status run_on_gpu(const struct moe_call *call, const struct moe_path_info *path, unsigned stages,
                             int32_t device)
{
    bool capturing;
    int32_t previous;
    moe_status status = moe_cuda_enter(device, call->stream, &previous, &capturing, call->error);
    if (status != MOE_OK)
        return status;
    if (capturing && path->synchronises && (stages & MOE_STAGE_PLAN))
        status =
            moe_fail(call->error, MOE_ERROR_CAPTURE,
                     "path '%s' reads counts on the host: it cannot be captured in a graph", moe_path_name(path->path));
    else
        status = run_on_device(call, path, stages);
    moe_cuda_leave(previous);
    return status;
}

static moe_status run(const moe_layer *layer, const moe_batch *batch, unsigned stages, void *workspace, size_t bytes,
                      void *stream)
{
    struct moe_error err;
    struct moe_call call;
    const struct moe_path_info *path;
    err.text[0] = 0;
    if (layer == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    moe_status status = moe_call_prepare(&call, layer, batch, stages, workspace, bytes, stream, &path, &err);
    if (status == MOE_OK && call.tokens > 0)
        status = path->device == MOE_DEVICE_CUDA ? run_on_gpu(&call, path, stages, layer->ctx->info.device_index)
                                                 : run_on_device(&call, path, stages);
    return moe_context_report(layer->ctx, status, &err);
}

moe_status moe_forward(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes, void *stream)
{
    return run(layer, batch, MOE_STAGES_ALL, workspace, bytes, stream);
}

moe_status moe_route(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes, void *stream)
{
    return run(layer, batch, MOE_STAGES_ROUTE, workspace, bytes, stream);
}

moe_status moe_experts_forward(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes,
                               void *stream)
{
    return run(layer, batch, MOE_STAGES_EXPERTS, workspace, bytes, stream);
}

moe_status moe_workspace_size(const moe_layer *layer, const moe_limits *limits, size_t *bytes)
{
    struct moe_error err = {{0}};
    struct moe_choice choice;
    if (layer == NULL || bytes == NULL)
        return moe_context_report(layer != NULL ? layer->ctx : NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *bytes = 0;
    const moe_layer_desc *desc = &layer->desc;
    if (!moe_struct_ok(limits, sizeof *limits, "moe_limits", &err) ||
        !moe_rows_ok(limits->max_tokens, limits->top_k != 0 ? limits->top_k : desc->top_k, &err))
        return moe_context_report(layer->ctx, MOE_ERROR_INVALID_ARGUMENT, &err);
    /* The path that auto takes for fewer tokens may need more: each choice counts, at its last token. A batch of none
     * needs nothing. */
    int64_t tokens = limits->max_tokens;
    do {
        moe_status status = moe_choose(layer, limits->path, tokens, &choice, &err);
        if (status != MOE_OK)
            return moe_context_report(layer->ctx, status, &err);
        /* Hidden states of 16 bits take the most: a copy of them for an f32 layer does not fit in their output. */
        struct moe_call call;
        moe_call_shape(&call, layer, tokens, limits->top_k != 0 ? limits->top_k : desc->top_k, MOE_BF16);
        size_t needed = moe_workspace_carve(&call, choice.path, NULL);
        *bytes = needed > *bytes ? needed : *bytes;
        tokens = choice.least - 1;
    } while (tokens > 0);
    return MOE_OK;
}
