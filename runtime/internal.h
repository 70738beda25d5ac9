/* SPDX-License-Identifier: Apache-2.0 */
/* The library's handles: read this page and you know the runtime. */
#ifndef MOE_RUNTIME_INTERNAL_H
#define MOE_RUNTIME_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>

#include "kernels/cuda/device.h"
#include "kernels/kernels.h"
#include "models/model.h"

struct moe_context {
    moe_device_info info;
    struct moe_exec exec;
    moe_log_fn log;
    void *log_user;
    char cublas_why[256]; /* why exec.cublas is NULL */
    pthread_mutex_t error_lock;
    struct moe_error error; /* the last failure's text */
};

struct moe_checkpoint {
    moe_context *ctx;
    struct moe_model *model;
};

struct moe_layer {
    moe_context *ctx;
    moe_layer_desc desc;
    moe_layer_weights weights;
    void *parts[MOE_PART_COUNT]; /* memory that the layer owns; NULL: the caller's */
    uint64_t part_bytes[MOE_PART_COUNT];
};

/* Keeps the text of a failure on the context (NULL: on the thread) and returns status. */
moe_status moe_context_report(moe_context *ctx, moe_status status, const struct moe_error *err);
void moe_context_log(const moe_context *ctx, moe_log_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* True if a caller's struct is as large as the first version of it; the text names the struct. */
bool moe_struct_ok(size_t size, size_t needed, const char *name, struct moe_error *err);

/* ---- Stages, steps and paths (paths.c) ---- */

enum moe_stage {
    MOE_STAGE_ENTRY = 1,
    MOE_STAGE_LOGITS = 2,
    MOE_STAGE_TOPK = 4,
    MOE_STAGE_PLAN = 8,
    MOE_STAGE_GATHER = 16,
    MOE_STAGE_GEMM1 = 32,
    MOE_STAGE_ACTIVATION = 64,
    MOE_STAGE_GEMM2 = 128,
    MOE_STAGE_COMBINE = 256,

    MOE_STAGES_ROUTE = MOE_STAGE_ENTRY | MOE_STAGE_LOGITS | MOE_STAGE_TOPK,
    MOE_STAGES_EXPERTS = MOE_STAGE_ENTRY | MOE_STAGE_PLAN | MOE_STAGE_GATHER | MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION |
                         MOE_STAGE_GEMM2 | MOE_STAGE_COMBINE,
    MOE_STAGES_ALL = MOE_STAGES_ROUTE | MOE_STAGES_EXPERTS,
};

struct moe_step {
    const char *name;
    unsigned stages; /* the stages it covers */
    moe_step_fn run;
};

/* Workspace buffers of moe_call that a path needs; those of gate and plan are always there. */
enum moe_need { MOE_NEED_ROWS = 1, MOE_NEED_GATE_UP = 2, MOE_NEED_ACT = 4, MOE_NEED_DOWN = 8 };

struct moe_path_info {
    moe_path path;
    moe_device device;
    bool synchronises;   /* reads counts on the host: cannot be captured */
    unsigned needs;
    moe_dtype gate_up_dtype, act_dtype, down_dtype; /* MOE_DTYPE_NONE: the layer's */
    size_t (*scratch)(const struct moe_call *call); /* NULL: none; looks at shapes only */
    const struct moe_step *steps;                   /* ends with run == NULL; NULL: not in this build */
    const char *why_not;                            /* if steps is NULL */
};

const struct moe_path_info *moe_path_info_get(moe_path path);

/* ---- Workspace (workspace.c): one function both sizes and carves ---- */

/* Fills the buffers of `call` from `workspace`, or with workspace NULL only counts. Returns the bytes needed. */
size_t moe_workspace_carve(struct moe_call *call, const struct moe_path_info *path, void *workspace);

#endif
