/* SPDX-License-Identifier: Apache-2.0 */
/* Every path as a list of steps. Adding a path is adding a list and a row here; tests, bench and doctor follow. */
#include "runtime/internal.h"

/* The router's functions know nothing of a whole call; these hand them their part of it. */

static moe_status logits_ref(const struct moe_call *call)
{
    moe_logits_ref(&call->gate);
    return MOE_OK;
}

static moe_status topk_ref(const struct moe_call *call)
{
    moe_topk_ref(&call->gate, 0, call->tokens);
    return MOE_OK;
}

static moe_status plan_ref(const struct moe_call *call)
{
    moe_plan_ref(&call->plan);
    return MOE_OK;
}

static const struct moe_step reference_steps[] = {
    {"entry", MOE_STAGE_ENTRY, moe_entry_ref},
    {"logits", MOE_STAGE_LOGITS, logits_ref},
    {"topk", MOE_STAGE_TOPK, topk_ref},
    {"plan", MOE_STAGE_PLAN, plan_ref},
    {"gather", MOE_STAGE_GATHER, moe_gather_ref},
    {"gemm1", MOE_STAGE_GEMM1, moe_gemm1_ref},
    {"activation", MOE_STAGE_ACTIVATION, moe_activation_ref},
    {"gemm2", MOE_STAGE_GEMM2, moe_gemm2_ref},
    {"combine", MOE_STAGE_COMBINE, moe_combine_ref},
    {NULL, 0, NULL},
};

static const struct moe_step cpu_steps[] = {
    {"entry", MOE_STAGE_ENTRY, moe_entry_cpu},
    {"logits", MOE_STAGE_LOGITS, moe_logits_cpu},
    {"topk", MOE_STAGE_TOPK, moe_topk_cpu},
    {"plan", MOE_STAGE_PLAN, plan_ref},
    {"gemm1", MOE_STAGE_GATHER | MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION, moe_gemm1_cpu},
    {"gemm2", MOE_STAGE_GEMM2, moe_gemm2_cpu},
    {"combine", MOE_STAGE_COMBINE, moe_combine_cpu},
    {NULL, 0, NULL},
};

#ifdef MOE_HAVE_CUDA

static moe_status logits_cuda(const struct moe_call *call)
{
    moe_status status = moe_logits_cuda(&call->gate, call->max_sms, call->stream);
    return status == MOE_OK ? status : moe_fail(call->error, status, "the gate's kernel could not be launched");
}

static moe_status topk_cuda(const struct moe_call *call)
{
    moe_status status = moe_topk_cuda(&call->gate, call->stream);
    return status == MOE_OK ? status : moe_fail(call->error, status, "the top-k kernel could not be launched");
}

static moe_status plan_cuda(const struct moe_call *call)
{
    moe_status status = moe_plan_cuda(&call->plan, call->stream);
    return status == MOE_OK ? status : moe_fail(call->error, status, "the plan's kernels could not be launched");
}

/* What all CUDA paths of separate steps begin with. */
#define ROUTE_CUDA                                                                                                     \
    {"entry", MOE_STAGE_ENTRY, moe_entry_cuda}, {"logits", MOE_STAGE_LOGITS, logits_cuda},                             \
        {"topk", MOE_STAGE_TOPK, topk_cuda},                                                                           \
    {                                                                                                                  \
        "plan", MOE_STAGE_PLAN, plan_cuda                                                                              \
    }

static const struct moe_step cublas_loop_steps[] = {
    ROUTE_CUDA,
    {"gather", MOE_STAGE_GATHER, moe_gather_cuda},
    {"gemm1", MOE_STAGE_GEMM1, moe_gemm1_cublas_loop},
    {"activation", MOE_STAGE_ACTIVATION, moe_activation_cuda},
    {"gemm2", MOE_STAGE_GEMM2, moe_gemm2_cublas_loop},
    {"combine", MOE_STAGE_COMBINE, moe_combine_cuda},
    {NULL, 0, NULL},
};

static const struct moe_step cublas_grouped_steps[] = {
    ROUTE_CUDA,
    {"gather", MOE_STAGE_GATHER, moe_gather_cuda},
    {"gemm1", MOE_STAGE_GEMM1, moe_gemm1_cublas_grouped},
    {"activation", MOE_STAGE_ACTIVATION, moe_activation_cuda},
    {"gemm2", MOE_STAGE_GEMM2, moe_gemm2_cublas_grouped},
    {"combine", MOE_STAGE_COMBINE, moe_combine_cuda},
    {NULL, 0, NULL},
};

static const struct moe_step padded_steps[] = {
    ROUTE_CUDA,
    {"ffn", MOE_STAGE_GATHER | MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION | MOE_STAGE_GEMM2, moe_ffn_padded},
    {"combine", MOE_STAGE_COMBINE, moe_combine_cuda},
    {NULL, 0, NULL},
};

static const struct moe_step simple_steps[] = {
    ROUTE_CUDA,
    {"gemm1", MOE_STAGE_GATHER | MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION, moe_gemm1_simple},
    {"gemm2", MOE_STAGE_GEMM2, moe_gemm2_simple},
    {"combine", MOE_STAGE_COMBINE, moe_combine_cuda},
    {NULL, 0, NULL},
};

#define CUDA_STEPS(steps)     steps, NULL
#define CUDA_SCRATCH(scratch) scratch
#else
#define CUDA_STEPS(steps)     NULL, "this build has no CUDA"
#define CUDA_SCRATCH(scratch) NULL
#endif

enum {
    NEED_SEPARATE = MOE_NEED_ROWS | MOE_NEED_GATE_UP | MOE_NEED_ACT | MOE_NEED_DOWN,
};

static const struct moe_path_info paths[MOE_PATH_COUNT] = {
    [MOE_PATH_REFERENCE] = {MOE_PATH_REFERENCE, MOE_DEVICE_CPU, false, NEED_SEPARATE, MOE_F32, MOE_F32, MOE_F32, NULL,
                            reference_steps, NULL},
    [MOE_PATH_CPU] = {MOE_PATH_CPU, MOE_DEVICE_CPU, false, MOE_NEED_ACT | MOE_NEED_DOWN, 0, 0, MOE_F32, moe_scratch_cpu,
                      cpu_steps, NULL},
    [MOE_PATH_CUBLAS_LOOP] = {MOE_PATH_CUBLAS_LOOP, MOE_DEVICE_CUDA, true, NEED_SEPARATE, 0, 0, 0,
                              CUDA_SCRATCH(moe_scratch_cublas), CUDA_STEPS(cublas_loop_steps)},
    [MOE_PATH_CUBLAS_GROUPED] = {MOE_PATH_CUBLAS_GROUPED, MOE_DEVICE_CUDA, true, NEED_SEPARATE, 0, 0, 0,
                                 CUDA_SCRATCH(moe_scratch_cublas), CUDA_STEPS(cublas_grouped_steps)},
    [MOE_PATH_PADDED] = {MOE_PATH_PADDED, MOE_DEVICE_CUDA, true, MOE_NEED_DOWN, 0, 0, 0,
                         CUDA_SCRATCH(moe_scratch_padded), CUDA_STEPS(padded_steps)},
    [MOE_PATH_SIMPLE] = {MOE_PATH_SIMPLE, MOE_DEVICE_CUDA, false, MOE_NEED_ACT | MOE_NEED_DOWN, 0, 0, MOE_F32, NULL,
                         CUDA_STEPS(simple_steps)},
    [MOE_PATH_DECODE] = {MOE_PATH_DECODE, MOE_DEVICE_CUDA, false, 0, 0, 0, 0, NULL, NULL, "not in this version"},
    [MOE_PATH_PREFILL] = {MOE_PATH_PREFILL, MOE_DEVICE_CUDA, false, 0, 0, 0, 0, NULL, NULL, "not in this version"},
};

const struct moe_path_info *moe_path_info_get(moe_path path)
{
    return path > MOE_PATH_AUTO && path < MOE_PATH_COUNT ? &paths[path] : NULL;
}
