// SPDX-License-Identifier: Apache-2.0
// input -> x, where the caller's dtype is not the layer's.
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/kernels.h"

namespace
{

constexpr int THREADS = 256;
constexpr int VEC = 8;

template <typename From, typename To, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) entry_kernel(const From *from, To *to, int64_t count)
{
    moe_grid_launch_dependents();
    moe_grid_wait();
    const int64_t step = (int64_t)gridDim.x * THREADS * VEC;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * VEC; i < count; i += step) {
        float v[VEC];
        moe_load<ALIGNED>(from + i, count - i, v);
        moe_store<ALIGNED>(to + i, count - i, v);
    }
}

} // namespace

moe_status moe_entry_cuda(const struct moe_call *call)
{
    const int64_t count = call->tokens * call->hidden;
    if (count == 0 || call->io_dtype == call->dtype)
        return MOE_OK;

    const unsigned grid = moe_grid(moe_ceil_div(count, THREADS * VEC), call->max_sms, call->exec->sms, 8);
    const bool aligned = count % VEC == 0 && moe_aligned16(call->input) && moe_aligned16(call->x);
    moe_with_dtype(call->io_dtype, [&](auto from) {
        moe_with_dtype(call->dtype, [&](auto to) {
            moe_with_bool(aligned, [&](auto vector) {
                typedef decltype(from) From;
                typedef decltype(to) To;
                moe_launch(entry_kernel<From, To, decltype(vector)::value>, grid, THREADS, 0, call->stream,
                           call->exec->compute_capability == 90, (const From *)call->input, (To *)call->x, count);
            });
        });
    });
    return moe_launched(call->error, "entry");
}
