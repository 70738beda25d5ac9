/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations of the layer, one contract each. A path (runtime/paths.c) is a list of steps; a step runs one of these
 * functions on a moe_call. Every implementation of an operation reads and writes exactly what the contract says, so
 * that tests can swap one for another. (Two do otherwise where the call says so: ffn_routes, down_passed.)
 *
 * Notation: T tokens, H hidden, I intermediate, G groups (= experts here), S slots, R rows in the plan (known only on
 * the device, R <= T * S). Sums are in fp32 or better; "rounds" is round to nearest even.
 */
#ifndef MOE_KERNELS_KERNELS_H
#define MOE_KERNELS_KERNELS_H

#include <stdbool.h>

#include "config/error.h"
#include "router/router.h"

#ifdef __cplusplus
extern "C" {
#endif

struct moe_pool;   /* kernels/cpu/pool.h */
struct moe_cublas; /* kernels/cuda/cublas/cublas.h */

/* A stack of E matrices: [E][rows][cols], contiguous if `layout` is row-major; packed: kernels/packed.h. */
struct moe_weights_view {
    const void *data;
    moe_dtype dtype;
    moe_layout layout;
    int32_t experts;
    int64_t rows, cols;
};

/* What a device lends to a call. Created with the context, shared by all its calls. */
struct moe_exec {
    moe_device device;
    struct moe_pool *pool; /* CPU */
    int32_t sms;           /* CUDA */
    int32_t compute_capability;
    int32_t shared_bytes;      /* CUDA: of shared memory, the most that a block can have */
    int32_t cluster;           /* CUDA: blocks that a cluster can have; 1: there are none */
    struct moe_cublas *cublas; /* CUDA, NULL if cuBLAS is not on the machine */
};

/* One forward: where everything is. All pointers are on exec's device. */
struct moe_call {
    const struct moe_exec *exec;
    void *stream;
    struct moe_error *error;
    unsigned stages;  /* that this call runs (runtime/internal.h); 0: each step by itself, whatever came before */
    bool ffn_routes;  /* the FFN's step does what topk and plan do, whose steps have nothing to do then */
    bool down_passed; /* of calls with ffn_routes, on all SMs and with io_dtype the same as dtype: down is zeros before
                         the FFN's step, and combine takes each result when it is there, without a wait for the step.
                         (Where it routes the step stores a pair of +0 as -0.) */
    int32_t max_sms;  /* 0: all */
    int32_t config;   /* of the path (its configurations are numbered from 1); 0: the path chooses */

    int64_t tokens, hidden, intermediate; /* T, H, I */
    int32_t slots;                        /* S */
    moe_dtype dtype;                      /* of weights and operands */
    moe_activation activation;
    struct moe_weights_view w13; /* [G][2I][H]: gate rows, then up rows */
    struct moe_weights_view w2;  /* [G][H][I] */

    moe_dtype io_dtype; /* of input and output */
    const void *input;  /* [T, H] io_dtype */
    void *output;       /* [T, H] io_dtype */

    struct moe_gate_args gate; /* gate.x = x; its outputs feed plan.ids and plan.weights in a whole forward */
    struct moe_plan_args plan;

    /* Workspace, carved by runtime/workspace.c; NULL where the path has no need of it. */
    void *x;       /* [T, H] dtype: `input` itself if io_dtype == dtype, else converted by the entry step. It may lie in
                      `output` (where dtype is no wider), or without one in `down` */
    void *rows;    /* [T * S, H] dtype: gathered input rows, in plan order */
    void *gate_up; /* [T * S, 2I] dtype (fp32 on the reference path): GEMM 1's result, gate columns then up columns */
    void *act;     /* [T * S, I] dtype (fp32 on the reference path): activation(gate) * up */
    void *down;    /* [T * S, H] down_dtype: GEMM 2's result, not yet weighted */
    moe_dtype down_dtype; /* fp32, or on the cuBLAS paths, decode and prefill dtype */
    void *scratch;        /* as many bytes as the path's scratch function says */
    size_t scratch_bytes;
};

typedef moe_status (*moe_step_fn)(const struct moe_call *call);

/*
 * entry       input -> x, rounding where dtypes differ; nothing to do where they are the same
 * logits      x, gate -> gate.logits          (router.h)
 * topk        gate.logits -> ids, weights     (router.h)
 * plan        ids, weights -> plan            (router.h)
 * gather      rows[r] = x[row_token[r]], r < R
 * gemm1       gate_up[r] = rows[r] . w13[group of r]^T
 * activation  act[r] = silu(gate_up[r][0, I)) * gate_up[r][I, 2I)
 * gemm2       down[r] = act[r] . w2[group of r]^T
 * combine     output[t] = sum over slots s with slot_row[t][s] >= 0, in slot order, of row_weight * down[row], in fp32,
 *             rounded once; zero for a token without rows
 *
 * combine alone writes output, when nothing reads x any more; with down_passed a token's row when nothing reads its row
 * of x any more.
 */

/* kernels/ref: plain C. gate_up, act and down are fp32 there, so that only input and output round. */
moe_status moe_entry_ref(const struct moe_call *call);
moe_status moe_gather_ref(const struct moe_call *call);
moe_status moe_gemm1_ref(const struct moe_call *call);
moe_status moe_activation_ref(const struct moe_call *call);
moe_status moe_gemm2_ref(const struct moe_call *call);
moe_status moe_combine_ref(const struct moe_call *call);

/* kernels/cpu: all cores. gemm1 gathers and applies the activation while it runs: x, plan -> act (dtype). */
moe_status moe_entry_cpu(const struct moe_call *call);
moe_status moe_logits_cpu(const struct moe_call *call);
moe_status moe_topk_cpu(const struct moe_call *call);
moe_status moe_gemm1_cpu(const struct moe_call *call);
moe_status moe_gemm2_cpu(const struct moe_call *call);
moe_status moe_combine_cpu(const struct moe_call *call);
size_t moe_scratch_cpu(const struct moe_call *call);

/* kernels/cuda/move */
moe_status moe_entry_cuda(const struct moe_call *call);
moe_status moe_gather_cuda(const struct moe_call *call);
moe_status moe_activation_cuda(const struct moe_call *call);
moe_status moe_combine_cuda(const struct moe_call *call);
/* The same behind a kernel that lets the next one start only when the plan is in memory (it has fenced what it wrote of
 * it): the plan is read at once, from L2, and only `down` is waited for, or with down_passed looked for. */
moe_status moe_combine_planned_cuda(const struct moe_call *call);

/* kernels/cuda/simple: gemm1 reads x through row_token (no gathered copy) and applies the activation: x, plan -> act.
 */
moe_status moe_gemm1_simple(const struct moe_call *call);
moe_status moe_gemm2_simple(const struct moe_call *call);

/* kernels/cuda/prefill: gather to gemm2 in one step; x, plan -> act, down (both dtype). Some configurations read x
 * through row_token, others gather it into `down` first, where x must not lie then. Either layout; H and I are
 * multiples of 8, dtype is bf16 or f16. The first moe_zeroed_prefill bytes of the scratch memory are zero (the plan
 * sees to it). The last launch lets the next kernel start when the plan is complete. Configurations:
 * moe_prefill_config_name(1), ... until it is NULL. */
moe_status moe_ffn_prefill(const struct moe_call *call);
size_t moe_scratch_prefill(const struct moe_call *call);
size_t moe_zeroed_prefill(const struct moe_call *call);
const char *moe_prefill_config_name(int32_t config);
/* The one that a call with config 0 runs in, by its shape, max_sms and device; looks at nothing else. */
int32_t moe_prefill_config(const struct moe_call *call);
/* Whether a configuration can run on this device, in this build: MOE_OK, or MOE_ERROR_UNSUPPORTED and why not. */
moe_status moe_prefill_config_check(const struct moe_exec *exec, int32_t config, struct moe_error *why);

/* kernels/cuda/decode: the same step for few rows an expert, where reading weights is what takes time. x, plan -> act,
 * down (both dtype); or where it routes (ffn_routes) x, logits -> ids, weights, plan, act, down. Either layout; H and I
 * are multiples of 8, dtype is bf16 or f16. The first moe_zeroed_decode bytes of the scratch memory are zero (the plan
 * or the logits' step sees to it; ffn_routes and config decide how many, but not on the memory). The rest as for
 * prefill. */
moe_status moe_ffn_decode(const struct moe_call *call);
size_t moe_scratch_decode(const struct moe_call *call);
size_t moe_zeroed_decode(const struct moe_call *call);
/* Whether it can route this call. Then its launch lets the next kernel start when ids, weights and plan are complete.
 */
bool moe_decode_routes(const struct moe_call *call);
const char *moe_decode_config_name(int32_t config);
int32_t moe_decode_config(const struct moe_call *call);
moe_status moe_decode_config_check(const struct moe_exec *exec, int32_t config, struct moe_error *why);

/* kernels/cuda/pack: `rows` canonical rows [rows][view->cols], from row `first` of the stack [experts * view->rows] on,
 * go to their places in `packed`, a stack of view's shape in the packed layout (kernels/packed.h); w13: gate and up
 * rows alternate. `first` and `rows` are multiples of 8. Padding is written too: columns with each row, rows with the
 * last row of their expert (w13: the last up row). Of the view only the shape is read. */
moe_status moe_pack_rows(const struct moe_weights_view *view, bool w13, int64_t first, int64_t rows,
                         const void *canonical, void *packed, void *stream, struct moe_error *err);

/* kernels/cuda/cublas: these read the counts on the host and wait for the stream. moe_ffn_padded gathers into its
 * scratch itself and covers gather to gemm2, leaving `down` in plan order. */
moe_status moe_gemm1_cublas_loop(const struct moe_call *call);
moe_status moe_gemm2_cublas_loop(const struct moe_call *call);
moe_status moe_gemm1_cublas_grouped(const struct moe_call *call);
moe_status moe_gemm2_cublas_grouped(const struct moe_call *call);
moe_status moe_ffn_padded(const struct moe_call *call);
size_t moe_scratch_cublas(const struct moe_call *call);
size_t moe_scratch_padded(const struct moe_call *call);

#ifdef __cplusplus
}
#endif

#endif
