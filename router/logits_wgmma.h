/* SPDX-License-Identifier: Apache-2.0 */
/* Logits of many tokens on compute capability 9.0 (logits_wgmma.cu). */
#ifndef MOE_ROUTER_LOGITS_WGMMA_H
#define MOE_ROUTER_LOGITS_WGMMA_H

#include "router/router.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether that many would take longer by moe_logits_cuda's other kernels. False where this one is not built or cannot
 * run. */
bool moe_logits_wgmma_pays(const struct moe_gate_args *args, const struct moe_gpu *gpu);

/* How the work is cut: tiles of 64 tokens times `groups` (1 or 2), and `slices` of the hidden dimension, each for one
 * block of a cluster: 1, 2, 4 or 8, and no more than a cluster can have, or than the SMs that are used. */
struct moe_logits_tile {
    int32_t groups, slices;
};

/* As moe_logits_cuda, of one token or more: x and gate both bf16 or both f16, aligned to 16, hidden a multiple of 8, in
 * a build for compute capability 9.0 and on such a device. tile NULL: one is chosen. False, with nothing enqueued, if
 * the driver takes no tensor maps of these; what else may go wrong with a launch is left for moe_launched(). */
bool moe_logits_wgmma(const struct moe_gate_args *args, const struct moe_gpu *gpu, const struct moe_logits_tile *tile);

#ifdef __cplusplus
}
#endif

#endif
