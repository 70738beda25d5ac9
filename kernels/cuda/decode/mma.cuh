// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN for GPUs without wgmma: compute capability 8.0 and later.
#ifndef MOE_KERNELS_CUDA_DECODE_MMA_CUH
#define MOE_KERNELS_CUDA_DECODE_MMA_CUH

#include "kernels/cuda/decode/decode.cuh"

// x, plan -> act, down, one launch on call->stream.
moe_status moe_ffn_decode_mma(const struct moe_call *call, const moe_decode_args &args);
// MOE_ERROR_UNSUPPORTED if a block of the device has less shared memory than it takes.
moe_status moe_decode_mma_check(const struct moe_exec *exec, struct moe_error *why);

#endif
