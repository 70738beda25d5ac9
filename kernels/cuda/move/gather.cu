// SPDX-License-Identifier: Apache-2.0
// rows[r] = x[row_token[r]]
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/kernels.h"

namespace
{

constexpr int THREADS = 128;

// A block copies a row at a time, in pieces of type P. Only the device knows how many rows there are.
template <typename P>
__global__ void __launch_bounds__(THREADS, 8)
    gather_kernel(const P *x, const int32_t *row_token, const int32_t *rows_used, int64_t pieces, P *__restrict__ rows)
{
    moe_grid_launch_dependents();
    moe_grid_wait();
    const int64_t used = *rows_used;
    for (int64_t r = blockIdx.x; r < used; r += gridDim.x) {
        const P *from = x + row_token[r] * pieces;
        P *to = rows + r * pieces;
        for (int64_t i = threadIdx.x; i < pieces; i += THREADS)
            to[i] = from[i];
    }
}

template <typename P> void launch(const struct moe_call *call, size_t row_bytes)
{
    const struct moe_plan *plan = &call->plan.plan;
    const unsigned grid = moe_grid(call->tokens * call->slots, call->max_sms, call->exec->sms, 16);
    moe_launch(gather_kernel<P>, grid, THREADS, 0, call->stream, call->exec->compute_capability == 90,
               (const P *)call->x, plan->row_token, plan->offsets + call->plan.groups, (int64_t)(row_bytes / sizeof(P)),
               (P *)call->rows);
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
