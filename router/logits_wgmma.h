/* SPDX-License-Identifier: Apache-2.0 */
/* Logits of many tokens on compute capability 9.0 (logits_wgmma.cu). */
#ifndef MOE_ROUTER_LOGITS_WGMMA_H
#define MOE_ROUTER_LOGITS_WGMMA_H

#include "router/router.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether that many would take longer by moe_logits_cuda's other kernels. */
bool moe_logits_wgmma_pays(const struct moe_gate_args *args, const struct moe_gpu *gpu);

/* As moe_logits_cuda, of any number of tokens: x and gate both bf16 or both f16, aligned to 16, hidden a multiple of 8,
 * on a device of compute capability 9.0. False, with nothing enqueued, if the driver has no tensor maps. */
bool moe_logits_wgmma(const struct moe_gate_args *args, const struct moe_gpu *gpu);

#ifdef __cplusplus
}
#endif

#endif
