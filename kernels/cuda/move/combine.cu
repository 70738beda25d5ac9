// SPDX-License-Identifier: Apache-2.0
// output[t] = sum over the token's slots that have a row, in slot order, of row_weight * down[row].
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/kernels.h"

namespace
{

constexpr int THREADS = 128;
constexpr int VEC = 8;

// A block takes one piece of THREADS * VEC columns of one token at a time.
template <typename From, typename To, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    combine_kernel(const From *down, const int32_t *slot_row, const float *row_weight, int64_t tokens, int slots,
                   int64_t hidden, To *output)
{
    const int64_t pieces = (hidden + THREADS * VEC - 1) / (THREADS * VEC);
    for (int64_t piece = blockIdx.x; piece < tokens * pieces; piece += gridDim.x) {
        const int64_t t = piece / pieces, h = (piece % pieces * THREADS + threadIdx.x) * VEC;
        if (h >= hidden)
            continue;
        float sum[VEC] = {};
        for (int s = 0; s < slots; s++) {
            const int64_t row = slot_row[t * slots + s];
            if (row < 0)
                continue;
            const float weight = row_weight[row];
            float v[VEC];
            moe_load<ALIGNED>(down + row * hidden + h, hidden - h, v);
#pragma unroll
            for (int i = 0; i < VEC; i++)
                sum[i] = fmaf(weight, v[i], sum[i]);
        }
        moe_store<ALIGNED>(output + t * hidden + h, hidden - h, sum);
    }
}

} // namespace

moe_status moe_combine_cuda(const struct moe_call *call)
{
    if (call->tokens == 0)
        return MOE_OK;

    const struct moe_plan *plan = &call->plan.plan;
    const int64_t work = call->tokens * moe_ceil_div(call->hidden, THREADS * VEC);
    const unsigned grid = moe_grid(work, call->max_sms, call->exec->sms, 16);
    const bool aligned = call->hidden % VEC == 0 && moe_aligned16(call->down) && moe_aligned16(call->output);
    moe_with_dtype(call->down_dtype, [&](auto from) {
        moe_with_dtype(call->io_dtype, [&](auto to) {
            moe_with_bool(aligned, [&](auto vector) {
                typedef decltype(from) From;
                typedef decltype(to) To;
                combine_kernel<From, To, vector.value><<<grid, THREADS, 0, (cudaStream_t)call->stream>>>(
                    (const From *)call->down, plan->slot_row, plan->row_weight, call->tokens, call->slots, call->hidden,
                    (To *)call->output);
            });
        });
    });
    return moe_launched(call->error, "combine");
}
