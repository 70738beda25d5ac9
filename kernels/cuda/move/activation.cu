// SPDX-License-Identifier: Apache-2.0
// act[r] = silu(gate_up[r][0, I)) * gate_up[r][I, 2I), computed in fp32 and rounded once.
#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/kernels.h"

namespace
{

constexpr int THREADS = 128;
constexpr int VEC = 8;

// A block takes a row at a time. Only the device knows how many rows there are.
template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    activation_kernel(const T *gate_up, const int32_t *rows_used, int64_t intermediate, T *act)
{
    moe_grid_launch_dependents();
    moe_grid_wait();
    const int64_t used = *rows_used;
    for (int64_t r = blockIdx.x; r < used; r += gridDim.x) {
        const T *gate_row = gate_up + r * 2 * intermediate, *up_row = gate_row + intermediate;
        for (int64_t i = threadIdx.x * VEC; i < intermediate; i += THREADS * VEC) {
            float gate[VEC], up[VEC];
            moe_load<ALIGNED>(gate_row + i, intermediate - i, gate);
            moe_load<ALIGNED>(up_row + i, intermediate - i, up);
#pragma unroll
            for (int j = 0; j < VEC; j++)
                gate[j] = moe_silu(gate[j]) * up[j];
            moe_store<ALIGNED>(act + r * intermediate + i, intermediate - i, gate);
        }
    }
}

} // namespace

moe_status moe_activation_cuda(const struct moe_call *call)
{
    if (call->tokens == 0)
        return MOE_OK;

    const struct moe_plan *plan = &call->plan.plan;
    const unsigned grid = moe_grid(call->tokens * call->slots, call->max_sms, call->exec->sms, 16);
    const bool aligned = call->intermediate % VEC == 0 && moe_aligned16(call->gate_up) && moe_aligned16(call->act);
    moe_with_dtype(call->dtype, [&](auto t) {
        moe_with_bool(aligned, [&](auto vector) {
            typedef decltype(t) T;
            moe_launch(activation_kernel<T, decltype(vector)::value>, grid, THREADS, 0, call->stream,
                       call->exec->compute_capability == 90, (const T *)call->gate_up,
                       plan->offsets + call->plan.groups, call->intermediate, (T *)call->act);
        });
    });
    return moe_launched(call->error, "activation");
}
