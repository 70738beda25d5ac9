// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM of compute capability 9.0: one launch for both GEMMs of all groups.
//
// A block is three warpgroups. One loads: weights by bulk copies, tokens of GEMM 1 row by row through row_token (so
// that no permuted copy of them is ever made), rows of GEMM 2 by tensor copies. Two multiply: each has 128 of an item's
// 256 weight rows, as the operand m, and all of its tokens, as n; so a tile of tokens wastes nothing however few they
// are, up to a step of 16. Between them is a ring of stages in shared memory, 64 columns of both operands each, which
// goes on from item to item without a pause.
//
// What L2 can deliver is the limit, more than the tensor cores: hence the broad band of weights, and blocks in clusters
// of two that share one band for two tiles of tokens, each block loading half of the weights for both.
//
// Weight rows alternate between gate and up in eights, which puts the gate and up of a feature into registers of one
// thread. The finished tile is turned to rows of tokens on its way through shared memory.
//
// Items are taken from one counter in the order of the list. Those of GEMM 2 come after all those of GEMM 1 whose
// results they read, so that what an item waits for is always done or being done, on however few blocks the grid runs.
#ifndef MOE_KERNELS_CUDA_PREFILL_FFN_CUH
#define MOE_KERNELS_CUDA_PREFILL_FFN_CUH

#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/hopper.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/prefill/prefill.cuh"

namespace
{

struct ffn_args {
    CUtensorMap act_64, act_16;    // act [R][I] in boxes of 64 and of 16 rows
    CUtensorMap down_32;           // down [R][H] in boxes of 32 rows
    CUtensorMap w13_rows, w2_rows; // row-major weights, in the order of the packed layout
    const void *x;                 // [T][H]
    const int32_t *row_token;      // [R]
    void *act, *down;              // [R][I], [R][H]
    const char *w13, *w2;          // packed; NULL: row-major
    moe_schedule *schedule;
    int32_t *finished;
    const moe_item *items;
    int32_t hidden, intermediate;
    int32_t bands1, bands2;
};

constexpr int WARPGROUP = 128;
constexpr int MULTIPLIERS = 2; // warpgroups
constexpr int FFN_THREADS = (1 + MULTIPLIERS) * WARPGROUP;
constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES, COLS = MOE_PACKED_COLS, TILE_BYTES = MOE_PACKED_TILE_BYTES;
constexpr int WEIGHT_BYTES = MULTIPLIERS * TILE_BYTES; // in a stage
constexpr int M_BLOCKS = 2;                            // of 64 weight rows, to a warpgroup
constexpr int SLOTS = 2;                               // items known in advance

// The finished tile goes out by slices of tokens. Of GEMM 1 a warpgroup has 64 features of a token, of GEMM 2 128.
constexpr int SLICE1 = 64, SLICE2 = 32;
constexpr int SLICE_BYTES = SLICE1 * ROW_BYTES;

// NMAX tokens to a tile, CLUSTER blocks, STAGES in the ring, SLICES of the finished tile at once on their way out.
template <int NMAX_, int CLUSTER_, int STAGES_, int SLICES_> struct ffn_shape {
    static constexpr int NMAX = NMAX_, CLUSTER = CLUSTER_, STAGES = STAGES_, SLICES = SLICES_;

    // Shared memory.
    static constexpr int STAGE = WEIGHT_BYTES + NMAX * ROW_BYTES;
    static constexpr int OUT = STAGES * STAGE, OUT_BYTES = SLICES * SLICE_BYTES; // of each multiplying warpgroup
    static constexpr int FULL = OUT + MULTIPLIERS * OUT_BYTES, EMPTY = FULL + STAGES * 8;
    static constexpr int SLOT_FULL = EMPTY + STAGES * 8, SLOT_EMPTY = SLOT_FULL + SLOTS * 8;
    static constexpr int ITEMS = (SLOT_EMPTY + SLOTS * 8 + 15) / 16 * 16;
    static constexpr int BYTES = ITEMS + SLOTS * sizeof(moe_item);
    static_assert(STAGE % 1024 == 0 && NMAX % 64 == 0 && SLICES >= 2);
    static_assert(BYTES <= 227 * 1024, "a block of compute capability 9.0 has no more shared memory");
};

// A place in a ring of N, and the parity of the phase in which it is used.
template <int N> struct ring_place {
    uint32_t at = 0, parity = 0;
    __device__ void next()
    {
        if (++at == N) {
            at = 0;
            parity ^= 1;
        }
    }
};

// Arrives at a barrier of block `rank` of the cluster. A block that is alone is no cluster to these instructions.
template <int CLUSTER> __device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank)
{
    if constexpr (CLUSTER == 1)
        moe_barrier_arrive(barrier);
    else
        moe_cluster_arrive(moe_shared_of(barrier, rank));
}

// A block's part of an item.
struct ffn_work {
    int row, rows, tile, group, band;
    bool gemm2;
};

// Where both kinds of warpgroups read what is next.
template <class Shape> struct item_reader {
    const uint32_t shared, rank;
    ring_place<SLOTS> slot;

    // False: there is nothing left. Called by whole warps.
    __device__ __forceinline__ bool next(ffn_work &work)
    {
        moe_barrier_wait(shared + Shape::SLOT_FULL + slot.at * 8, slot.parity);
        const int4 *slots = reinterpret_cast<const int4 *>(__cvta_shared_to_generic(shared + Shape::ITEMS));
        const int4 v = slots[slot.at];
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            arrive_at<Shape::CLUSTER>(shared + Shape::SLOT_EMPTY + slot.at * 8, 0);
        slot.next();
        const int first = v.y & 0xffff, second = v.y >> 16;
        work.row = v.x + (rank ? first : 0);
        work.rows = rank ? second : first;
        work.tile = v.z;
        work.group = v.w & (MOE_ITEM_GROUPS - 1);
        work.band = (uint32_t)v.w >> MOE_ITEM_BAND_SHIFT;
        work.gemm2 = v.w & MOE_ITEM_GEMM2;
        return first > 0;
    }
};

// ---- Loading ----

// Where an item's weights come from, for the threads that start their copies: two tiles of up to 128 rows.
struct weight_source {
    const char *packed; // the band's first tile; NULL: through `map`
    int64_t next_tile;  // bytes to the second one
    uint32_t bytes[2];  // of each tile in a stage; 0 past the last row
    const CUtensorMap *map;
    int group, row;
    bool gemm2;

    __device__ weight_source(const ffn_args &args, const ffn_work &work)
    {
        group = work.group;
        row = work.band * MOE_BAND_ROWS;
        gemm2 = work.gemm2;
        map = gemm2 ? &args.w2_rows : &args.w13_rows;
        const char *base = gemm2 ? args.w2 : args.w13;
        const int64_t rows = gemm2 ? args.hidden : 2 * (int64_t)args.intermediate;
        const int64_t cols = gemm2 ? args.intermediate : args.hidden;
        next_tile = TILE_BYTES * moe_packed_blocks(cols);
        packed = base == NULL ? NULL
                              : base + group * moe_packed_expert_bytes(rows, cols) + row / MOE_PACKED_ROWS * next_tile;
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const int64_t left = moe_packed_rows(rows) - row - m * MOE_PACKED_ROWS;
            const bool whole = left >= MOE_PACKED_ROWS || (left > 0 && base == NULL);
            bytes[m] = whole ? TILE_BYTES : left > 0 ? (uint32_t)left * ROW_BYTES : 0;
        }
    }

    // Tile m of a block of columns, to all blocks of the cluster.
    template <int CLUSTER> __device__ __forceinline__ void load(int m, uint32_t to, int block, uint32_t barrier) const
    {
        constexpr uint16_t all = (1 << CLUSTER) - 1;
        const int first = row + m * MOE_PACKED_ROWS;
        to += m * TILE_BYTES;
        const uint32_t own = m == 0 ? bytes[0] : bytes[1];
        if (own == 0)
            return;
        if (packed != NULL) {
            const char *from = packed + m * next_tile + (int64_t)block * own;
            if constexpr (CLUSTER == 1)
                moe_bulk_load(to, from, own, barrier);
            else
                moe_bulk_load_all(to, from, own, barrier, all);
        } else if (gemm2) {
            if constexpr (CLUSTER == 1)
                moe_tensor_load_3d(to, map, block * COLS, first, group, barrier);
            else
                moe_tensor_load_3d_all(to, map, block * COLS, first, group, barrier, all);
        } else { // 8 rows, gate or up, eights of rows
            if constexpr (CLUSTER == 1)
                moe_tensor_load_5d(to, map, block * COLS, 0, 0, first / 16, group, barrier);
            else
                moe_tensor_load_5d_all(to, map, block * COLS, 0, 0, first / 16, group, barrier, all);
        }
    }
};

template <typename T, class Shape> struct ffn_loader {
    const ffn_args &args;
    const uint32_t shared, rank;
    ring_place<Shape::STAGES> stage;

    __device__ uint32_t full() const
    {
        return shared + Shape::FULL + stage.at * 8;
    }

    __device__ uint32_t tokens() const
    {
        return shared + stage.at * Shape::STAGE + WEIGHT_BYTES;
    }

    __device__ void wait_empty() const
    {
        moe_barrier_wait(shared + Shape::EMPTY + stage.at * 8, stage.parity ^ 1);
    }

    // By one thread: the stage's weights, in a cluster one tile by each block; and word of `token_bytes` to come.
    __device__ __forceinline__ void load_weights(const weight_source &source, int block, uint32_t token_bytes) const
    {
        const uint32_t to = shared + stage.at * Shape::STAGE;
        moe_barrier_expect(full(), source.bytes[0] + source.bytes[1] + token_bytes);
        if constexpr (Shape::CLUSTER == 1) {
            source.template load<1>(0, to, block, full());
            source.template load<1>(1, to, block, full());
        } else {
            source.template load<2>(rank, to, block, full());
        }
    }

    // GEMM 1. A thread brings the same chunk of every 16th token.
    __device__ __forceinline__ void gather(const ffn_work &work)
    {
        constexpr int STRIDE = WARPGROUP / 8, MOST = Shape::NMAX / STRIDE;
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const weight_source source(args, work);
        const uint32_t row_chunks = args.hidden / 8;
        const int mine = (work.rows - first + STRIDE - 1) / STRIDE;
        uint32_t at[MOST]; // where each row begins in x, in chunks: the host has seen to it that this fits
#pragma unroll
        for (int i = 0; i < MOST; i++)
            at[i] = i < mine ? args.row_token[work.row + first + i * STRIDE] * row_chunks : 0;

        const uint32_t place = first * ROW_BYTES + ((chunk ^ (first & 7)) << 4);
        const char *from = (const char *)args.x + chunk * 16;
        int left = args.hidden - chunk * 8; // columns from this thread's chunk on
        for (int block = 0; block * COLS < args.hidden; block++) {
            wait_empty();
            if (threadIdx.x == 0)
                load_weights(source, block, 0);
            const uint32_t to = tokens() + place;
            const int bytes = left > 0 ? 16 : 0; // past the row's end zeros, as in the weights
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (i < mine)
                    moe_cp_async_to(to + i * STRIDE * ROW_BYTES, from + at[i] * (uint64_t)16, bytes);
            moe_barrier_arrive_cp_async(full());
            from += ROW_BYTES;
            left -= COLS;
            stage.next();
        }
    }

    // GEMM 2. Rows past the item's are those of its neighbour, or zeros past the end of act; nobody keeps their
    // products.
    __device__ __forceinline__ void stream(const ffn_work &work)
    {
        const weight_source source(args, work);
        const int steps = (work.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP;
        if (threadIdx.x == 0) {
            const int32_t all = Shape::CLUSTER * MULTIPLIERS * args.bands1;
            while (moe_load_acquire(args.finished + work.tile) < all)
                ;
            moe_fence_async(); // what other blocks stored comes before the tensor copies
        }
        for (int block = 0; block * COLS < args.intermediate; block++) {
            wait_empty();
            if (threadIdx.x == 0) {
                load_weights(source, block, steps * MOE_ROW_STEP * ROW_BYTES);
                uint32_t to = tokens();
                int row = work.row;
                for (int i = 0; i < steps / 4; i++, row += 64, to += 64 * ROW_BYTES)
                    moe_tensor_load_2d(to, &args.act_64, block * COLS, row, full());
                for (int i = 0; i < steps % 4; i++, row += 16, to += 16 * ROW_BYTES)
                    moe_tensor_load_2d(to, &args.act_16, block * COLS, row, full());
            }
            moe_barrier_arrive(full());
            stage.next();
        }
    }

    // The next item, to all blocks of the cluster, by one thread of its first block. `next` is its number.
    __device__ __forceinline__ void hand_out(const ring_place<SLOTS> &slot, int32_t items, int32_t &next) const
    {
        int4 item = {};
        if (next < items) {
            item = *reinterpret_cast<const int4 *>(args.items + next);
            next = atomicAdd(&args.schedule->taken, 1); // arrives while the item is loaded
        }
        const uint32_t place = shared + Shape::ITEMS + slot.at * sizeof(moe_item);
        const uint32_t full = shared + Shape::SLOT_FULL + slot.at * 8;
        moe_barrier_wait(shared + Shape::SLOT_EMPTY + slot.at * 8, slot.parity ^ 1);
        if constexpr (Shape::CLUSTER == 1) {
            *reinterpret_cast<int4 *>(__cvta_shared_to_generic(place)) = item;
            moe_barrier_arrive(full);
        } else {
#pragma unroll
            for (int r = 0; r < Shape::CLUSTER; r++)
                moe_cluster_store(moe_shared_of(place, r), item, moe_shared_of(full, r));
        }
    }

    __device__ __forceinline__ void run()
    {
        item_reader<Shape> reader{shared, rank};
        const bool first = threadIdx.x == 0;
        const int32_t items = args.schedule->items;
        int32_t next = first && rank == 0 ? atomicAdd(&args.schedule->taken, 1) : 0;
        ffn_work work;
        for (;;) {
            if (first) {
                if constexpr (Shape::CLUSTER > 1)
                    moe_barrier_expect(shared + Shape::SLOT_FULL + reader.slot.at * 8, sizeof(moe_item));
                if (rank == 0)
                    hand_out(reader.slot, items, next);
            }
            if (!reader.next(work))
                return;
            if (work.gemm2)
                stream(work);
            else
                gather(work);
        }
    }
};

// ---- Multiplying ----

__device__ inline uint32_t pack2(float a, float b, __nv_bfloat16)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&v);
}

__device__ inline uint32_t pack2(float a, float b, __half)
{
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&v);
}

// silu(gate) * up of two features, with one division for both; exponentials and division are good to two units in the
// last place of fp32, and the result is rounded to 16 bits. The product of the divisors must not overflow: below -40
// silu is smaller than any 16-bit number beside its up.
template <typename T> __device__ inline uint32_t gated(const float *gate, const float *up)
{
    const float a = 1.0f + __expf(fminf(-gate[0], 40.0f)), b = 1.0f + __expf(fminf(-gate[1], 40.0f));
    const float inverse = __fdividef(1.0f, a * b);
    return pack2(gate[0] * up[0] * (b * inverse), gate[1] * up[1] * (a * inverse), T());
}

template <typename T, class Shape> struct ffn_multiplier {
    const ffn_args &args;
    const uint32_t shared, rank;
    const int half, thread; // which warpgroup of the two, and which thread in it
    ring_place<Shape::STAGES> stage;
    int slice = 0;      // the next place for a slice
    int unsettled = -1; // the tile of a GEMM 1 item whose results are still on their way out
    float d[M_BLOCKS][Shape::NMAX / 2];

    __device__ ffn_multiplier(const ffn_args &a, uint32_t s, uint32_t r)
        : args(a), shared(s), rank(r), half(threadIdx.x / WARPGROUP - 1), thread(threadIdx.x % WARPGROUP)
    {
    }

    // To each block of the cluster, since each of them loads into all.
    __device__ void release(uint32_t at) const
    {
        if (thread % 32 < Shape::CLUSTER)
            arrive_at<Shape::CLUSTER>(shared + Shape::EMPTY + at * 8, thread % 32);
    }

    // Lets GEMM 2 have a tile's results when they are in memory.
    __device__ __forceinline__ void settle()
    {
        if (thread == 0) {
            moe_store_wait();
            moe_fence_async();
            moe_add_release(args.finished + unsettled, 1);
        }
        unsettled = -1;
    }

    // d = weights . tokens^T over `blocks` stages. The products of a stage run while the next one's are issued.
    template <int N> __device__ __forceinline__ void multiply(int blocks)
    {
        uint32_t before = 0;
        for (int block = 0; block < blocks; block++) {
            const uint32_t base = shared + stage.at * Shape::STAGE;
            const uint64_t a = moe_wgmma_matrix(base + half * TILE_BYTES), b = moe_wgmma_matrix(base + WEIGHT_BYTES);
            moe_barrier_wait(shared + Shape::FULL + stage.at * 8, stage.parity);
            moe_wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLS / 16; k++)
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++)
                    moe_wgmma<T, N>::run(d[m], a + m * (TILE_BYTES / M_BLOCKS / 16) + k * 2, b + k * 2,
                                         (block | k) != 0);
            moe_wgmma_commit();
            if (block > 0) {
                moe_wgmma_wait<1>();
                release(before);
            } else if (unsettled >= 0) {
                settle();
            }
            before = stage.at;
            stage.next();
        }
        moe_wgmma_wait<0>();
        release(before);
    }

    // With the number of tokens, in steps, known to the compiler. No tokens: the stages are only passed on.
    template <int N> __device__ __forceinline__ void multiply_any(int steps, int blocks)
    {
        if (steps * MOE_ROW_STEP == N) {
            multiply<N>(blocks);
        } else if constexpr (N > MOE_ROW_STEP) {
            multiply_any<N - MOE_ROW_STEP>(steps, blocks);
        } else {
            for (int block = 0; block < blocks; block++) {
                moe_barrier_wait(shared + Shape::FULL + stage.at * 8, stage.parity);
                release(stage.at);
                stage.next();
            }
        }
    }

    __device__ void sync() const
    {
        moe_named_sync(1 + half, WARPGROUP);
    }

    __device__ uint32_t slice_place() const
    {
        return shared + Shape::OUT + half * Shape::OUT_BYTES + slice * SLICE_BYTES;
    }

    // A slice that is whole goes out by tensor copies, in pieces of 64 columns; one that is not by the threads, so that
    // no neighbour's rows are touched. The piece at `place` holds `piece` rows, swizzled.
    template <int PIECES>
    __device__ __forceinline__ void send(const CUtensorMap *map, void *to, int64_t columns, int64_t column, int row,
                                         int rows)
    {
        constexpr int ROWS = SLICE_BYTES / ROW_BYTES / PIECES;
        const uint32_t place = slice_place();
        moe_fence_async();
        sync();
        if (rows >= ROWS) {
            if (thread == 0) {
#pragma unroll
                for (int p = 0; p < PIECES; p++)
                    moe_tensor_store_2d(map, place + p * ROWS * ROW_BYTES, (int)column + p * COLS, row);
                moe_store_commit();
            }
        } else {
            for (int i = thread; i < rows * PIECES * 8; i += WARPGROUP) {
                const int chunk = i % 8, p = i / 8 % PIECES, r = i / 8 / PIECES;
                const int64_t c = column + p * COLS + chunk * 8;
                const void *from =
                    __cvta_shared_to_generic(place + (p * ROWS + r) * ROW_BYTES + ((chunk ^ (r & 7)) << 4));
                if (c < columns)
                    *reinterpret_cast<uint4 *>((T *)to + (row + r) * columns + c) =
                        *reinterpret_cast<const uint4 *>(from);
            }
        }
        // The place after the next one is free when all but the last SLICES - 2 are out of shared memory; the sync of
        // the next slice says so to all.
        if (thread == 0)
            moe_store_wait_read<Shape::SLICES - 2>();
        slice = slice + 1 == Shape::SLICES ? 0 : slice + 1;
    }

    // GEMM 1: of each pair of eights of rows one is gate, one up.
    __device__ __forceinline__ void finish_gated(const ffn_work &work)
    {
        const int lane = thread % 32, warp = thread / 32;
        const int64_t column = (int64_t)work.band * (MOE_BAND_ROWS / 2) + half * 64;
#pragma unroll
        for (int s = 0; s < Shape::NMAX; s += SLICE1) {
            if (s >= work.rows)
                break;
#pragma unroll
            for (int q = s; q < s + SLICE1; q += 32) {
                if (q >= work.rows)
                    break;
                const int token = q - s + lane;
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++) {
                    uint32_t v[4];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        v[i] = gated<T>(d[m] + (q / 8 + i) * 4, d[m] + (q / 8 + i) * 4 + 2);
                    moe_stmatrix_trans(slice_place() + token * ROW_BYTES + (((m * 4 + warp) ^ (lane & 7)) << 4), v[0],
                                       v[1], v[2], v[3]);
                }
            }
            send<1>(&args.act_64, args.act, args.intermediate, column, work.row + s, work.rows - s);
        }
        if (work.rows % SLICE1 != 0) {
            __threadfence(); // GEMM 2 reads act by tensor copies
            moe_fence_async();
            sync();
        }
        unsettled = work.tile;
    }

    __device__ __forceinline__ void finish_down(const ffn_work &work)
    {
        const int lane = thread % 32, warp = thread / 32;
        const int64_t column = (int64_t)work.band * MOE_BAND_ROWS + half * 128;
        const int token = lane / 16 * 8 + lane % 8;
        const uint32_t place = token * ROW_BYTES + (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
#pragma unroll
        for (int s = 0; s < Shape::NMAX; s += SLICE2) {
            if (s >= work.rows)
                break;
#pragma unroll
            for (int q = s; q < s + SLICE2; q += MOE_ROW_STEP) {
                if (q >= work.rows)
                    break;
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++) {
                    const float *e = d[m] + q / 8 * 4;
                    moe_stmatrix_trans(slice_place() + (m * SLICE2 + q - s) * ROW_BYTES + place, pack2(e[0], e[1], T()),
                                       pack2(e[2], e[3], T()), pack2(e[4], e[5], T()), pack2(e[6], e[7], T()));
                }
            }
            send<2>(&args.down_32, args.down, args.hidden, column, work.row + s, work.rows - s);
        }
    }

    __device__ __forceinline__ void run()
    {
        item_reader<Shape> reader{shared, rank};
        const int blocks1 = (args.hidden + COLS - 1) / COLS, blocks2 = (args.intermediate + COLS - 1) / COLS;
        ffn_work work;
#if LAG
        bool first = true;
#endif
        for (;;) {
            const bool more = reader.next(work);
            // What this block waits for from here on may be its own results.
            if (unsettled >= 0 && (!more || work.gemm2 || work.rows == 0))
                settle();
            if (!more)
                break;
#if LAG
            if (half == 1 && first && (work.gemm2 ? blocks2 : blocks1) > LAG)
                moe_barrier_wait(shared + Shape::FULL + LAG * 8, 0);
            first = false;
#endif
            multiply_any<Shape::NMAX>((work.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP, work.gemm2 ? blocks2 : blocks1);
            if (work.gemm2)
                finish_down(work);
            else
                finish_gated(work);
        }
        if (thread == 0)
            moe_store_wait();
    }
};

template <typename T, class Shape>
__global__ void __launch_bounds__(FFN_THREADS, 1) ffn_kernel(const __grid_constant__ ffn_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char ffn_memory[];
    const uint32_t shared = moe_shared(ffn_memory);
    const uint32_t rank = Shape::CLUSTER == 1 ? 0 : moe_cluster_rank();
    constexpr int CLUSTER = Shape::CLUSTER;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::STAGES; i++) {
            moe_barrier_init(shared + Shape::FULL + i * 8, WARPGROUP + 1);
            moe_barrier_init(shared + Shape::EMPTY + i * 8, CLUSTER * MULTIPLIERS * WARPGROUP / 32);
        }
        for (int i = 0; i < SLOTS; i++) {
            moe_barrier_init(shared + Shape::SLOT_FULL + i * 8, 1);
            moe_barrier_init(shared + Shape::SLOT_EMPTY + i * 8, CLUSTER * FFN_THREADS / 32);
        }
        moe_barrier_init_done();
    }
    if constexpr (CLUSTER == 1)
        __syncthreads();
    else
        moe_cluster_sync();
    moe_grid_launch_dependents();
    moe_grid_wait();

    // 168 registers a thread at the start: what the loading warpgroup gives up the multiplying ones get.
    if (threadIdx.x < WARPGROUP) {
        moe_registers_less<40>();
        ffn_loader<T, Shape>{args, shared, rank}.run();
    } else {
        moe_registers_more<232>();
        ffn_multiplier<T, Shape>(args, shared, rank).run();
    }
    if constexpr (CLUSTER > 1)
        moe_cluster_sync(); // the other block may still arrive at barriers of this one
#endif
}

} // namespace

#endif
