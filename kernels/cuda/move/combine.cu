// SPDX-License-Identifier: Apache-2.0
// output[t] = sum over the token's slots that have a row, in slot order, of row_weight * down[row].
//
// The kernel only reads memory, so all that counts is how many bytes are on their way at any time. A warp takes a strip
// of one token's columns and needs nobody else: lane s fetches the row and the weight of slot s, shuffles pass them on,
// and every row's part of the strip is asked for before the first is added. With 8 loads of 16 bytes a lane and 32
// warps an SM that is up to 128 KB, several times of what the memory's latency takes. Each row is read once, so what
// has been read makes way in L2 for what GEMM 2 has written last and nobody has read yet.
#include <type_traits>

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

__device__ inline uint32_t least_word(const uint4 &v)
{
    return min(min(v.x, v.y), min(v.z, v.w));
}

// A strip is PARTS parts of 32 lanes * vec columns; SLOTS slots are loaded at once. Not ALIGNED: element by element.
// `planned`: slot_row and row_weight may be read at once (kernels.h), if past the SM's caches, since the kernel ahead
// may have written them; and each warp waits before it reads down. Those without a strip do not wait; the grid still
// ends after the kernel ahead, for the warp of the first strip does. While there is time a warp also adds up a round of
// slots that are not there: its instructions, which nobody has run lately, are in the SM's caches then.
//
// PASSED, if planned: a warp does not wait for the kernel ahead but looks for what that stores, where zeros were, until
// all of it is there (down_passed in kernels.h), which saves up to 0.7 us. What it looks for will come: when this
// kernel starts every block of the one ahead has started, and none of them has let it start before it has itself seen
// the kernels ahead of that at their end. So the zeros are there, and nobody uses output any more. The wait comes at
// the end, for all: whoever waits for this kernel finds the one ahead at its end as well.
template <typename From, typename To, int SLOTS, int PARTS, bool ALIGNED, bool PASSED>
__global__ void __launch_bounds__(MAX_THREADS)
    combine_kernel(const From *down, const int32_t *slot_row, const float *row_weight, int64_t tokens, int slots,
                   int hidden, To *output, bool planned)
{
    constexpr int VEC = vec<From>, STRIP = PARTS * 32 * VEC;
    moe_grid_launch_dependents();
    bool waited = !planned;
    if (waited)
        moe_grid_wait();

    // No output has as many as 2^32 strips.
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const uint64_t once = moe_policy_once();
    const int64_t row_bytes = hidden * (int)sizeof(From);
    const uint32_t strips = (hidden + STRIP - 1) / STRIP, all = (uint32_t)tokens * strips;
#pragma unroll 1
    for (uint32_t i = blockIdx.x * warps + threadIdx.x / 32; i < all; i += gridDim.x * warps) {
        const uint32_t t = i / strips;
        const int h = (i - t * strips) * STRIP + lane * VEC;
        const char *strip = (const char *)(down + h);
        float sum[PARTS][VEC] = {};
#pragma unroll 1
        for (int s0 = waited ? 0 : -SLOTS; s0 < slots; s0 += SLOTS) {
            const bool there = lane < SLOTS && (uint32_t)(s0 + lane) < (uint32_t)slots;
            const int own = there ? __ldcg(slot_row + (int64_t)t * slots + s0 + lane) : -1;
            // What is added where there is no row, -0 times 0, changes no bit of a sum.
            const float own_weight = own >= 0 ? __ldcg(row_weight + own) : -0.0f;
            int row[SLOTS];
#pragma unroll
            for (int s = 0; s < SLOTS; s++)
                row[s] = __shfl_sync(ALL_LANES, own, s);
            if (!waited && s0 >= 0) {
                if constexpr (!PASSED)
                    moe_grid_wait();
                waited = true;
            }
            uint4 loaded[SLOTS][PARTS] = {};
            uint32_t least;
            do {
                least = 1;
#pragma unroll
                for (int s = 0; s < SLOTS; s++)
#pragma unroll
                    for (int p = 0; p < PARTS; p++)
                        if (ALIGNED && row[s] >= 0 && h + p * 32 * VEC < hidden) {
                            const char *const at = strip + row[s] * row_bytes + p * 32 * sizeof(uint4);
                            loaded[s][p] = PASSED ? moe_load_relaxed((const uint4 *)at) : moe_load_once(at, once);
                        }
                if constexpr (PASSED)
#pragma unroll
                    for (int s = 0; s < SLOTS; s++)
#pragma unroll
                        for (int p = 0; p < PARTS; p++)
                            if (row[s] >= 0 && h + p * 32 * VEC < hidden)
                                least = min(least, least_word(loaded[s][p]));
            } while (PASSED && __any_sync(ALL_LANES, least == 0));
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                const float weight = __shfl_sync(ALL_LANES, own_weight, s);
                if (row[s] < 0 && s0 >= 0)
                    continue;
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    float v[VEC];
                    if constexpr (ALIGNED)
                        moe_load<true>((const From *)&loaded[s][p], VEC, v);
                    else
                        moe_load<false>((const From *)(strip + row[s] * row_bytes) + p * 32 * VEC,
                                        row[s] >= 0 ? hidden - h - p * 32 * VEC : 0, v);
#pragma unroll
                    for (int j = 0; j < VEC; j++)
                        sum[p][j] = fmaf(weight, v[j], sum[p][j]);
                }
            }
            // The last round; in the loop, so that the first comes by here as well.
            if (s0 >= 0 && s0 >= slots - SLOTS)
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    const int at = h + p * 32 * VEC;
                    if (at < hidden)
                        moe_store<ALIGNED>(output + (int64_t)t * hidden + at, hidden - at, sum[p]);
                }
        }
    }
    if constexpr (PASSED)
        moe_grid_wait();
}

// Shared memory that a block asks for without using it, so that no SM takes more blocks than are needed to have all of
// them on half of the SMs. Blocks come while the kernel ahead ends: the first SMs that it leaves would take all of
// them, and every row would come through these few. 0: there are so many blocks that they are spread anyway.
size_t spreading_bytes(const struct moe_exec *exec, int64_t blocks)
{
    constexpr int MOST = 16, UNIT = 128, RESERVED = 1024; // the last for each block, by the system
    const int64_t on_each = moe_ceil_div(blocks, (exec->sms + 1) / 2);
    if (on_each > MOST)
        return 0;
    // The least of which there is no room for one more.
    return ((exec->shared_bytes + RESERVED) / (on_each + 1) / UNIT + 1) * UNIT - RESERVED;
}

template <typename From, typename To, int SLOTS, int PARTS, bool ALIGNED, bool PASSED>
void launch(const struct moe_call *call, bool planned)
{
    const struct moe_plan *plan = &call->plan.plan;
    const int64_t strips = moe_ceil_div(call->hidden, PARTS * 32 * vec<From>);
    // A bound on the SMs leaves one block for each: a large one.
    const int threads = call->max_sms > 0 ? MAX_THREADS : 64;
    const int64_t blocks = moe_ceil_div(call->tokens * strips, threads / 32);
    const bool early = call->exec->compute_capability == 90;
    const auto kernel = combine_kernel<From, To, SLOTS, PARTS, ALIGNED, PASSED>;
    const size_t shared = planned && early && call->max_sms == 0 ? spreading_bytes(call->exec, blocks) : 0;
    if (shared > 48 * 1024)
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    moe_launch(kernel, moe_grid(blocks, call->max_sms, call->exec->sms, 256), threads, shared, call->stream, early,
               (const From *)call->down, plan->slot_row, plan->row_weight, call->tokens, call->slots, (int)call->hidden,
               (To *)call->output, planned);
}

template <typename From, typename To, bool PASSED> void launch_aligned(const struct moe_call *call, bool planned)
{
    if (call->slots <= 2)
        launch<From, To, 2, 4, true, PASSED>(call, planned);
    else if (call->slots <= 4)
        launch<From, To, 4, 2, true, PASSED>(call, planned);
    else if (PASSED || call->slots <= 8) // who looks again needs the registers
        launch<From, To, 8, 1, true, PASSED>(call, planned);
    else
        launch<From, To, 16, 1, true, false>(call, planned);
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
            if (!aligned) {
                launch<From, To, 1, 1, false, false>(call, planned);
                return;
            }
            if constexpr (std::is_same<From, To>::value && sizeof(From) == 2) {
                if (call->down_passed) {
                    launch_aligned<From, To, true>(call, planned);
                    return;
                }
            }
            launch_aligned<From, To, false>(call, planned);
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
