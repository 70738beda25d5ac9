// SPDX-License-Identifier: Apache-2.0
// output[t] = sum over the token's slots that have a row, in slot order, of row_weight * down[row].
//
// The kernel only reads memory, so all that counts is how many bytes are on their way at any time. A warp takes a strip
// of one token's columns and needs nobody else: lane s fetches the row and the weight of slot s, shuffles pass them on,
// and every row's part of the strip is asked for before the first is added. With 8 loads of 16 bytes a lane and 32
// warps an SM that is up to 128 KB, several times of what the memory's latency takes.
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/kernels.h"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MAX_THREADS = 512;

// Columns that a lane loads at once.
template <typename T> constexpr int vec = 16 / sizeof(T);

// A strip is PARTS parts of 32 lanes * vec columns; SLOTS slots are loaded at once. Not ALIGNED: element by element.
// `planned`: slot_row and row_weight may be read at once (kernels.h), and each warp waits before it reads down. Those
// without a strip do not wait; the grid still ends after the kernel ahead, for the warp of the first strip does.
template <typename From, typename To, int SLOTS, int PARTS, bool ALIGNED>
__global__ void __launch_bounds__(MAX_THREADS)
    combine_kernel(const From *down, const int32_t *slot_row, const float *row_weight, int64_t tokens, int slots,
                   int64_t hidden, To *output, bool planned)
{
    constexpr int VEC = vec<From>, STRIP = PARTS * 32 * VEC;
    moe_grid_launch_dependents();
    bool waited = !planned;
    if (waited)
        moe_grid_wait();

    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int64_t strips = (hidden + STRIP - 1) / STRIP, step = (int64_t)gridDim.x * warps;
    for (int64_t i = (int64_t)blockIdx.x * warps + threadIdx.x / 32; i < tokens * strips; i += step) {
        const int64_t t = i / strips, h = i % strips * STRIP + lane * VEC;
        float sum[PARTS][VEC] = {};
        for (int s0 = 0; s0 < slots; s0 += SLOTS) {
            const int own = lane < SLOTS && s0 + lane < slots ? __ldcg(slot_row + t * slots + s0 + lane) : -1;
            const float own_weight = own >= 0 ? __ldcg(row_weight + own) : 0.0f;
            const unsigned used = __ballot_sync(ALL_LANES, own >= 0);
            if (!waited) {
                moe_grid_wait();
                waited = true;
            }
            uint4 loaded[SLOTS][PARTS];
            const From *row[SLOTS];
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                row[s] = down + __shfl_sync(ALL_LANES, own, s) * hidden + h;
#pragma unroll
                for (int p = 0; p < PARTS; p++)
                    if (ALIGNED && (used >> s & 1) && h + p * 32 * VEC < hidden)
                        loaded[s][p] = *(const uint4 *)(row[s] + p * 32 * VEC);
            }
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                const float weight = __shfl_sync(ALL_LANES, own_weight, s);
                if ((used >> s & 1) == 0)
                    continue;
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    float v[VEC];
                    if constexpr (ALIGNED)
                        moe_load<true>((const From *)&loaded[s][p], VEC, v);
                    else
                        moe_load<false>(row[s] + p * 32 * VEC, hidden - h - p * 32 * VEC, v);
#pragma unroll
                    for (int j = 0; j < VEC; j++)
                        sum[p][j] = fmaf(weight, v[j], sum[p][j]);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const int64_t at = h + p * 32 * VEC;
            if (at < hidden)
                moe_store<ALIGNED>(output + t * hidden + at, hidden - at, sum[p]);
        }
    }
}

template <typename From, typename To, int SLOTS, int PARTS, bool ALIGNED>
void launch(const struct moe_call *call, bool planned)
{
    const struct moe_plan *plan = &call->plan.plan;
    const int64_t strips = moe_ceil_div(call->hidden, PARTS * 32 * vec<From>);
    // A bound on the SMs leaves one block for each: a large one. Otherwise small ones, which find room beside the
    // kernel before.
    const int threads = call->max_sms > 0 ? MAX_THREADS : 64;
    const int64_t blocks = moe_ceil_div(call->tokens * strips, threads / 32);
    moe_launch(combine_kernel<From, To, SLOTS, PARTS, ALIGNED>, moe_grid(blocks, call->max_sms, call->exec->sms, 256),
               threads, 0, call->stream, call->exec->compute_capability == 90, (const From *)call->down, plan->slot_row,
               plan->row_weight, call->tokens, call->slots, call->hidden, (To *)call->output, planned);
}

moe_status combine(const struct moe_call *call, bool planned)
{
    if (call->tokens == 0)
        return MOE_OK;

    const bool aligned = call->hidden % 8 == 0 && moe_aligned16(call->down) && moe_aligned16(call->output);
    moe_with_dtype(call->down_dtype, [&](auto from) {
        moe_with_dtype(call->io_dtype, [&](auto to) {
            typedef decltype(from) From;
            typedef decltype(to) To;
            if (!aligned)
                launch<From, To, 1, 1, false>(call, planned);
            else if (call->slots <= 2)
                launch<From, To, 2, 4, true>(call, planned);
            else if (call->slots <= 4)
                launch<From, To, 4, 2, true>(call, planned);
            else if (call->slots <= 8)
                launch<From, To, 8, 1, true>(call, planned);
            else
                launch<From, To, 16, 1, true>(call, planned);
        });
    });
    return moe_launched(call->error, "combine");
}

} // namespace

moe_status moe_combine_cuda(const struct moe_call *call)
{
    return combine(call, false);
}

moe_status moe_combine_planned_cuda(const struct moe_call *call)
{
    return combine(call, true);
}
