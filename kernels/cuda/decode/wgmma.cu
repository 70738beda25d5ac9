// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN for compute capability 9.0: one launch that reads the weights of all experts in use, at the
// speed of memory, from the first tile of GEMM 1 to the last of GEMM 2; once, unless an expert has more rows than a
// tile or guessed weights (below) have to be asked for again.
//
// What a block does is a stream of stages: 64 columns of 128 weight rows, which one bulk copy brings, and of the tokens
// that they are multiplied with. One warp starts the copies of weights as soon as a stage is free, and nothing but a
// full ring ever holds it up: GEMM 2's weights are on their way while GEMM 1's results are not there yet. Four warps
// bring the tokens, and these do wait (wgmma_load.cuh). Two warpgroups multiply, each 64 of the weight rows, as the
// operand m; tokens are n, so that few of them waste nothing (wgmma_multiply.cuh). What takes a while but nobody must
// wait for has warps of its own: finding the tasks to come, and telling other blocks what is in memory. Before all that
// it routes, if tokens are few (route.cuh), and then the first weights are found ahead of their task (first.cuh). Else
// most of the ring fills while others route, with weights that will most likely be needed (decode.cuh, args.guess). How
// fast it asks for the last of them depends on how far others are (pace.cuh).
//
// How long the ring is, and how many tokens a stage has room for, is found on the device: by the largest tile.
#include "kernels/cuda/decode/wgmma.cuh"

#include "kernels/cuda/common/guess.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/weight_map.h"
#include "kernels/cuda/decode/wgmma_load.cuh"
#include "kernels/cuda/decode/wgmma_multiply.cuh"

namespace
{

// ---- Routing, where the kernel does it: all warps, with PER experts a lane ----

__device__ inline bool writes_plan()
{
    return blockIdx.x == gridDim.x - 1;
}

// By each warp, instead of moe_decode_await_plan(): when CHOSEN is complete so is the choice, and the block's first
// item is known. One of the warps `takes` that, and has it returned in its first lane.
template <int PER> __device__ __forceinline__ int32_t choose(const follower &own, bool takes)
{
    int32_t item = 0;
    moe_choose_experts<PER>(own.args.gate, own.choice(), writes_plan(), [&] {
        if (takes)
            item = moe_decode_take(own.args.decode);
    });
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        if (takes)
            *own.first_item() = item;
        moe_barrier_arrive(own.shared + CHOSEN);
    }
    if (!writes_plan())
        moe_grid_launch_dependents();
    return item;
}

// By the multiplying warpgroups of the block that writes the plan, once it knows the experts' first rows: nobody else
// has time. The next kernel reads it without waiting for this one's end: so what all of the block has written of it is
// fenced before the word that lets that one start.
__device__ inline void write_plan(const follower &own)
{
    const int thread = threadIdx.x - LOADERS;
    moe_barrier_wait(own.shared + FIRST_ROWS, 0);
    moe_place_chosen(own.args.gate, own.args.plan, own.choice(), thread, MULTIPLIERS * WARPGROUP);
    __threadfence();
    moe_named_sync(PLAN_WRITTEN, MULTIPLIERS * WARPGROUP);
    moe_grid_launch_dependents();
}

// ---- Finding tasks: a warp ----

template <int PER> struct walker : follower {
    using follower::follower;
    moe_decode_pace reports;

    __device__ void run()
    {
        const bool first = threadIdx.x % 32 == 0;
        moe_decode_place *places = reinterpret_cast<moe_decode_place *>(__cvta_shared_to_generic(shared + PLACES));
        moe_decode_walk walk(args.decode, places);
        int32_t largest;
        if constexpr (PER == 0) {
            moe_decode_await_plan();
            largest = walk.start();
        } else {
            largest = start_routed(walk);
        }
        if (first) {
            *reinterpret_cast<int32_t *>(__cvta_shared_to_generic(shared + LARGEST)) = largest;
            moe_barrier_arrive(shared + MEASURED);
        }
        moe_decode_task task;
        // Blocks, and those guessed that are of no task: they are asked for as well.
        for (int32_t told = args.decode.guess - max(walk.guessed, 0);; told += task.end - task.begin) {
            walk.next(task, [&] {
                if (first)
                    await_asked(walk, told, told - LEAD);
                __syncwarp();
            });
            if (first) {
                moe_barrier_wait(shared + NOTE_EMPTY + note.at * 8, note.parity ^ 1);
                *const_cast<moe_decode_task *>(note_at()) = task;
                moe_barrier_arrive(shared + NOTE_FULL + note.at * 8);
            }
            __syncwarp();
            note.next(NOTES);
            if (task.rows == 0) {
                if (first && walk.in_last_piece())
                    await_asked(walk, told, told);
                return;
            }
        }
    }

    // By one thread, until `enough` of the blocks told have been asked for. Meanwhile it sees to the pace.
    __device__ __forceinline__ void await_asked(const moe_decode_walk &walk, int32_t told, int32_t enough)
    {
        const bool paced = walk.in_last_piece();
        int32_t now, behind;
        while (now = atomicAdd(asked(), 0), now < enough) {
            if (!paced)
                continue;
            if (reports.report(args.decode, walk, told - now, &behind))
                atomicExch(pace(), (uint32_t)max(MOE_PACED_LEAST, min((int)UNDER_WAY + behind / 2, MOE_PACED_MOST)));
            __nanosleep(200); // a block of K takes twice as long and more
        }
    }

    // Makes the list of whatever there is at first, without a result, so that these instructions, too, are in the SM's
    // caches; then of the choice, when the warp has done its part of it and all others theirs. The block that writes
    // the plan writes the counts here.
    __device__ __forceinline__ int32_t start_routed(moe_decode_walk &walk)
    {
        const moe_plan &plan = args.plan;
        const int32_t experts = args.decode.groups;
#pragma unroll 1
        for (bool real = false;; real = true) {
            if (real) {
                choose<PER>(*this, false);
                moe_barrier_wait(shared + CHOSEN, 0);
            }
            const bool writes = real && writes_plan();
            const int32_t largest =
                moe_list_chosen(choice(), experts, walk.list, walk.tiles, [&](int e, int32_t rows, int32_t row) {
                    if (!writes)
                        return;
                    choice().first[e] = row;
                    plan.counts[e] = rows;
                    plan.offsets[e] = row;
                    if (e == experts - 1)
                        plan.offsets[experts] = row + rows;
                });
            if (writes)
                moe_barrier_arrive(shared + FIRST_ROWS); // each lane for itself
            if (real) {
                walk.single = true;
                return walk.start(*first_item(), largest);
            }
        }
    }
};

// MOST: tokens of a tile. PER > 0: it routes, a token by each warp, with so many experts a lane. Then it leaves half of
// the registers, and enough of shared memory, for a block of the logits' kernel: so it can start while that one runs.
constexpr int BESIDE_BYTES = MOE_LOGITS_SHARED_BYTES + 1024; // which the system reserves for each block
constexpr int PER_OF_MOST = 4, PER_OF_MANY = 8;              // as most layers need it, and more
static_assert(MOE_ROUTED_TOKENS <= WARPS, "a warp for each token");
static_assert((227 * 1024 - BESIDE_BYTES - ring_begin(PER_OF_MANY * 32, moe_routed_bytes(PER_OF_MANY * 32)) -
               MULTIPLIERS * MOE_ROUTED_TOKENS * ROW_BYTES) /
                      (TILE_BYTES + MOE_ROUTED_TOKENS * ROW_BYTES) >=
                  UNDER_WAY,
              "as above");

template <typename T, int MOST, int PER>
__global__ void __launch_bounds__(PER > 0 ? 2 * THREADS : THREADS, 1)
    decode_kernel(const __grid_constant__ wgmma_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char decode_memory[];
    uint32_t shared = moe_shared(decode_memory);
    asm volatile("" : "+r"(shared)); // or it is made anew wherever it is used, of a register that is slow to read
    const int warp = threadIdx.x / 32;
    const bool first_lane = threadIdx.x % 32 == 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < MAX_STAGES; i++) {
            moe_barrier_init(shared + WEIGHTS_FULL + i * 8, 1);
            moe_barrier_init(shared + TOKENS_FULL + i * 8, LOADERS);
            moe_barrier_init(shared + EMPTY + i * 8, MULTIPLIERS * WARPGROUP / 32);
        }
        for (int i = 0; i < NOTES; i++) {
            moe_barrier_init(shared + NOTE_FULL + i * 8, 1);
            moe_barrier_init(shared + NOTE_EMPTY + i * 8, (WEIGHT_LOADER + 1) * 32);
        }
        for (int i = 0; i < MULTIPLIERS * MAILS; i++) {
            moe_barrier_init(shared + MAIL_FULL + i * 8, WARPGROUP / 32);
            moe_barrier_init(shared + MAIL_EMPTY + i * 8, 1);
        }
        moe_barrier_init(shared + MEASURED, 1);
        moe_barrier_init(shared + CHOSEN, WARPS);
        moe_barrier_init(shared + FIRST_ROWS, 32);
        *reinterpret_cast<int32_t *>(decode_memory + ASKED) = 0;
        *reinterpret_cast<uint32_t *>(decode_memory + PACE) = UNDER_WAY;
        moe_barrier_init_done();
    }
    if (PER > 0 && args.fetch > 0 && warp == WEIGHT_LOADER && first_lane)
        moe_fetch_guess(args.decode.w13, args.decode.hidden, args.decode.intermediate, args.decode.groups, blockIdx.x,
                        args.fetch);
    if constexpr (PER > 0)
        moe_clear_choice(follower(args, shared).choice(), args.decode.groups);
    if (warp == WALKER && first_lane) { // so that addresses are translated by the time when they are read
        const void *const read_first = PER > 0 ? (const void *)args.gate.logits : args.decode.offsets;
        moe_prefetch_l2((const void *)((uintptr_t)read_first & ~(uintptr_t)15), 16); // logits may be the caller's
        moe_prefetch_l2(args.decode.taken, 16);
        moe_prefetch_l2(args.decode.x, 16);
    }
    __syncthreads();
    if (warp == WALKER) {
        walker<PER>(args, shared).run();
        return;
    }
    int32_t item = 0;
    if constexpr (PER > 0)
        item = choose<PER>(follower(args, shared), warp == WEIGHT_LOADER);
    else if (warp != WEIGHT_LOADER)
        moe_decode_await_plan();
    if (PER > 0 && writes_plan()) { // all but the walker, of which those who write hear with the first rows
        moe_named_sync(CHOICE_MADE, THREADS - 32);
        if (warp >= FIRST_MULTIPLIER && warp < WEIGHT_LOADER)
            write_plan(follower(args, shared));
    }
    if (warp < FIRST_MULTIPLIER)
        token_loader<MOST, (PER > 0)>(args, shared).run();
    else if (warp < WEIGHT_LOADER)
        multiplier<T, MOST>(args, shared).run();
    else if (warp == WEIGHT_LOADER)
        weight_loader<PER>(args, shared).run(item);
    else if (first_lane)
        mailbox{shared, warp - FIRST_HERALD}.run();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "built for 9.0 without its own instructions this kernel would do nothing: build for 90a"
#endif
}

// Tiles asked for before the routing is known, where the kernel does it. With three times as many the routing waits
// longer for what it reads than the weights are there sooner.
constexpr int GUESSED_TILES = 4;

// packed: whether they are; else blocks are whole always.
band_weights weights_of(const void *data, int64_t rows, int64_t cols, bool packed)
{
    const int64_t halves = moe_packed_rows(rows) / MOE_PACKED_LAST_ROWS, blocks = moe_packed_blocks(cols);
    const uint32_t last_bytes = packed && halves % 2 != 0 ? HALF_BYTES : TILE_BYTES;
    return {(const char *)data, (uint32_t)(halves * blocks), (uint32_t)(2 * blocks), (int32_t)((halves - 1) / 2),
            last_bytes};
}

// Blocks of weights to load of a guessed band: as many as fit with the largest tile that there can be, with which the
// ring has the fewest stages; for those that do not fit would be read twice. Most groups should have rows; where some
// have not it costs little, for memory is idle until the routing is known. What is guessed must be items, of which no
// more than the whole bands have owners.
int32_t guessed_blocks(const struct moe_call *call, const moe_decode_args &decode, const uint8_t *stages)
{
    const moe_decode_gemm &gemm = decode.gemm[0];
    const int64_t pairs = call->tokens * call->slots;
    const int32_t whole = moe_work_make(&gemm.work, decode.groups * gemm.bands).whole;
    if (pairs < decode.groups || whole < decode.workers || (MOE_GUESSED_GROUPS - 1) * gemm.bands < decode.workers)
        return 0;
    const int32_t ring = stages[width_of(1 << decode.most_log2)];
    return ring < gemm.work.blocks ? ring : gemm.work.blocks;
}

template <typename T, int MOST, int PER> moe_status launch(const struct moe_call *call, wgmma_args &args)
{
    const int32_t groups = args.decode.groups;
    const int shared = call->exec->shared_bytes - (PER > 0 ? BESIDE_BYTES : 0);
    args.ring_begin = ring_begin(groups, PER > 0 ? moe_routed_bytes(groups) : 0);
    for (int width = 0; width <= MOST / 16; width++) {
        const int piece = tokens_of(width) * ROW_BYTES;
        const int stages = (shared - args.ring_begin - MULTIPLIERS * piece) / (TILE_BYTES + piece);
        args.stages[width] = (uint8_t)(stages < MAX_STAGES ? stages : MAX_STAGES);
    }
    if (PER == 0)
        args.decode.guess = guessed_blocks(call, args.decode, args.stages);
    const auto kernel = decode_kernel<T, MOST, PER>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    moe_launch(kernel, args.decode.workers, THREADS, shared, call->stream, call->exec->compute_capability == 90, args);
    return moe_launched(call->error, "ffn decode");
}

template <typename T> moe_status launch(const struct moe_call *call, wgmma_args &args)
{
    if (!call->ffn_routes)
        return launch<T, MOE_DECODE_TOKENS, 0>(call, args);
    return args.decode.groups <= PER_OF_MOST * 32 ? launch<T, MOE_ROUTED_TOKENS, PER_OF_MOST>(call, args)
                                                  : launch<T, MOE_ROUTED_TOKENS, PER_OF_MANY>(call, args);
}

// The fewest of 32 numbers of tiles, one for each expert chosen, among which the right one is: if experts are chosen
// evenly, the number to be expected is in their middle.
int32_t fewest_tiles(const struct moe_call *call)
{
    const double experts = call->gate.experts, others = 1 - call->gate.top_k / experts;
    double unchosen = experts;
    for (int64_t t = 0; t < call->tokens; t++)
        unchosen *= others;
    const int32_t low = (int32_t)(experts - unchosen) - 16;
    return low > call->gate.top_k ? low : call->gate.top_k;
}

// That a block has, if no two tokens choose the same expert.
int64_t stages_of_gemm2(const struct moe_call *call, const moe_decode_args &decode)
{
    const moe_decode_gemm &gemm = decode.gemm[1];
    return call->tokens * call->slots * gemm.bands * gemm.work.blocks / decode.workers;
}

} // namespace

bool moe_decode_wgmma_routes(const struct moe_call *call)
{
    return call->tokens > 0 && call->tokens <= MOE_ROUTED_TOKENS && call->gate.top_k <= MOE_ROUTED_TOP_K &&
           call->gate.experts <= PER_OF_MANY * 32 && call->plan.expert_group == NULL;
}

moe_status moe_ffn_decode_wgmma(const struct moe_call *call, const moe_decode_args &decode)
{
    wgmma_args args = {};
    args.decode = decode;
    args.gate = call->gate;
    args.plan = call->plan.plan;
    args.packed = call->w13.layout == MOE_LAYOUT_PACKED;
    args.weights[0] = weights_of(call->w13.data, 2 * call->intermediate, call->hidden, args.packed);
    args.weights[1] = weights_of(call->w2.data, call->hidden, call->intermediate, args.packed);
    if (call->ffn_routes && args.packed)
        args.fetch = moe_guessed_tiles(call->tokens * call->slots, decode.groups, GUESSED_TILES);
    args.fewest_tiles = call->ffn_routes ? fewest_tiles(call) : 0;
    args.early = stages_of_gemm2(call, decode) <= FEW_STAGES ? UNDER_WAY_EARLY : UNDER_WAY;
    if (!args.packed) {
        moe_status status = moe_map_w13(call, &args.w13_rows);
        if (status == MOE_OK)
            status = moe_map_w2(call, &args.w2_rows);
        if (status != MOE_OK)
            return status;
    }
    return call->dtype == MOE_F16 ? launch<__half>(call, args) : launch<__nv_bfloat16>(call, args);
}
