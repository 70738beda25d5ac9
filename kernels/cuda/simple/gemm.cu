// SPDX-License-Identifier: Apache-2.0
// A grouped GEMM, readable first: c[r] = a[row of r] . b[group of r]^T for all rows of the plan, one launch for groups
// of any size. The host does not know the counts: as many blocks as the GPU holds walk all tiles, and find in the
// plan's offsets which group a tile belongs to.
//
// GEMM 1 is the same kernel with b's gate and up rows side by side in a tile, so that the thread that holds a gate
// value holds the up value it belongs to, and writes silu(gate) * up: fp32 until then, and half the result to store.
// GEMM 2 stores fp32, so that between act and the output nothing rounds.
#include <type_traits>

#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/tiles.h"
#include "kernels/cuda/common/walk.cuh"
#include "kernels/cuda/simple/tile.cuh"
#include "kernels/kernels.h"

namespace
{

struct gemm {
    const void *a;          // [..., k]
    const int32_t *a_row;   // [R]: the row of `a` for row r of the plan; NULL: r itself
    const void *b;          // [groups][n][k], or with gate and up [groups][2n][k]
    void *c;                // [R][n], T of GEMM 1's act, fp32 of GEMM 2's result
    const int32_t *offsets; // [groups + 1]
    int32_t groups, n, k;
};

// ---- Loading ----

// One chunk of a row, columns from `column` on, to shared memory; zeros past the row's end. row NULL: all zeros.
// ALIGNED: rows begin at 16 bytes and have whole chunks, so that the copy can run by itself. `any` is any readable
// address.
template <bool ALIGNED, typename T>
__device__ inline void load_chunk(char *to, const T *row, int column, int columns, const void *any)
{
    if constexpr (ALIGNED) {
        const bool there = row && column < columns;
        moe_cp_async(to, there ? row + column : any, there ? CHUNK : 0);
    } else {
        moe_pack<T, CHUNK / sizeof(T)> pack;
#pragma unroll
        for (int i = 0; i < CHUNK / (int)sizeof(T); i++)
            pack.v[i] = row && column + i < columns ? row[column + i] : T(0.0f);
        *(moe_pack<T, CHUNK / sizeof(T)> *)to = pack;
    }
}

// ---- The kernel ----
//
// A ring of STAGES pieces of a[BM] and b[BN], 128 bytes of each row. In step i the block waits for piece i, starts the
// copy of piece i + STAGES - 1 into the place that step i - 1 has read, and multiplies. The one barrier of a step says
// both that everybody's copies of piece i are there and that everybody is done with step i - 1.

template <class Tile, bool ALIGNED, bool GATED>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) gemm_kernel(const gemm g)
{
    typedef typename Tile::T T;
    constexpr int BM = Tile::BM, BN = Tile::BN, STAGES = Tile::STAGES, THREADS = Tile::THREADS;
    constexpr int CHUNKS = ROW_BYTES / CHUNK, PER_CHUNK = CHUNK / sizeof(T), PER_STEP = ROW_BYTES / sizeof(T);
    typedef std::conditional_t<GATED, T, float> Out;
    constexpr int OUT_CHUNK = CHUNK / sizeof(Out);
    constexpr int STRIDE = THREADS / CHUNKS; // a thread loads one chunk of every STRIDE-th row
    constexpr int A_ROWS = (BM + STRIDE - 1) / STRIDE, B_ROWS = BN / STRIDE;
    constexpr int STAGE_BYTES = (BM + BN) * ROW_BYTES;
    constexpr int COLS = GATED ? BN / 2 : BN; // columns of c in a tile
    constexpr int LD = COLS + OUT_CHUNK;      // of the finished tile in shared memory, off a multiple of the banks
    static_assert(BN % STRIDE == 0 && (BM % STRIDE == 0 || BM < STRIDE), "rows must divide among the threads");
    static_assert(!GATED || STRIDE % Tile::PAIRED == 0, "a thread's rows of b are all gate rows or all up rows");
    static_assert(BM * LD * sizeof(Out) <= STAGES * STAGE_BYTES, "the finished tile must fit in the ring");

    extern __shared__ __align__(128) char ring[];
    const int64_t columns = (g.n + COLS - 1) / COLS;
    const int steps = (g.k + PER_STEP - 1) / PER_STEP;
    const int my_chunk = threadIdx.x % CHUNKS, my_row = threadIdx.x / CHUNKS;
    const int my_column = GATED ? Tile::pair_column(my_row) : my_row; // of c, that row my_row of b is for
    constexpr int COLUMN_STRIDE = GATED ? STRIDE / 2 : STRIDE;
    const int64_t my_b = ((GATED && Tile::pair_is_up(my_row) ? (int64_t)g.n : 0) + my_column) * g.k;

    moe_tile_walk walk;
    for (int64_t tile = blockIdx.x; moe_find_group(g.offsets, g.groups, BM, columns, tile, walk); tile += gridDim.x) {
        const int64_t first = g.offsets[walk.group], count = g.offsets[walk.group + 1] - first;
        int64_t row_tile, column;
        moe_place_tile(tile - walk.before, (count + BM - 1) / BM, columns, &row_tile, &column);
        const int64_t r0 = first + row_tile * BM;
        const int rows = (int)(count - row_tile * BM < BM ? count - row_tile * BM : BM);
        const int n0 = (int)(column * COLS);
        const int cols = g.n - n0 < COLS ? g.n - n0 : COLS;
        const T *b0 = (const T *)g.b + ((int64_t)walk.group * g.n * (GATED ? 2 : 1) + n0) * g.k;

        int32_t a_row[A_ROWS]; // -1: not a row of this tile
#pragma unroll
        for (int i = 0; i < A_ROWS; i++) {
            const int r = my_row + i * STRIDE;
            a_row[i] = r >= rows ? -1 : g.a_row ? g.a_row[r0 + r] : (int32_t)(r0 + r);
        }

        auto load = [&](int step) {
            char *a = ring + step % STAGES * STAGE_BYTES, *b = a + BM * ROW_BYTES;
            const int k = step * PER_STEP + my_chunk * PER_CHUNK;
#pragma unroll
            for (int i = 0; i < A_ROWS; i++) {
                const int r = my_row + i * STRIDE;
                const T *row = a_row[i] < 0 ? NULL : (const T *)g.a + (int64_t)a_row[i] * g.k;
                if (BM >= STRIDE || r < BM)
                    load_chunk<ALIGNED>(a + chunk_at(r, my_chunk), row, k, g.k, g.a);
            }
#pragma unroll
            for (int i = 0; i < B_ROWS; i++) {
                const int r = my_row + i * STRIDE;
                const bool there = my_column + i * COLUMN_STRIDE < cols;
                const T *row = there ? b0 + my_b + (int64_t)(i * COLUMN_STRIDE) * g.k : NULL;
                load_chunk<ALIGNED>(b + chunk_at(r, my_chunk), row, k, g.k, g.b);
            }
        };

        Tile product;
        product.clear();
        for (int i = 0; i < STAGES - 1; i++) {
            if (i < steps)
                load(i);
            moe_cp_async_commit(); // empty past the end, so that the count of groups stays true
        }
        for (int i = 0; i < steps; i++) {
            moe_cp_async_wait<STAGES - 2>();
            __syncthreads();
            if (i + STAGES - 1 < steps)
                load(i + STAGES - 1);
            moe_cp_async_commit();
            const char *a = ring + i % STAGES * STAGE_BYTES;
            product.multiply(a, a + BM * ROW_BYTES);
        }
        __syncthreads();

        // Through shared memory, so that rows are written in whole pieces.
        Out *c = (Out *)ring;
        product.template put<GATED>(c, LD);
        __syncthreads();
        for (int i = threadIdx.x; i < BM * COLS / OUT_CHUNK; i += THREADS) {
            const int r = i / (COLS / OUT_CHUNK), column0 = i % (COLS / OUT_CHUNK) * OUT_CHUNK;
            if (r >= rows || column0 >= cols)
                continue;
            const Out *from = c + r * LD + column0;
            Out *to = (Out *)g.c + (r0 + r) * g.n + n0 + column0;
            if constexpr (ALIGNED) {
                *(uint4 *)to = *(const uint4 *)from;
            } else {
                for (int j = 0; j < OUT_CHUNK && column0 + j < cols; j++)
                    to[j] = from[j];
            }
        }
        __syncthreads(); // before the next tile fills the ring
    }
}

// ---- Host ----

template <class Tile, bool ALIGNED, bool GATED>
moe_status launch(const struct moe_call *call, const gemm &g, const char *name)
{
    const int64_t pairs = call->tokens * call->slots;
    const int64_t row_tiles = moe_max_tiles(pairs, g.groups, Tile::BM);
    const int64_t column_tiles = moe_ceil_div(g.n, GATED ? Tile::BN / 2 : Tile::BN);
    const unsigned grid = moe_grid(row_tiles * column_tiles, call->max_sms, call->exec->sms, Tile::BLOCKS);
    const int shared = Tile::STAGES * (Tile::BM + Tile::BN) * ROW_BYTES;

    cudaFuncSetAttribute(gemm_kernel<Tile, ALIGNED, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    gemm_kernel<Tile, ALIGNED, GATED><<<grid, Tile::THREADS, shared, (cudaStream_t)call->stream>>>(g);
    return moe_launched(call->error, name);
}

// The tile by how many rows a group has on average: few rows are about reading weights, with many small copies in
// flight; many rows are about the tensor cores. Sizes that rule out 16-byte copies get one tile that loads element by
// element.
template <typename T, bool GATED>
moe_status choose(const struct moe_call *call, const gemm &g, bool aligned, const char *name)
{
    const int64_t rows = call->tokens * call->slots / g.groups;

    if constexpr (sizeof(T) == sizeof(float)) {
        if (!aligned)
            return launch<fma_tile<4, 8, 3, 2>, false, GATED>(call, g, name);
        if (rows <= 16)
            return launch<fma_tile<1, 4, 8, 2>, true, GATED>(call, g, name);
        return launch<fma_tile<8, 8, 3, GATED ? 1 : 2>, true, GATED>(call, g, name); // gated does not fit 128 registers
    } else {
        if (!aligned)
            return launch<tensor_tile<T, 64, 128, 2, 2, 4, 2>, false, GATED>(call, g, name);
        if (rows <= 8)
            return launch<tensor_tile<T, 16, 64, 1, 4, 8, 2>, true, GATED>(call, g, name);
        if (rows <= 48)
            return launch<tensor_tile<T, 64, 128, 2, 2, 4, 2>, true, GATED>(call, g, name);
        return launch<tensor_tile<T, 128, 128, 2, 2, 3, 2>, true, GATED>(call, g, name);
    }
}

template <bool GATED>
moe_status run(const struct moe_call *call, const void *a, const int32_t *a_row, const struct moe_weights_view *b,
               void *c, const char *name)
{
    if (call->tokens == 0)
        return MOE_OK;
    if (b->rows > INT32_MAX - 128 || b->cols > INT32_MAX - 128)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "%s: weights of %lld x %lld are too large for path 'simple'", name, (long long)b->rows,
                        (long long)b->cols);

    const int32_t n = (int32_t)(GATED ? b->rows / 2 : b->rows), k = (int32_t)b->cols;
    const gemm g = {a, a_row, b->data, c, call->plan.plan.offsets, call->plan.groups, n, k};
    const int32_t whole = (int32_t)(CHUNK / moe_dtype_size(call->dtype));
    const bool aligned =
        n % whole == 0 && k % whole == 0 && moe_aligned16(a) && moe_aligned16(b->data) && moe_aligned16(c);
    moe_status status = MOE_OK;
    moe_with_dtype(call->dtype, [&](auto t) { status = choose<decltype(t), GATED>(call, g, aligned, name); });
    return status;
}

} // namespace

moe_status moe_gemm1_simple(const struct moe_call *call)
{
    return run<true>(call, call->x, call->plan.plan.row_token, &call->w13, call->act, "gemm1 simple");
}

moe_status moe_gemm2_simple(const struct moe_call *call)
{
    return run<false>(call, call->act, NULL, &call->w2, call->down, "gemm2 simple");
}
