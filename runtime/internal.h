/* SPDX-License-Identifier: Apache-2.0 */
/* The library's handles: read this page and you know the runtime. */
#ifndef MOE_RUNTIME_INTERNAL_H
#define MOE_RUNTIME_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#include "config/tuned.h"
#include "kernels/cuda/device.h"
#include "kernels/kernels.h"
#include "models/model.h"

struct moe_context {
    moe_device_info info;
    struct moe_exec exec;
    moe_log_fn log;
    void *log_user;
    char cublas_why[256];   /* why exec.cublas is NULL */
    struct moe_tuned tuned; /* of this device; empty without a table. Not changed once the context is made */
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
    moe_layer_weights weights;   /* its layout is never AUTO */
    void *parts[MOE_PART_COUNT]; /* memory that the layer owns; NULL: the caller's */
    uint64_t part_bytes[MOE_PART_COUNT];
};

/* Keeps the text of a failure on the context (NULL: on the thread) and returns status. */
moe_status moe_context_report(moe_context *ctx, moe_status status, const struct moe_error *err);
void moe_context_log(const moe_context *ctx, moe_log_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* What a caller's struct must have at least where this version's is longer: the bytes of the library's first version.
 */
enum {
    MOE_CONTEXT_OPTIONS_FIRST = offsetof(moe_context_options, tuned),
    MOE_LOAD_OPTIONS_FIRST = offsetof(moe_load_options, layout),
    MOE_LAYER_WEIGHTS_FIRST = offsetof(moe_layer_weights, layout),
    MOE_BATCH_FIRST = offsetof(moe_batch, config),
};

/* True if a caller's struct (which begins with its size) has the `known` bytes of this version, and nothing set beyond
 * them. */
bool moe_struct_ok(const void *given, size_t known, const char *name, struct moe_error *err);
/* The same for a struct that has grown: one of `first` bytes or more is copied to `ours`, and what it lacks is zero. */
bool moe_struct_in(void *ours, const void *given, size_t first, size_t known, const char *name, struct moe_error *err);
/* Fills a caller's struct from ours as far as it reaches, keeping its size. */
moe_status moe_struct_out(void *given, const void *filled, size_t first, size_t known, const char *name,
                          struct moe_error *err);

/* The stack of matrices of a layer's part, MOE_PART_W13 or MOE_PART_W2, and its bytes (layer.c). */
struct moe_weights_view moe_part_view(const moe_layer_desc *desc, enum moe_part part, moe_layout layout,
                                      const void *data);
uint64_t moe_view_bytes(const struct moe_weights_view *view);

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
    bool synchronises; /* reads counts on the host: cannot be captured */
    unsigned layouts;  /* of weights that it reads: MOE_LAYOUT_ROW_MAJOR | MOE_LAYOUT_PACKED */
    unsigned needs;
    moe_dtype gate_up_dtype, act_dtype, down_dtype; /* MOE_DTYPE_NONE: the layer's */
    size_t (*scratch)(const struct moe_call *call); /* NULL: none; looks at shapes only */
    /* of it, the first bytes, which are zero when the FFN runs; NULL: none. Looks at ffn_routes and config as well */
    size_t (*zeroed)(const struct moe_call *call);
    bool (*routes)(const struct moe_call *call);    /* whether its FFN routes where all stages run; NULL: never */
    const char *(*config_name)(int32_t config);     /* from 1 until it is NULL; NULL: one way to run */
    int32_t (*config)(const struct moe_call *call); /* that a call without one gets; reads shapes, max_sms and exec */
    /* whether such a device can run one, in this build: MOE_OK, or MOE_ERROR_UNSUPPORTED and why not */
    moe_status (*config_check)(const struct moe_exec *exec, int32_t config, struct moe_error *why);
    const struct moe_step *steps; /* ends with run == NULL; NULL: not in this build */
    const char *why_not;          /* if steps is NULL */
};

/* NULL for AUTO and for a number that is no path. */
const struct moe_path_info *moe_path_info_get(moe_path path);

/* ---- Choice (choose.c) ---- */

struct moe_choice {
    const struct moe_path_info *path;
    int32_t config; /* of the path for batches on all SMs, by the table; 0: the path's own choice for the batch */
    const struct moe_tuned_point *tuned; /* what the table says for the path and this many tokens; NULL: nothing */
    int64_t least; /* tokens: so few, and all counts from there to the one asked about, get the same */
};

/* What a batch of `tokens` runs on, by the context's table, or where that says nothing by the formula. Shapes, dtype
 * and layout of the layer decide, and the count: not max_sms. */
moe_status moe_choose(const moe_layer *layer, moe_path wanted, int64_t tokens, struct moe_choice *choice,
                      struct moe_error *err);

/* MOE_OK, or MOE_ERROR_UNSUPPORTED and why this configuration (0, or one that has a name) cannot run here. */
moe_status moe_choose_config(const moe_context *ctx, const struct moe_path_info *path, int32_t config,
                             struct moe_error *why);

/* Has the context choose by this table, measured on such a device: the context takes what it holds. MOE_ERROR_FILE if
 * it names what cannot run. */
moe_status moe_choose_from(moe_context *ctx, struct moe_tuned *table, struct moe_error *err);

/* The layout for weights like `desc` where `wanted` is asked for: never AUTO. */
moe_status moe_choose_layout(const moe_context *ctx, const moe_layer_desc *desc, moe_layout wanted, moe_layout *layout,
                             struct moe_error *err);

/* ---- Workspace (workspace.c): one function both sizes and carves ---- */

/* Fills the buffers of `call` from `workspace`, or with workspace NULL only counts, and settles whether the FFN routes
 * and so which step sets scratch memory to zero. Returns the bytes needed. */
size_t moe_workspace_carve(struct moe_call *call, const struct moe_path_info *path, void *workspace);

/* ---- A call (call.c): a layer and a batch, checked and laid out for the path that runs it ---- */

/* For sizes alone: shapes and dtypes of `layer`, no pointers. The caller has checked tokens and slots (moe_rows_ok). */
void moe_call_shape(struct moe_call *call, const moe_layer *layer, int64_t tokens, int32_t slots, moe_dtype io_dtype);

/* The bounds that keep every size in this library inside its type. */
bool moe_rows_ok(int64_t tokens, int32_t slots, struct moe_error *err);

/* Checks the batch for the stages wanted, chooses the path and carves the workspace. */
moe_status moe_call_prepare(struct moe_call *call, const moe_layer *layer, const moe_batch *batch, unsigned stages,
                            void *workspace, size_t bytes, void *stream, const struct moe_path_info **path,
                            struct moe_error *err);

#endif
