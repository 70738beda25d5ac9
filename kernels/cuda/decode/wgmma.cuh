// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN for compute capability 9.0.
#ifndef MOE_KERNELS_CUDA_DECODE_WGMMA_CUH
#define MOE_KERNELS_CUDA_DECODE_WGMMA_CUH

#include "kernels/cuda/decode/decode.cuh"

// Whether it can route this call itself (kernels.h).
bool moe_decode_wgmma_routes(const struct moe_call *call);

// x, plan -> act, down, or of a call that it routes x, logits -> ids, weights, plan, act, down; one launch on
// call->stream.
moe_status moe_ffn_decode_wgmma(const struct moe_call *call, const moe_decode_args &args);

#endif
