// SPDX-License-Identifier: Apache-2.0
// What fills the stages of a block of decode's FFN (wgmma.cu): a warp for weights, a warpgroup for tokens.
#ifndef MOE_KERNELS_CUDA_DECODE_WGMMA_LOAD_CUH
#define MOE_KERNELS_CUDA_DECODE_WGMMA_LOAD_CUH

#include "kernels/cuda/decode/first.cuh"
#include "kernels/cuda/decode/pace.cuh"
#include "kernels/cuda/decode/wgmma_block.cuh"

namespace
{

// ---- Weights: a warp, of which one thread starts the copies ----

template <int PER> struct weight_loader : follower {
    using follower::follower;
    moe_ring_place oldest;  // of the stages whose weights are under way
    uint32_t under_way = 0; // how many these are
    uint32_t early = 0;     // stages filled for GEMM 2, up to the whole ring
    uint32_t most_under_way = UNDER_WAY;
    const uint64_t policy = moe_policy_once();
    band_weights source = args.weights[0]; // of the GEMM that the tasks have come to

    __device__ __forceinline__ void await_oldest()
    {
        moe_barrier_wait(shared + WEIGHTS_FULL + oldest.at * 8, oldest.parity);
        oldest.next(stages);
    }

    // The walker sets it, in the last piece (pace.cuh).
    __device__ __forceinline__ void look_at_pace()
    {
        uint32_t most = 0;
        if (threadIdx.x % 32 == 0)
            most = atomicAdd(pace(), 0);
        most_under_way = min(__shfl_sync(0xffffffffu, most, 0), stages);
    }

    __device__ __forceinline__ void load(const moe_decode_task &task)
    {
        if (task.gemm2)
            source = args.weights[1];
        const int first = task.band * MOE_PACKED_ROWS;
        // A box through a tensor map is whole always, what is past the end being zeros.
        const uint32_t bytes = task.band == source.last ? source.last_bytes : TILE_BYTES;
        const uint32_t halves =
            task.group * source.expert + task.band * source.band + task.begin * (bytes / HALF_BYTES);
        const char *from = source.data + (uint64_t)halves * HALF_BYTES;
        int block = task.begin;
        if (PER == 0 && task.guessed > 0) {
            block += task.guessed;
            from += task.guessed * bytes;
        }
#pragma unroll 1
        for (; block < task.end; block++) {
            const bool is_early = task.gemm2 && early < stages;
            early += is_early;
            if (task.last && block % MOE_PACE_STEP == 0)
                look_at_pace();
#pragma unroll 1
            for (under_way++; under_way > (is_early ? args.early : most_under_way); under_way--)
                await_oldest();
            moe_barrier_wait(empty(), stage.parity ^ 1);
            if (moe_elect()) {
                const uint32_t full = weights_full();
                moe_barrier_expect(full, bytes);
                if (args.packed)
                    moe_bulk_load(weights(), from, bytes, full, policy);
                else if (task.gemm2)
                    moe_tensor_load_3d(weights(), &args.w2_rows, block * COLS, first, task.group, full, policy);
                else
                    moe_tensor_load_5d(weights(), &args.w13_rows, block * COLS, 0, 0, first / 16, task.group, full,
                                       policy);
                atomicAdd(asked(), 1);
            }
            from += bytes;
            stage.next(stages);
        }
    }

    // Where the kernel routes: of the first task, ahead of its note, what load() needs, and no more. False: GEMM 1 has
    // no task for this block. `item`, the block's first one, is that of the warp's first lane.
    __device__ __forceinline__ bool find_first(int32_t item, moe_decode_task &task)
    {
        const moe_decode_gemm &gemm = args.decode.gemm[0];
        item = __shfl_sync(0xffffffffu, item, 0);
        for (int32_t fewest = args.fewest_tiles;;) {
            moe_decode_first first = moe_first_of(gemm, item, fewest + threadIdx.x % 32);
            moe_barrier_wait(shared + CHOSEN, 0);
            const moe_chosen_experts<PER> experts(choice(), args.decode.groups);
            const int of = experts.count - fewest;
            if (__builtin_expect(of < 0 || of >= 32, 0)) { // once more, with the right number
                fewest = experts.count;
                continue;
            }
            first = moe_first_from(first, of);
            measure(experts.largest);
            task.gemm2 = task.last = 0;
            task.group = experts.id(first.tile);
            task.band = first.band;
            task.begin = first.begin;
            task.end = first.end;
            return first.tile >= 0;
        }
    }

    // Where it does not: the first blocks of the band that this block guesses, as a task. How many stages the ring has
    // is not known yet; their weights lie where they do with any number. Nobody writes weights (moe_layer_weights), so
    // this does not wait for the kernels ahead.
    __device__ __forceinline__ void guess(moe_decode_task &task)
    {
        const moe_decode_band own = moe_decode_band_of(args.decode.gemm[0], blockIdx.x);
        task.gemm2 = task.last = task.guessed = 0;
        task.group = own.group;
        task.band = own.band;
        task.begin = 0;
        task.end = args.decode.guess;
        stages = MAX_STAGES + 1;
        most_under_way = UNDER_WAY_GUESSED;
    }

    // Goes on when the routing is known, behind the stages that are filled: all of the ring at most.
    __device__ __forceinline__ void end_guess()
    {
        moe_decode_await_plan();
        measure();
        most_under_way = UNDER_WAY;
        if (stage.at == stages)
            stage = {0, 1};
    }

    __device__ void run(int32_t item)
    {
        moe_decode_task task;
        bool ahead = true; // of the task's note, or of the routing
        if constexpr (PER > 0)
            ahead = find_first(item, task);
        else
            guess(task);
        while (ahead || next(task)) {
            load(task);
            if (ahead) {
                if constexpr (PER > 0)
                    next(task); // it tells the same, and its place is free again
                else
                    end_guess();
            }
            ahead = false;
        }
        for (; PER == 0 && under_way > 0; under_way--) // or what is guessed might come when the block has ended
            await_oldest();
    }
};

// ---- Tokens: a warpgroup ----

template <int MOST, bool ROUTES> struct token_loader : follower {
    using follower::follower;

    // A thread brings the same chunk of every 16th token: rows of x, or rows of act, which are in the plan's order.
    __device__ __forceinline__ void load(const moe_decode_task &task)
    {
        constexpr int STRIDE = LOADERS / 8, EACH = MOST / STRIDE;
        const moe_decode_args &d = args.decode;
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const int cols = task.gemm2 ? d.intermediate : d.hidden;
        const int mine = (task.rows - first + STRIDE - 1) / STRIDE;
        const uint32_t row_chunks = cols / 8;
        uint32_t at[EACH]; // where each row begins, in chunks: the host has seen to it that this fits
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (i >= mine)
                break;
            const int n = first + i * STRIDE, row = task.row + n;
            if (task.gemm2)
                at[i] = row * row_chunks;
            else if constexpr (ROUTES)
                at[i] = moe_chosen_token(choice().chosen[task.group], n) * row_chunks;
            else
                at[i] = d.row_token[row] * row_chunks;
        }
        if (task.gemm2) {
            // Each warp looks for itself, so that all of it sees what the multiplying warpgroups have stored.
            while (moe_load_acquire(d.finished + task.tile) < MULTIPLIERS * d.gemm[0].bands)
                ;
        }
        const uint32_t place = first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
        const char *from = (const char *)(task.gemm2 ? d.act : d.x) + chunk * 16 + (int64_t)task.begin * ROW_BYTES;
        int left = cols - chunk * 8 - task.begin * COLS; // columns from this thread's chunk on
#pragma unroll 1
        for (int block = task.begin; block < task.end; block++) {
            moe_barrier_wait(empty(), stage.parity ^ 1);
            const uint32_t to = tokens() + place;
            const int bytes = left > 0 ? 16 : 0; // past the row's end zeros, as in the weights
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (i < mine)
                    moe_cp_async_to(to + i * STRIDE * ROW_BYTES, left > 0 ? from + at[i] * (uint64_t)16 : from, bytes);
            moe_barrier_arrive_cp_async(tokens_full());
            from += ROW_BYTES;
            left -= COLS;
            stage.next(stages);
        }
    }

    // Rows of act that are passed, with eight chunks each in a block: each lane looks for one chunk, so a warp for four
    // rows at once, of one block or, if the tile has fewer, of several, when the first of these is next.
    __device__ __forceinline__ void load_passed(const moe_decode_task &task)
    {
        constexpr int CHUNKS = COLS / 8, OF_WARP = 32 / CHUNKS, OF_ALL = LOADERS / CHUNKS; // rows at once
        static_assert(OF_ALL >= 8 && MOE_PASSED_TOKENS <= 8, "a tile has at most 8 rows then");
        const moe_decode_args &d = args.decode;
        const int thread = threadIdx.x, chunk = thread % CHUNKS, place = thread / CHUNKS;
        const int log2 = 32 - __clz(task.rows - 1); // places of a block: its rows, rounded up to a power of two
        const int row = place & ((1 << log2) - 1), mine = place >> log2, first = place / OF_WARP * OF_WARP >> log2;
        const int blocks = OF_ALL >> log2; // at once
        const int row_chunks = d.intermediate / 8, column = (task.begin + mine) * CHUNKS + chunk;
        const uint4 *from = (const uint4 *)d.passed + (int64_t)(task.row + row) * row_chunks + column;
        int left = min(row_chunks, task.end * CHUNKS) - column; // chunks from this thread's on
        const bool used = row < task.rows;
        uint4 v = {};
#pragma unroll 1
        for (int block = task.begin; block < task.end; block++) {
            const int turn = (block - task.begin) & (blocks - 1);
            if (turn == first) {
                v = uint4(); // past the row's end zeros, as in the weights
                if (used && left > 0) {
                    do
                        v = moe_load_relaxed(from);
                    while (v.x == 0 || v.y == 0 || v.z == 0 || v.w == 0);
                }
                from += blocks * CHUNKS;
                left -= blocks * CHUNKS;
            }
            moe_barrier_wait(empty(), stage.parity ^ 1);
            if (turn == mine && used)
                *reinterpret_cast<uint4 *>(
                    __cvta_shared_to_generic(tokens() + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4))) = v;
            __syncwarp();
            if (thread % 32 == 0)
                moe_barrier_arrive_as(tokens_full(), 32);
            stage.next(stages);
        }
    }

    __device__ void run()
    {
        moe_decode_task task;
        measure();
        while (next(task)) {
            if (!ROUTES)
                for (int i = task.guessed; i < 0; i++) {
                    moe_barrier_arrive(tokens_full());
                    stage.next(stages);
                }
            if (task.gemm2 && is_passed(args.decode))
                load_passed(task);
            else
                load(task);
        }
    }
};

} // namespace

#endif
