// SPDX-License-Identifier: Apache-2.0
// rows[r] = x[row_token[r]]
//
// Done from the tokens' side: each is read once, whatever the number of its rows. As in combine.cu a warp takes a strip
// of one token's columns, and all of it is asked for before anything is stored.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/kernels.h"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MAX_THREADS = 512;
constexpr int PARTS = 4; // of 32 pieces, to a strip

// x [tokens][pieces], rows [..][pieces], in pieces of type P.
template <typename P>
__global__ void __launch_bounds__(MAX_THREADS)
    gather_kernel(const P *x, const int32_t *slot_row, int64_t tokens, int slots, int64_t pieces, P *rows)
{
    moe_grid_launch_dependents();
    moe_grid_wait();

    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t strips = (pieces + PARTS * 32 - 1) / (PARTS * 32), step = (int64_t)gridDim.x * warps;
    for (int64_t i = (int64_t)blockIdx.x * warps + threadIdx.x / 32; i < tokens * strips; i += step) {
        const int64_t t = i / strips, at = i % strips * (PARTS * 32) + lane;
        P strip[PARTS];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            if (at + p * 32 < pieces)
                strip[p] = x[t * pieces + at + p * 32];
        for (int s0 = 0; s0 < slots; s0 += 32) {
            const int own = s0 + lane < slots ? slot_row[t * slots + s0 + lane] : -1;
            for (unsigned left = __ballot_sync(ALL_LANES, own >= 0); left != 0; left &= left - 1) {
                P *to = rows + __shfl_sync(ALL_LANES, own, __ffs(left) - 1) * pieces + at;
#pragma unroll
                for (int p = 0; p < PARTS; p++)
                    if (at + p * 32 < pieces)
                        to[p * 32] = strip[p];
            }
        }
    }
}

template <typename P> void launch(const struct moe_call *call, size_t row_bytes)
{
    const int64_t pieces = (int64_t)(row_bytes / sizeof(P)), strips = moe_ceil_div(pieces, PARTS * 32);
    // A bound on the SMs leaves one block for each: a large one.
    const int threads = call->max_sms > 0 ? MAX_THREADS : 128;
    const int64_t blocks = moe_ceil_div(call->tokens * strips, threads / 32);
    moe_launch(gather_kernel<P>, moe_grid(blocks, call->max_sms, call->exec->sms, 256), threads, 0, call->stream,
               call->exec->compute_capability == 90, (const P *)call->x, call->plan.plan.slot_row, call->tokens,
               call->slots, pieces, (P *)call->rows);
}

} // namespace

moe_status moe_gather_cuda(const struct moe_call *call)
{
    if (call->tokens == 0)
        return MOE_OK;

    const size_t row_bytes = call->hidden * moe_dtype_size(call->dtype);
    if (row_bytes % 16 == 0 && moe_aligned16(call->x) && moe_aligned16(call->rows))
        launch<uint4>(call, row_bytes);
    else if (call->dtype == MOE_F32)
        launch<uint32_t>(call, row_bytes);
    else
        launch<uint16_t>(call, row_bytes);
    return moe_launched(call->error, "gather");
}
