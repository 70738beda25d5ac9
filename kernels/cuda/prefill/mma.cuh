// SPDX-License-Identifier: Apache-2.0
// The prefill path's FFN for GPUs without wgmma: compute capability 8.0 and later.
#ifndef MOE_KERNELS_CUDA_PREFILL_MMA_CUH
#define MOE_KERNELS_CUDA_PREFILL_MMA_CUH

#include "kernels/kernels.h"

// x, plan -> act, down (both dtype), two launches on call->stream, no scratch memory. Weights in either layout; H and I
// are multiples of 8, dtype is bf16 or f16. tile: one of moe_mma_tile_name's that fits the device; 0: the one for this
// device and this many rows.
moe_status moe_ffn_prefill_mma(const struct moe_call *call, int32_t tile);
// MOE_ERROR_UNSUPPORTED if a block of the device has less shared memory than the tile takes.
moe_status moe_mma_tile_check(const struct moe_exec *exec, int32_t tile, struct moe_error *why);

// Names of the tiles, numbered from 1: tokens x weight rows x stages. NULL past the last.
const char *moe_mma_tile_name(int32_t tile);

#endif
