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

static struct moe_gpu gpu_of(const struct moe_call *call)
{
    return (struct moe_gpu){
        .stream = call->stream,
        .sms = call->exec->sms,
        .max_sms = call->max_sms,
        .cluster = call->exec->cluster,
        .dependent = call->exec->compute_capability == 90,
    };
}

static moe_status logits_cuda(const struct moe_call *call)
{
    const struct moe_gpu gpu = gpu_of(call);
    moe_status status = moe_logits_cuda(&call->gate, &gpu);
    return status == MOE_OK ? status : moe_fail(call->error, status, "the gate's kernel could not be launched");
}

/* Where both run they are one step, which can do with one launch: the first does the other's work as well, or the FFN
 * does all of it. */
static moe_status topk_cuda(const struct moe_call *call)
{
    const struct moe_gpu gpu = gpu_of(call);
    if (call->ffn_routes)
        return MOE_OK;
    moe_status status = call->stages & MOE_STAGE_PLAN ? moe_topk_plan_cuda(&call->gate, &call->plan, &gpu)
                                                      : moe_topk_cuda(&call->gate, &gpu);
    return status == MOE_OK ? status : moe_fail(call->error, status, "the top-k kernel could not be launched");
}

static moe_status plan_cuda(const struct moe_call *call)
{
    const struct moe_gpu gpu = gpu_of(call);
    moe_status status = call->stages & MOE_STAGE_TOPK ? MOE_OK : moe_plan_cuda(&call->plan, &gpu);
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

static const struct moe_step prefill_steps[] = {
    ROUTE_CUDA,
    {"ffn", MOE_STAGE_GATHER | MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION | MOE_STAGE_GEMM2, moe_ffn_prefill},
    {"combine", MOE_STAGE_COMBINE, moe_combine_planned_cuda},
    {NULL, 0, NULL},
};

static const struct moe_step decode_steps[] = {
    ROUTE_CUDA,
    {"ffn", MOE_STAGE_GATHER | MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION | MOE_STAGE_GEMM2, moe_ffn_decode},
    {"combine", MOE_STAGE_COMBINE, moe_combine_planned_cuda},
    {NULL, 0, NULL},
};

#define CUDA_STEPS(list)    .steps = list
#define CUDA_ONLY(function) function
#else
#define CUDA_STEPS(list)    .why_not = "this build has no CUDA"
#define CUDA_ONLY(function) NULL
#endif

enum {
    ANY_LAYOUT = MOE_LAYOUT_ROW_MAJOR | MOE_LAYOUT_PACKED,
    NEED_SEPARATE = MOE_NEED_ROWS | MOE_NEED_GATE_UP | MOE_NEED_ACT | MOE_NEED_DOWN,
};

static const struct moe_path_info paths[MOE_PATH_COUNT] = {
    [MOE_PATH_REFERENCE] = {.path = MOE_PATH_REFERENCE,
                            .device = MOE_DEVICE_CPU,
                            .layouts = MOE_LAYOUT_ROW_MAJOR,
                            .needs = NEED_SEPARATE,
                            .gate_up_dtype = MOE_F32,
                            .act_dtype = MOE_F32,
                            .down_dtype = MOE_F32,
                            .steps = reference_steps},
    [MOE_PATH_CPU] = {.path = MOE_PATH_CPU,
                      .device = MOE_DEVICE_CPU,
                      .layouts = MOE_LAYOUT_ROW_MAJOR,
                      .needs = MOE_NEED_ACT | MOE_NEED_DOWN,
                      .down_dtype = MOE_F32,
                      .scratch = moe_scratch_cpu,
                      .steps = cpu_steps},
    [MOE_PATH_CUBLAS_LOOP] = {.path = MOE_PATH_CUBLAS_LOOP,
                              .device = MOE_DEVICE_CUDA,
                              .synchronises = true,
                              .layouts = MOE_LAYOUT_ROW_MAJOR,
                              .needs = NEED_SEPARATE,
                              .scratch = CUDA_ONLY(moe_scratch_cublas),
                              CUDA_STEPS(cublas_loop_steps)},
    [MOE_PATH_CUBLAS_GROUPED] = {.path = MOE_PATH_CUBLAS_GROUPED,
                                 .device = MOE_DEVICE_CUDA,
                                 .synchronises = true,
                                 .layouts = MOE_LAYOUT_ROW_MAJOR,
                                 .needs = NEED_SEPARATE,
                                 .scratch = CUDA_ONLY(moe_scratch_cublas),
                                 CUDA_STEPS(cublas_grouped_steps)},
    [MOE_PATH_PADDED] = {.path = MOE_PATH_PADDED,
                         .device = MOE_DEVICE_CUDA,
                         .synchronises = true,
                         .layouts = MOE_LAYOUT_ROW_MAJOR,
                         .needs = MOE_NEED_DOWN,
                         .scratch = CUDA_ONLY(moe_scratch_padded),
                         CUDA_STEPS(padded_steps)},
    [MOE_PATH_SIMPLE] = {.path = MOE_PATH_SIMPLE,
                         .device = MOE_DEVICE_CUDA,
                         .layouts = MOE_LAYOUT_ROW_MAJOR,
                         .needs = MOE_NEED_ACT | MOE_NEED_DOWN,
                         .down_dtype = MOE_F32,
                         CUDA_STEPS(simple_steps)},
    [MOE_PATH_DECODE] = {.path = MOE_PATH_DECODE,
                         .device = MOE_DEVICE_CUDA,
                         .layouts = ANY_LAYOUT,
                         .needs = MOE_NEED_ACT | MOE_NEED_DOWN,
                         .scratch = CUDA_ONLY(moe_scratch_decode),
                         .zeroed = CUDA_ONLY(moe_zeroed_decode),
                         .routes = CUDA_ONLY(moe_decode_routes),
                         .config_name = CUDA_ONLY(moe_decode_config_name),
                         .config = CUDA_ONLY(moe_decode_config),
                         .config_check = CUDA_ONLY(moe_decode_config_check),
                         CUDA_STEPS(decode_steps)},
    [MOE_PATH_PREFILL] = {.path = MOE_PATH_PREFILL,
                          .device = MOE_DEVICE_CUDA,
                          .layouts = ANY_LAYOUT,
                          .needs = MOE_NEED_ACT | MOE_NEED_DOWN,
                          .scratch = CUDA_ONLY(moe_scratch_prefill),
                          .zeroed = CUDA_ONLY(moe_zeroed_prefill),
                          .config_name = CUDA_ONLY(moe_prefill_config_name),
                          .config = CUDA_ONLY(moe_prefill_config),
                          .config_check = CUDA_ONLY(moe_prefill_config_check),
                          CUDA_STEPS(prefill_steps)},
};

const struct moe_path_info *moe_path_info_get(moe_path path)
{
    return path > MOE_PATH_AUTO && path < MOE_PATH_COUNT ? &paths[path] : NULL;
}

const char *moe_path_config_name(moe_path path, int32_t config)
{
    const struct moe_path_info *info = moe_path_info_get(path);
    return info != NULL && info->config_name != NULL && config > 0 ? info->config_name(config) : NULL;
}
