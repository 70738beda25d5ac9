// SPDX-License-Identifier: Apache-2.0
// The decode path's FFN on mma.sync: one launch that reads the weights of all experts in use once, with cp.async.
//
// What a block does is a stream of stages in a ring in shared memory: 64 columns of 128 weight rows, and of the tokens
// that they are multiplied with. Around it are warps of four kinds. One walks through the block's tasks and tells
// the others. Four warps bring weights, and nothing but a full ring ever holds them up: GEMM 2's are on their way
// while GEMM 1's results are not there yet. Two bring tokens, and these do wait. Four multiply, each 32 of the weight
// rows, as the operand m; tokens are n, so that few of them waste nothing. While a multiplying warp stores or waits for
// another block, memory has the rest of the ring to fill.
//
// How long the ring is, and how many tokens a stage has room for, is found on the device: by the largest tile.
#include "kernels/cuda/decode/mma.cuh"

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"

namespace
{

struct mma_args {
    moe_decode_args decode;
    bool packed;
    int32_t shared_bytes;
};

constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES, COLS = MOE_PACKED_COLS, TILE_BYTES = MOE_PACKED_TILE_BYTES;
constexpr int MOST = MOE_DECODE_TOKENS;
constexpr int STEPS = COLS / 16; // of 16 columns in a stage

// Threads, in this order; the last warp finds tasks.
constexpr int MULTIPLIERS = 128, WEIGHT_LOADERS = 128, TOKEN_LOADERS = 64;
constexpr int FOLLOWERS = MULTIPLIERS + WEIGHT_LOADERS + TOKEN_LOADERS, THREADS = FOLLOWERS + 32;

// A multiplying warp's part of the band: M_BLOCKS times 16 weight rows.
constexpr int WARPS = MULTIPLIERS / 32, PART = MOE_PACKED_ROWS / WARPS, M_BLOCKS = PART / 16;
constexpr int M_BLOCK_BYTES = 16 * ROW_BYTES;
static_assert(M_BLOCKS == 2, "results leave four chunks at a time");
constexpr int SLOT_WARPS = WARPS / MOE_SLOT_PARTS; // that share a part of a slot

constexpr int MAX_STAGES = 16, LEAST_STAGES = 2;
// Of these, whose weights may be under way at a time: enough to keep memory busy. With all that the ring holds its
// queues fill up, and it delivers less.
constexpr int UNDER_WAY = 6;
// Tasks that the walking warp may be ahead of the last of the others.
constexpr int NOTES = 8;

// Shared memory: barriers, notes, tokens of the largest tile, the list of places, and from the next multiple of 128 on
// the ring.
constexpr int FULL = 0, EMPTY = FULL + MAX_STAGES * 8;
constexpr int NOTE_FULL = EMPTY + MAX_STAGES * 8, NOTE_EMPTY = NOTE_FULL + NOTES * 8, BEGUN = NOTE_EMPTY + NOTES * 8;
constexpr int NOTE = (BEGUN + 8 + 15) / 16 * 16;
constexpr int LARGEST = NOTE + NOTES * sizeof(moe_decode_task);
constexpr int GROUPS = (LARGEST + 4 + 7) / 8 * 8;

__host__ __device__ constexpr int ring_begin(int groups)
{
    return (GROUPS + (groups + 1) * (int)sizeof(moe_decode_place) + 127) / 128 * 128;
}

constexpr int LEAST_BYTES = ring_begin(MOE_MAX_EXPERTS) + LEAST_STAGES * (TILE_BYTES + MOST * ROW_BYTES);
static_assert(LEAST_BYTES <= 99 * 1024, "this fits every GPU from 8.0 on");

// Tokens that are multiplied for a tile of so many rows: more than there are cost less than code for each number.
__device__ inline int width_of(int rows)
{
    return rows <= 8 ? (rows + 7) / 8 * 8 : rows <= 64 ? (rows + 15) / 16 * 16 : (rows + 31) / 32 * 32;
}

// The block's shared memory.
__device__ inline char *memory()
{
    extern __shared__ __align__(128) char bytes[];
    return bytes;
}

// Tokens of the largest tile.
__device__ inline int32_t &largest_tile()
{
    return *reinterpret_cast<int32_t *>(memory() + LARGEST);
}

__device__ inline moe_decode_place *places()
{
    return reinterpret_cast<moe_decode_place *>(memory() + GROUPS);
}

__device__ inline uint32_t barrier(int offset)
{
    return moe_shared(memory() + offset);
}

// Where a note stands: the notes of all rounds through their places are numbered.
struct note_place {
    uint32_t number = 0;

    __device__ uint32_t parity() const // of its round
    {
        return number / NOTES % 2;
    }

    __device__ uint32_t full() const
    {
        return barrier(NOTE_FULL) + number % NOTES * 8;
    }

    __device__ uint32_t empty() const
    {
        return barrier(NOTE_EMPTY) + number % NOTES * 8;
    }

    __device__ moe_decode_task &task() const
    {
        return reinterpret_cast<moe_decode_task *>(memory() + NOTE)[number % NOTES];
    }
};

struct ring {
    uint32_t first; // stage
    uint32_t stage_bytes, stages;
};

// Lanes of a warp that say that it has read a stage. One is enough; racecheck believes each lane for itself, but below
// 9.0 that makes a register spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int READERS = 1;
#else
constexpr int READERS = 32;
#endif

// A stage, and the parity of the ring's round in which it is.
struct stage_place {
    const ring &of;
    uint32_t at; // weights, then tokens
    uint32_t full = barrier(FULL), parity = 0;

    __device__ explicit stage_place(const ring &r) : of(r), at(r.first)
    {
    }

    __device__ uint32_t empty() const
    {
        return full + (EMPTY - FULL);
    }

    __device__ void next()
    {
        full += 8;
        at += of.stage_bytes;
        if (full == barrier(FULL) + of.stages * 8) {
            full = barrier(FULL);
            at = of.first;
            parity ^= 1;
        }
    }
};

// A warp of the block on its way through notes and stages.
struct follower {
    const mma_args &args;
    stage_place stage;
    note_place note;

    __device__ follower(const mma_args &a, const ring &r) : args(a), stage(r)
    {
    }

    // The task that is next, or one without rows: there is nothing left. It stands there until done().
    __device__ __forceinline__ const moe_decode_task &next() const
    {
        moe_barrier_wait(note.full(), note.parity());
        return note.task();
    }

    // By each lane for itself.
    __device__ __forceinline__ void done()
    {
        moe_barrier_arrive(note.empty());
        note.number++;
    }
};

// ---- The walk: one warp ----

// A task is looked for when the weights of the one before it begin to be brought, no earlier: items are there for those
// blocks that have time for them.
__device__ __forceinline__ void walk_tasks(moe_decode_walk &walk)
{
    const bool first_lane = threadIdx.x % 32 == 0;
    for (note_place note;; note.number++) {
        moe_decode_task task;
        walk.next(task, [] {});
        if (first_lane) {
            moe_barrier_wait(note.empty(), note.parity() ^ 1);
            note.task() = task;
            moe_barrier_arrive(note.full());
        }
        if (task.rows == 0)
            return;
        moe_barrier_wait(barrier(BEGUN), note.number % 2);
    }
}

// ---- Weights: four warps ----
//
// Copy i of a thread writes 16 bytes at 2048 i + 16 thread: to row 16 i + thread / 8, place thread % 8. Chunks are
// placed by chunk ^ (row % 8), so a thread brings the same chunk of all its rows. Packed tiles lie in memory as in the
// ring.

struct weight_loader : follower {
    using follower::follower;

    __device__ __forceinline__ void load(const moe_decode_task &task)
    {
        constexpr int LINES = WEIGHT_LOADERS / 8, MOST_COPIES = MOE_PACKED_ROWS / LINES;
        const moe_decode_args &d = args.decode;
        const int thread = threadIdx.x % WEIGHT_LOADERS, line = thread / 8, chunk = (thread % 8) ^ (line % 8);
        const int64_t rows = task.gemm2 ? d.hidden : 2 * (int64_t)d.intermediate;
        const int32_t cols = task.gemm2 ? d.intermediate : d.hidden;
        const int64_t first = (int64_t)task.band * MOE_PACKED_ROWS;

        const char *from = task.gemm2 ? d.w2 : d.w13;
        uint32_t next_copy, next_block; // bytes to them
        int copies;
        int left; // columns from this thread's chunk on
        if (args.packed) {
            const int64_t there = moe_packed_rows(rows) - first; // 64 in some last bands
            const int band_rows = there < MOE_PACKED_ROWS ? (int)there : MOE_PACKED_ROWS;
            next_copy = LINES * ROW_BYTES;
            next_block = band_rows * ROW_BYTES;
            copies = band_rows / LINES;
            left = INT32_MAX;
            from += task.group * moe_packed_expert_bytes(rows, cols) + first * moe_packed_blocks(cols) * ROW_BYTES +
                    (int64_t)task.begin * next_block + thread * 16;
        } else {
            // In the packed order: of w13 eight gate rows, eight up rows.
            const uint32_t row_bytes = cols * 2u;
            const int64_t row = task.gemm2 ? first + line : first / 2 + line % 8 + (int64_t)(line / 8) * d.intermediate;
            next_copy = row_bytes * (task.gemm2 ? LINES : LINES / 2);
            next_block = ROW_BYTES;
            copies = (int)((rows - first - line + LINES - 1) / LINES);
            left = cols - task.begin * COLS - chunk * 8;
            from += (task.group * rows + row) * row_bytes + (int64_t)task.begin * ROW_BYTES + chunk * 16;
        }

        for (int block = task.begin; block < task.end; block++) {
            moe_barrier_wait(stage.empty(), stage.parity ^ 1);
            moe_cp_async_wait<UNDER_WAY - 1>();
            const uint32_t to = stage.at + thread * 16;
            const int bytes = left > 0 ? 16 : 0; // past the row's end zeros, as in packed weights
#pragma unroll
            for (int i = 0; i < MOST_COPIES; i++)
                if (i < copies)
                    moe_cp_async_to(to + i * LINES * ROW_BYTES, from + (uint64_t)next_copy * i, bytes);
            moe_cp_async_commit();
            moe_barrier_arrive_cp_async(stage.full);
            from += next_block;
            left -= args.packed ? 0 : COLS;
            stage.next();
        }
    }

    __device__ void run()
    {
        for (;;) {
            const moe_decode_task task = next();
            done();
            if (task.rows == 0)
                return;
            if (threadIdx.x % WEIGHT_LOADERS == 0)
                moe_barrier_arrive(barrier(BEGUN));
            load(task);
        }
    }
};

// ---- Tokens: two warps ----

struct token_loader : follower {
    using follower::follower;

    // A thread brings the same chunk of every eighth token: rows of x, or rows of act, which are in the plan's order.
    __device__ __forceinline__ void load(const moe_decode_task &task)
    {
        constexpr int LINES = TOKEN_LOADERS / 8, MOST_COPIES = MOST / LINES;
        static_assert(LINES == 8, "a thread's chunks have the same place in all its rows");
        const moe_decode_args &d = args.decode;
        const int thread = threadIdx.x % TOKEN_LOADERS, line = thread / 8, chunk = (thread % 8) ^ line;
        const int32_t cols = task.gemm2 ? d.intermediate : d.hidden;
        const uint32_t row_bytes = cols * 2u;
        const int copies = (task.rows - line + LINES - 1) / LINES;
        uint32_t row[MOST_COPIES];
#pragma unroll
        for (int i = 0; i < MOST_COPIES; i++) {
            const int32_t r = task.row + i * LINES + line;
            row[i] = i >= copies ? 0 : task.gemm2 ? r : d.row_token[r];
        }
        if (task.gemm2) {
            // Each thread looks for itself, so that its copies read what the multiplying warps have stored.
            while (moe_load_acquire(d.finished + task.tile) < WARPS * d.gemm[0].bands)
                ;
        }

        const char *from = (const char *)(task.gemm2 ? d.act : d.x) + (int64_t)task.begin * ROW_BYTES + chunk * 16;
        int left = cols - task.begin * COLS - chunk * 8; // columns from this thread's chunk on
        for (int block = task.begin; block < task.end; block++) {
            moe_barrier_wait(stage.empty(), stage.parity ^ 1);
            const uint32_t to = stage.at + TILE_BYTES + thread * 16;
            const int bytes = left > 0 ? 16 : 0; // past the row's end zeros, as in the weights
#pragma unroll
            for (int i = 0; i < MOST_COPIES; i++)
                if (i < copies)
                    moe_cp_async_to(to + i * LINES * ROW_BYTES, from + (uint64_t)row_bytes * row[i], bytes);
            moe_barrier_arrive_cp_async(stage.full);
            from += ROW_BYTES;
            left -= COLS;
            stage.next();
        }
    }

    __device__ void run()
    {
        for (;;) {
            const moe_decode_task task = next();
            done();
            if (task.rows == 0)
                return;
            load(task);
        }
    }
};

// ---- Multiplying: four warps, each for itself ----
//
// Of a block of 16 weight rows and 8 tokens a lane holds rows lane / 4 and 8 more, tokens 2 (lane % 4) and one more. In
// w13 these rows are gate and up of one feature.

template <typename T> struct multiplier : follower {
    using follower::follower;

    static __device__ int warp()
    {
        return moe_thread_again() / 32;
    }

    static __device__ int lane()
    {
        return moe_thread_again() % 32;
    }

    // N: of tokens, width_of(task.rows).
    template <int N> struct sums {
        float of[N / 8][M_BLOCKS][4];
    };

    template <int N> __device__ __forceinline__ void multiply(sums<N> &sum, int blocks)
    {
        // Where this lane reads, in the first 16 columns of a stage: of weights 16 rows, first chunk, then the second;
        // of tokens both chunks of 8 rows, then of the next 8, or, where there are only 8 rows, four chunks. Further
        // columns are at this ^ 32, ^ 64 and ^ 96.
        const int lane = this->lane();
        const uint32_t weight = warp() * PART * ROW_BYTES + lane % 16 * ROW_BYTES + ((lane / 16) ^ (lane % 8)) * 16;
        const uint32_t token =
            TILE_BYTES + (N == 8 ? lane % 8 * ROW_BYTES + ((lane / 8) ^ (lane % 8)) * 16
                                 : (lane % 8 + lane / 16 * 8) * ROW_BYTES + ((lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int m = 0; m < M_BLOCKS; m++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sum.of[j][m][e] = 0.0f;

        for (int block = 0; block < blocks; block++) {
            const uint32_t from_weights = stage.at + weight, from_tokens = stage.at + token;
            moe_barrier_wait(stage.full, stage.parity);
            uint32_t b[4];
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t a[M_BLOCKS][4];
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++)
                    moe_ldmatrix_at(a[m], (from_weights ^ (k * 32)) + m * M_BLOCK_BYTES);
                if constexpr (N == 8) {
                    if (k % 2 == 0)
                        moe_ldmatrix_at(b, from_tokens ^ (k * 32));
#pragma unroll
                    for (int m = 0; m < M_BLOCKS; m++)
                        moe_mma(sum.of[0][m], a[m], b[k % 2 * 2], b[k % 2 * 2 + 1], T());
                } else {
#pragma unroll
                    for (int j = 0; j < N / 8; j += 2) {
                        moe_ldmatrix_at(b, (from_tokens ^ (k * 32)) + j * 8 * ROW_BYTES);
#pragma unroll
                        for (int m = 0; m < M_BLOCKS; m++) {
                            moe_mma(sum.of[j][m], a[m], b[0], b[1], T());
                            moe_mma(sum.of[j + 1][m], a[m], b[2], b[3], T());
                        }
                    }
                }
            }
            __syncwarp();
            if (lane < READERS)
                moe_barrier_arrive(stage.empty());
            stage.next();
        }
    }

    // ---- Partial sums: each lane's registers, four at a time, as they are ----

    // A part of a slot is in a state when all warps that share it have counted it up to there.
    __device__ int32_t *slot_state(int slot) const
    {
        return args.decode.slot_state + slot * MOE_SLOT_PARTS + warp() / SLOT_WARPS;
    }

    __device__ float4 *slot_sums(int slot) const
    {
        const int64_t floats = (int64_t)MOE_PACKED_ROWS << args.decode.most_log2;
        return reinterpret_cast<float4 *>(args.decode.sums + slot * floats + warp() * (floats / WARPS)) + lane();
    }

    // Waits until the slots are in this state. A lane looks at each.
    __device__ __forceinline__ void await(int first, int slots, int32_t state) const
    {
        for (int i = lane(); i < slots; i += 32)
            while (moe_load_acquire(slot_state(first + i)) < state * SLOT_WARPS)
                ;
        __syncwarp();
    }

    // After all that the warp has done to them.
    __device__ __forceinline__ void advance(int first, int slots, int32_t states) const
    {
        __syncwarp();
        for (int i = lane(); i < slots; i += 32)
            moe_add_release(slot_state(first + i), states);
    }

    template <int N> __device__ __forceinline__ void leave_sums(const sums<N> &sum, const moe_decode_task &task) const
    {
        if (task.slot_free != MOE_SLOT_FREE)
            await(task.own_slot, 1, task.slot_free);
        float4 *to = slot_sums(task.own_slot);
#pragma unroll
        for (int j = 0; j < N / 8; j++)
            if (j * 8 < task.rows)
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++) {
                    const float *v = sum.of[j][m];
                    to[(j * M_BLOCKS + m) * 32] = make_float4(v[0], v[1], v[2], v[3]);
                }
        advance(task.own_slot, 1, (task.gemm2 ? MOE_SLOT_SUM2 : MOE_SLOT_SUM1) - task.slot_free);
    }

    template <int N> __device__ __forceinline__ void add_sums(sums<N> &sum, const moe_decode_task &task) const
    {
        constexpr int TOGETHER = N < 32 ? 4 : 1; // slots, whose sums are on their way at a time
        if (task.slots == 0)
            return;
        await(task.first_slot, task.slots, task.gemm2 ? MOE_SLOT_SUM2 : MOE_SLOT_SUM1);
        const int64_t next = ((int64_t)MOE_PACKED_ROWS << args.decode.most_log2) / 4;
        const float4 *from = slot_sums(task.first_slot);
#pragma unroll TOGETHER
        for (int i = 0; i < task.slots; i++, from += next)
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                if (j * 8 < task.rows)
#pragma unroll
                    for (int m = 0; m < M_BLOCKS; m++) {
                        const float4 v = __ldcg(from + (j * M_BLOCKS + m) * 32);
                        float *s = sum.of[j][m];
                        s[0] += v.x;
                        s[1] += v.y;
                        s[2] += v.z;
                        s[3] += v.w;
                    }
        if (!task.gemm2 && args.decode.gemm2_slots == 0)
            advance(task.first_slot, task.slots, MOE_SLOT_READ1 - MOE_SLOT_SUM1);
    }

    // ---- Results: four chunks of 16 bytes at a time, turned to rows of tokens, so that whole sectors are stored ----

    template <int N> __device__ __forceinline__ void finish_gated(const sums<N> &sum, const moe_decode_task &task) const
    {
        constexpr int TOGETHER = N == 8 ? 1 : 2; // blocks of 8 tokens
        const moe_decode_args &d = args.decode;
        const int lane = this->lane();
        const int32_t column = task.band * (MOE_PACKED_ROWS / 2) + warp() * (PART / 2) + lane % 2 * 8;
        T *to = (T *)d.act + (int64_t)task.row * d.intermediate + column;
#pragma unroll
        for (int j = 0; j < N / 8; j += TOGETHER) {
            uint32_t v[4] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER * M_BLOCKS; i++) {
                const float *s = sum.of[j + i / M_BLOCKS][i % M_BLOCKS];
                v[i] = moe_transpose_8x8(moe_pair(moe_silu_fast(s[0]) * s[2], moe_silu_fast(s[1]) * s[3], T()));
            }
            const uint4 chunk = moe_transpose_quad(lane, v[0], v[1], v[2], v[3]);
            const int r = (j + lane / M_BLOCKS % 2) * 8 + lane / 4;
            if (lane % 4 < TOGETHER * M_BLOCKS && r < task.rows && column < d.intermediate)
                *reinterpret_cast<uint4 *>(to + (int64_t)r * d.intermediate) = chunk;
        }
        __syncwarp();
        if (lane == 0)
            moe_add_release(d.finished + task.tile, 1);
    }

    template <int N> __device__ __forceinline__ void finish_down(const sums<N> &sum, const moe_decode_task &task) const
    {
        const moe_decode_args &d = args.decode;
        const int lane = this->lane();
        const int32_t column = task.band * MOE_PACKED_ROWS + warp() * PART + lane % 4 * 8;
        T *to = (T *)d.down + (int64_t)task.row * d.hidden + column;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *s = sum.of[j][i / 2] + i % 2 * 2;
                v[i] = moe_transpose_8x8(moe_pair(s[0], s[1], T()));
            }
            const uint4 chunk = moe_transpose_quad(lane, v[0], v[1], v[2], v[3]);
            const int r = j * 8 + lane / 4;
            if (r < task.rows && column < d.hidden)
                *reinterpret_cast<uint4 *>(to + (int64_t)r * d.hidden) = chunk;
        }
    }

    template <int N> __device__ __forceinline__ void work(const moe_decode_task &task)
    {
        sums<N> sum;
        multiply(sum, task.end - task.begin);
        if (task.own_slot >= 0) {
            leave_sums(sum, task);
            return;
        }
        add_sums(sum, task);
        if (task.gemm2)
            finish_down(sum, task);
        else
            finish_gated(sum, task);
    }

    __device__ void run()
    {
        for (;; done()) {
            const moe_decode_task &task = next();
            switch (width_of(task.rows)) {
            case 0:
                return;
            case 8:
                work<8>(task);
                break;
            case 16:
                work<16>(task);
                break;
            case 32:
                work<32>(task);
                break;
            case 48:
                work<48>(task);
                break;
            case 64:
                work<64>(task);
                break;
            case 96:
                work<96>(task);
                break;
            default:
                work<MOST>(task);
                break;
            }
        }
    }
};

template <typename T> __global__ void __launch_bounds__(THREADS, 1) mma_kernel(const __grid_constant__ mma_args args)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < MAX_STAGES; i++) {
            moe_barrier_init(barrier(FULL) + i * 8, WEIGHT_LOADERS + TOKEN_LOADERS);
            moe_barrier_init(barrier(EMPTY) + i * 8, WARPS * READERS);
        }
        for (int i = 0; i < NOTES; i++) {
            moe_barrier_init(barrier(NOTE_FULL) + i * 8, 1);
            moe_barrier_init(barrier(NOTE_EMPTY) + i * 8, FOLLOWERS);
        }
        moe_barrier_init(barrier(BEGUN), 1);
    }
    moe_decode_walk walk(args.decode, places());
    moe_decode_await_plan();
    if (threadIdx.x >= FOLLOWERS) {
        const int32_t largest = walk.start();
        if (threadIdx.x % 32 == 0)
            largest_tile() = largest;
    }
    __syncthreads();
    const int begin = ring_begin(args.decode.groups);
    const uint32_t stage_bytes = TILE_BYTES + width_of(largest_tile()) * ROW_BYTES;
    const uint32_t stages = (args.shared_bytes - begin) / stage_bytes;
    const ring stages_of{moe_shared(memory() + begin), stage_bytes, min(stages, (uint32_t)MAX_STAGES)};

    if (threadIdx.x < MULTIPLIERS)
        multiplier<T>(args, stages_of).run();
    else if (threadIdx.x < MULTIPLIERS + WEIGHT_LOADERS)
        weight_loader(args, stages_of).run();
    else if (threadIdx.x < FOLLOWERS)
        token_loader(args, stages_of).run();
    else
        walk_tasks(walk);
}

template <typename T> moe_status launch(const struct moe_call *call, const mma_args &args)
{
    cudaFuncSetAttribute(mma_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, args.shared_bytes);
    moe_launch(mma_kernel<T>, args.decode.workers, THREADS, args.shared_bytes, call->stream,
               call->exec->compute_capability == 90, args);
    return moe_launched(call->error, "ffn decode mma");
}

} // namespace

moe_status moe_decode_mma_check(const struct moe_exec *exec, struct moe_error *why)
{
    if (exec->shared_bytes >= LEAST_BYTES)
        return MOE_OK;
    return moe_fail(why, MOE_ERROR_UNSUPPORTED,
                    "decode configuration 'mma' takes %d bytes of shared memory, this GPU has %d a block", LEAST_BYTES,
                    (int)exec->shared_bytes);
}

moe_status moe_ffn_decode_mma(const struct moe_call *call, const moe_decode_args &decode)
{
    const mma_args args = {decode, call->w13.layout == MOE_LAYOUT_PACKED, call->exec->shared_bytes};
    return call->dtype == MOE_F16 ? launch<__half>(call, args) : launch<__nv_bfloat16>(call, args);
}
