// SPDX-License-Identifier: Apache-2.0
// The prefill path's FFN for compute capability 9.0.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_CUH

#include "kernels/kernels.h"

// x, plan -> act, down (both dtype), on call->stream: for some tiles the tokens are put into plan order, then both
// GEMMs run in one launch. x does not lie in `down`; the first moe_zeroed_prefill_wgmma bytes of the scratch memory are
// zero. Weights in either layout; H and I are multiples of 8, dtype is bf16 or f16. tile: one of moe_wgmma_tile_name's.
moe_status moe_ffn_prefill_wgmma(const struct moe_call *call, int32_t tile);
size_t moe_scratch_prefill_wgmma(const struct moe_call *call);
size_t moe_zeroed_prefill_wgmma(const struct moe_call *call);

// Names of the tiles, numbered from 1: the most tokens in one, "rows" for those whose tokens are put into plan order
// first, "pair" where in addition two blocks of a cluster share weights or tokens; on one SM that runs as "rows". NULL
// past the last.
const char *moe_wgmma_tile_name(int32_t tile);
// The tile for a call of this shape.
int32_t moe_wgmma_tile(const struct moe_call *call);

#endif
