/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who goes where: the gate (logits -> top-k ids and weights) and the plan (ids -> rows grouped by expert). Each has a
 * plain C form (_ref, host pointers) and a CUDA form (_cuda, device pointers, enqueued on `stream`); both produce the
 * same plan bit for bit from the same ids.
 */
#ifndef MOE_ROUTER_ROUTER_H
#define MOE_ROUTER_ROUTER_H

#include <stdbool.h>

#include "moe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the CUDA forms run on. */
struct moe_gpu {
    void *stream;
    int32_t sms;     /* of the device */
    int32_t max_sms; /* to use; 0: all */
    int32_t cluster; /* blocks that a cluster can have */
    bool dependent;  /* compute capability 9.0: kernels may start ahead (kernels/cuda/common/launch.cuh) */
};

/* T tokens, H hidden, E experts, K top_k. */
struct moe_gate_args {
    int64_t tokens, hidden;
    int32_t experts, top_k;
    moe_dtype x_dtype, gate_dtype;
    moe_dtype logits_dtype;      /* logits accumulate in fp32, then round to this */
    moe_dtype topk_weight_dtype; /* weights are computed in fp32, then round to this */
    int32_t renormalize;
    const void *x;    /* [T, H] */
    const void *gate; /* [E, H] */
    float *logits;    /* [T, E] */
    int32_t *ids;     /* [T, K], by falling logit, ties to the lowest id; NaN counts as the largest */
    float *weights;   /* [T, K] */
    void *zeroed; /* as in moe_plan_args: memory of later steps that moe_logits_cuda sets to zero, where no plan does */
    size_t zeroed_bytes;
};

/* x and gate -> logits. */
void moe_logits_ref(const struct moe_gate_args *args);
/* logits -> ids and weights, for tokens [begin, end): softmax over all E in fp32, top-k, optional division by the sum
 * of the K. */
void moe_topk_ref(const struct moe_gate_args *args, int64_t begin, int64_t end);

/* Also sets args->zeroed to zero. For few tokens its blocks have so many bytes of shared memory, beside which those of
 * the kernel that waits for the logits may find room. */
enum { MOE_LOGITS_SHARED_BYTES = 4096 };
moe_status moe_logits_cuda(const struct moe_gate_args *args, const struct moe_gpu *gpu);
moe_status moe_topk_cuda(const struct moe_gate_args *args, const struct moe_gpu *gpu);

/*
 * The plan. G groups (sets of weights), T tokens with S slots each; rows of one group stand together, in the order of
 * (token, slot), so that results do not depend on timing. R = offsets[G] <= T * S rows are in use. An id outside
 * [0, experts), or one that expert_group maps to -1, gets no row. The same id twice in a token gets two rows.
 */
struct moe_plan {
    int32_t *counts;    /* [G] */
    int32_t *offsets;   /* [G + 1] */
    int32_t *row_token; /* [T * S], the first R in use */
    int32_t *row_slot;  /* [T * S] */
    float *row_weight;  /* [T * S] */
    int32_t *slot_row;  /* [T, S]: the row of that slot, -1: none */
};

struct moe_plan_args {
    int64_t tokens;
    int32_t slots;
    int32_t experts;
    int32_t groups;
    const int32_t *expert_group; /* [experts], or NULL: group = expert, groups = experts */
    const void *ids;             /* [T, S], ids_dtype */
    moe_dtype ids_dtype;         /* MOE_I32 or MOE_I64 */
    const float *weights;        /* [T, S] */
    struct moe_plan plan;
    void *scratch;       /* moe_plan_scratch_bytes, on the device that runs it */
    void *zeroed;        /* memory of the step that comes next, which the plan sets to zero: one launch less */
    size_t zeroed_bytes; /* a multiple of 16; zeroed is aligned to 16 */
};

/*
 * The CUDA form's scratch, one or the other: int32 [ranges][groups], counts of at most MOE_PLAN_BLOCKS ranges of
 * MOE_PLAN_BLOCK or more (token, slot) pairs; or a tally with ranges of MOE_TALLY_RANGE tokens or more.
 */
enum { MOE_PLAN_BLOCK = 256, MOE_PLAN_BLOCKS = 128, MOE_TALLY_RANGE = 8 };

/* T * S must be at most INT32_MAX. Serves both forms (plan_ref.c). */
size_t moe_plan_scratch_bytes(int64_t tokens, int32_t slots, int32_t groups);
void moe_plan_ref(const struct moe_plan_args *args);
moe_status moe_plan_cuda(const struct moe_plan_args *args, const struct moe_gpu *gpu);

/*
 * A tally: how many tokens of each range of `range` tokens have chosen each expert. Whoever chooses experts on the GPU
 * leaves one, by which the plan's blocks know where their rows go without having seen the ids of others. A range is
 * 255 tokens at most, as a token's ids differ and its count is a byte; the last one has what is left. Four neighbouring
 * experts share a word, the first in the lowest byte (router/tally.cuh).
 */
struct moe_tally {
    uint32_t *counts; /* [ceil(T / range)][ceil(E / 4)] */
    int32_t range;
};

/* Experts and top_k that there can be a tally of. */
enum { MOE_TALLY_EXPERTS = 512, MOE_TALLY_TOP_K = 32 };

/* moe_topk_cuda, which also fills tally->counts (in the plan's scratch) and says of what range. */
moe_status moe_topk_tally_cuda(const struct moe_gate_args *args, struct moe_tally *tally, const struct moe_gpu *gpu);
/* moe_plan_cuda of ids (MOE_I32) that are all of experts, those of a token different ones, and of which there is a
 * tally. expert_group is NULL, and there are tokens. */
moe_status moe_plan_tally_cuda(const struct moe_plan_args *args, const struct moe_tally *tally,
                               const struct moe_gpu *gpu);

/* moe_topk_cuda, then moe_plan_cuda of its ids and weights (args->ids, of type MOE_I32, and weights are gate's, slots
 * is its top_k), to the same bits: for few tokens in one launch, for many by a tally. */
moe_status moe_topk_plan_cuda(const struct moe_gate_args *gate, const struct moe_plan_args *args,
                              const struct moe_gpu *gpu);

#ifdef __cplusplus
}
#endif

#endif
