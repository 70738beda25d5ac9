// SPDX-License-Identifier: Apache-2.0
// The first weights that a block asks for, found by the warp that loads them, where the kernel routes. From the choice
// of experts to the note of the first task (decode.cuh), from which all parts of the block take what they need, is a
// microsecond. Where that task's weights are is known sooner, most of it before the choice: so their copies begin then.
#ifndef MOE_KERNELS_CUDA_DECODE_FIRST_CUH
#define MOE_KERNELS_CUDA_DECODE_FIRST_CUH

#include "kernels/cuda/decode/decode.cuh"
#include "kernels/cuda/decode/route.cuh"

// Of the first task of an item of GEMM 1: where in its tile's group its weights are.
struct moe_decode_first {
    int32_t tile; // -1: there is no such item
    int32_t band;
    int32_t begin, end; // blocks of K
};

// That of `item` if there are so many tiles. Each lane works it out for itself, so a warp does it for 32 numbers of
// tiles at once, as long as it is not known which is right.
static __device__ __forceinline__ moe_decode_first moe_first_of(const moe_decode_gemm &gemm, int32_t item,
                                                                int32_t tiles)
{
    const moe_work work = moe_work_make(&gemm.work, tiles * gemm.bands);
    moe_task t;
    if (item >= moe_work_items(&work) || !moe_work_task(&work, item, 0, &t))
        return {-1, 0, 0, 0};
    const int32_t tile = moe_divide(t.band, gemm.by_bands);
    return {tile, t.band - tile * gemm.bands, t.begin, t.end};
}

// That of lane `of`, in all lanes.
static __device__ __forceinline__ moe_decode_first moe_first_from(const moe_decode_first &first, int of)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    return {__shfl_sync(ALL_LANES, first.tile, of), __shfl_sync(ALL_LANES, first.band, of),
            __shfl_sync(ALL_LANES, first.begin, of), __shfl_sync(ALL_LANES, first.end, of)};
}

// The experts chosen, as a warp sees them, with PER neighbouring ones a lane.
template <int PER> struct moe_chosen_experts {
    static_assert(PER % 4 == 0, "a lane reads four words at once");
    static constexpr unsigned ALL_LANES = 0xffffffffu;
    uint32_t mine = 0;         // a bit for each of this lane's that is chosen
    int32_t before, count = 0; // how many are in the lanes before, and in all
    int32_t largest = 0;       // tokens of the one that has most

    __device__ __forceinline__ moe_chosen_experts(const moe_decode_choice &choice, int32_t experts)
    {
        const int first = threadIdx.x % 32 * PER;
        before = 0;
#pragma unroll
        for (int j = 0; j < PER; j += 4) {
            const uint4 v = first + j < experts ? *(const uint4 *)(choice.chosen + first + j) : uint4();
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned lanes = __ballot_sync(ALL_LANES, words[i] != 0);
                before += __popc(lanes & ((1u << threadIdx.x % 32) - 1));
                count += __popc(lanes);
                mine |= (uint32_t)(words[i] != 0) << (j + i);
                largest = max(largest, __popc(words[i]));
            }
        }
        largest = __reduce_max_sync(ALL_LANES, largest);
    }

    // The id of chosen expert n, in the order of ids.
    __device__ __forceinline__ int32_t id(int32_t n) const
    {
        uint32_t left = mine;
        const int32_t rank = n - before;
#pragma unroll
        for (int i = 0; i + 1 < PER; i++)
            left = i < rank ? left & (left - 1) : left;
        const bool here = rank >= 0 && rank < __popc(mine);
        return __reduce_max_sync(ALL_LANES, here ? (int32_t)(threadIdx.x % 32 * PER) + __ffs((int)left) - 1 : 0);
    }
};

#endif
