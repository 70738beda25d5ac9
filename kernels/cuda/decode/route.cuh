// SPDX-License-Identifier: Apache-2.0
// Few tokens' way from logits to the plan, by each block of the FFN for itself. That all blocks choose the same experts
// takes no longer than that one does, and none has to wait for a plan that comes through memory from another kernel.
// One block writes everything down, for whoever comes after.
//
// A token's ids differ and each of them gets a row: so a word for each expert, with a bit for each token that has
// chosen it, tells the expert's rows and their order.
#ifndef MOE_KERNELS_CUDA_DECODE_ROUTE_CUH
#define MOE_KERNELS_CUDA_DECODE_ROUTE_CUH

#include "kernels/cuda/decode/decode.cuh"
#include "router/place.cuh"
#include "router/topk.cuh"

constexpr int MOE_ROUTED_TOKENS = 16, MOE_ROUTED_TOP_K = 32; // a lane has one of its warp's pairs

// Where a block has it, in shared memory.
struct moe_decode_choice {
    uint32_t *chosen; // [experts, rounded up to a multiple of 4]: by which tokens
    int32_t *first;   // [as many], in the block that writes the plan: an expert's first row
    int2 *pairs;      // [MOE_ROUTED_TOKENS][MOE_ROUTED_TOP_K]: ids, and in that block the bits of weights
};

// Experts that `chosen` and `first` have room for; and the bytes of all three.
static __host__ __device__ constexpr int32_t moe_routed_experts(int32_t experts)
{
    return (experts + 3) / 4 * 4;
}

static __host__ __device__ constexpr int32_t moe_routed_bytes(int32_t experts)
{
    return moe_routed_experts(experts) * 2 * (int32_t)sizeof(int32_t) +
           MOE_ROUTED_TOKENS * MOE_ROUTED_TOP_K * (int32_t)sizeof(int2);
}

// No expert is chosen, after the block's next barrier.
static __device__ inline void moe_clear_choice(const moe_decode_choice &choice, int32_t experts)
{
    for (int e = threadIdx.x; e < moe_routed_experts(experts); e += blockDim.x)
        choice.chosen[e] = 0;
}

// By each warp; there is one for each token at least. Waits for the kernels ahead, then calls waited(). Chooses the
// experts of the warp's token; ids and weights go to memory if `writes`. A lane looks after PER experts.
//
// Before it waits the first warp on each of the SM's four schedulers, if it has a token, chooses once from the gate's
// weights, as if they were logits, without a result: so the instructions, which nobody has run lately, are in the SM's
// caches when the logits come. (The weights are aligned, and as hidden is 8 or more there are bytes enough.)
template <int PER, typename F>
static __device__ __forceinline__ void moe_choose_experts(const moe_gate_args &gate, const moe_decode_choice &choice,
                                                          bool writes, F waited)
{
    const int lane = threadIdx.x % 32, token = threadIdx.x / 32;
    const bool mine = token < (int)gate.tokens;
    int2 *const pairs = choice.pairs + token * MOE_ROUTED_TOP_K;
    const float *logits = (const float *)gate.gate;
    int top_k = 1;
    uint32_t bit = 0;
#pragma unroll 1
    for (bool real = !mine || token >= 4;; real = true) {
        if (real) {
            moe_grid_wait();
            waited();
            logits = gate.logits + token * gate.experts;
            top_k = gate.top_k;
            bit = 1u << token;
        }
        if (mine) {
            uint32_t key[PER];
            float largest, sum = 0.0f;
            moe_load_keys(gate, logits, key);
            moe_choose_keys<PER, 1>(key, top_k, pairs, [&](uint32_t largest_key) {
                largest = moe_logit_of_key(largest_key);
                if (writes && !gate.renormalize)
                    sum = moe_sum_keys(key, largest);
            });
            if (lane < top_k)
                atomicOr(choice.chosen + pairs[lane].x, bit);
            if (real && writes)
                moe_weigh<1>(gate, largest, sum, gate.ids + token * top_k, gate.weights + token * top_k, pairs,
                             [](int) {});
        }
        if (real)
            return;
        __syncwarp(); // pairs are written again
    }
}

// Fills a walk's list (decode.cuh) from the choice and counts the tiles, by its warp. Returns the rows of the largest
// of this lane's experts. tell(e, rows, first) hears of each expert.
template <typename F>
static __device__ __forceinline__ int32_t moe_list_chosen(const moe_decode_choice &choice, int32_t experts,
                                                          moe_decode_place *list, int32_t &tiles, F tell)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    constexpr int EACH = 4;            // experts of a lane
    constexpr uint32_t TILE = 1 << 16; // in a number that counts tiles and rows
    static_assert(MOE_ROUTED_TOKENS * MOE_ROUTED_TOP_K < TILE, "rows must fit");
    const int lane = threadIdx.x % 32;
    int32_t largest = 0;
    uint32_t before = 0;
#pragma unroll 1
    for (int e0 = 0; e0 < experts; e0 += 32 * EACH) {
        const int e = e0 + lane * EACH;
        const uint4 words = e < experts ? *(const uint4 *)(choice.chosen + e) : uint4();
        const int32_t rows[EACH] = {__popc(words.x), __popc(words.y), __popc(words.z), __popc(words.w)};
        uint32_t sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            largest = max(largest, rows[i]);
            sum += rows[i] + (rows[i] > 0 ? TILE : 0);
        }
        const uint32_t inclusive = (uint32_t)moe_scan_warp((int32_t)sum);
        uint32_t at = before + inclusive - sum;
        before += __shfl_sync(ALL_LANES, inclusive, 31);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int32_t first = (int32_t)(at % TILE);
            if (rows[i] > 0)
                list[at / TILE] = {e + i, first};
            if (e + i < experts)
                tell(e + i, rows[i], first);
            at += rows[i] + (rows[i] > 0 ? TILE : 0);
        }
    }
    tiles = (int32_t)(before / TILE);
    list[tiles] = {tiles, (int32_t)(before % TILE)};
    __syncwarp();
    return largest;
}

// The token of row n of an expert.
static __device__ inline int moe_chosen_token(uint32_t chosen, int n)
{
    for (; n > 0; n--)
        chosen &= chosen - 1;
    return __ffs((int)chosen) - 1;
}

// The plan's pairs, by thread number `thread` of `threads`, when `first` is known.
static __device__ inline void moe_place_chosen(const moe_gate_args &gate, const moe_plan &plan,
                                               const moe_decode_choice &choice, int thread, int threads)
{
    const int pairs = (int)gate.tokens * gate.top_k;
#pragma unroll 1
    for (int i = thread; i < pairs; i += threads) {
        const uint32_t token = (uint32_t)i / (uint32_t)gate.top_k;
        const int2 pair = choice.pairs[token * MOE_ROUTED_TOP_K + i - token * gate.top_k];
        const int rank = __popc(choice.chosen[pair.x] & ((1u << token) - 1));
        moe_place_pair(plan, gate.top_k, i, token, choice.first[pair.x] + rank, __int_as_float(pair.y));
    }
}

#endif
