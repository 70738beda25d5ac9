// SPDX-License-Identifier: Apache-2.0
// How a block multiplies what lies in shared memory: on tensor cores for bf16 and f16, with FMAs for f32. Both take
// a[BM][128 bytes] and b[BN][128 bytes], add their product over those columns to a BM x BN tile held in registers, and
// put that tile into shared memory in the end.
//
// In a gated tile half of b's rows are gate rows and half up rows: row r is for column pair_column(r) of the result,
// and an up row if pair_is_up(r). Each tile alternates them in the steps in which a thread's columns lie apart, so that
// a gate value and its up value meet in one thread.
#ifndef MOE_KERNELS_CUDA_SIMPLE_TILE_CUH
#define MOE_KERNELS_CUDA_SIMPLE_TILE_CUH

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/ptx.cuh"

constexpr int ROW_BYTES = 128; // of a row of a stage: one row of all 32 banks
constexpr int CHUNK = 16;      // bytes of the pieces that a row is made of

// Where piece c of row r lies in a stage. The exclusive or spreads the same piece of eight rows in sequence over all
// banks, for ldmatrix and for 16-byte loads alike.
__device__ inline int chunk_at(int r, int c)
{
    return r * ROW_BYTES + ((c ^ (r & 7)) * CHUNK);
}

// WM x WN warps, each with a part of BM / WM rows and BN / WN columns.
template <typename Type, int M, int N, int WM, int WN, int STAGES_, int BLOCKS_> struct tensor_tile {
    typedef Type T;
    static constexpr int BM = M, BN = N, STAGES = STAGES_;
    static constexpr int THREADS = WM * WN * 32;
    static constexpr int BLOCKS = BLOCKS_; // on an SM
    static constexpr int WARP_M = BM / WM, WARP_N = BN / WN;
    static constexpr int MI = WARP_M / 16, NI = WARP_N / 8; // m16n8 pieces of a warp
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "ldmatrix brings 16 rows of either operand");

    static constexpr int PAIRED = 16; // rows of b after which gate and up repeat
    static __device__ int pair_column(int r)
    {
        return r / 16 * 8 + r % 8;
    }
    static __device__ bool pair_is_up(int r)
    {
        return r % 16 >= 8;
    }

    float sum[MI][NI][4];

    __device__ void clear()
    {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    sum[i][j][k] = 0.0f;
    }

    __device__ void multiply(const char *a, const char *b)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int m0 = warp / WN * WARP_M, n0 = warp % WN * WARP_N;
#pragma unroll
        for (int k = 0; k < ROW_BYTES / 32; k++) { // 16 columns, two chunks
            uint32_t af[MI][4], bf[NI / 2][4];
            // Matrices 0 to 3: rows 0-7 and 8-15 of the first chunk, then of the second.
#pragma unroll
            for (int i = 0; i < MI; i++)
                moe_ldmatrix(af[i], a + chunk_at(m0 + i * 16 + lane % 16, 2 * k + lane / 16));
                // Here the two chunks of rows 0-7, then of rows 8-15: two pieces of 8 columns of the product.
#pragma unroll
            for (int j = 0; j < NI / 2; j++)
                moe_ldmatrix(bf[j], b + chunk_at(n0 + j * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < MI; i++)
#pragma unroll
                for (int j = 0; j < NI; j++)
                    moe_mma(sum[i][j], af[i], bf[j / 2][j % 2 * 2], bf[j / 2][j % 2 * 2 + 1], T());
        }
    }

    // c[BM][ld]
    template <bool GATED, typename Out> __device__ void put(Out *c, int ld) const
    {
        constexpr int HALF = GATED ? 2 : 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int m0 = warp / WN * WARP_M + lane / 4, n0 = warp % WN * WARP_N / HALF + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j += HALF)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float pair[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        pair[e] = sum[i][j][2 * h + e];
                        if constexpr (GATED)
                            pair[e] = moe_silu(pair[e]) * sum[i][j + 1][2 * h + e];
                    }
                    moe_store<true>(c + (m0 + i * 16 + h * 8) * ld + n0 + j / HALF * 8, 2, pair);
                }
    }
};

// 16 x 16 threads; thread (y, x) has rows y + 16 i and columns x + 16 j.
template <int TM, int TN, int STAGES_, int BLOCKS_> struct fma_tile {
    typedef float T;
    static constexpr int BM = 16 * TM, BN = 16 * TN, STAGES = STAGES_;
    static constexpr int THREADS = 256;
    static constexpr int BLOCKS = BLOCKS_; // on an SM

    static constexpr int PAIRED = 32; // rows of b after which gate and up repeat
    static __device__ int pair_column(int r)
    {
        return r / 32 * 16 + r % 16;
    }
    static __device__ bool pair_is_up(int r)
    {
        return r % 32 >= 16;
    }

    float sum[TM][TN];

    __device__ void clear()
    {
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
                sum[i][j] = 0.0f;
    }

    __device__ void multiply(const char *a, const char *b)
    {
        const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll 1 // more would not fit the registers
        for (int c = 0; c < ROW_BYTES / CHUNK; c++) {
            float4 av[TM];
#pragma unroll
            for (int i = 0; i < TM; i++)
                av[i] = *(const float4 *)(a + chunk_at(y + 16 * i, c));
#pragma unroll
            for (int j = 0; j < TN; j++) {
                const float4 bv = *(const float4 *)(b + chunk_at(x + 16 * j, c));
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    sum[i][j] = fmaf(av[i].x, bv.x, sum[i][j]);
                    sum[i][j] = fmaf(av[i].y, bv.y, sum[i][j]);
                    sum[i][j] = fmaf(av[i].z, bv.z, sum[i][j]);
                    sum[i][j] = fmaf(av[i].w, bv.w, sum[i][j]);
                }
            }
        }
    }

    template <bool GATED> __device__ void put(float *c, int ld) const
    {
        constexpr int HALF = GATED ? 2 : 1;
        const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j += HALF) {
                float value = sum[i][j];
                if constexpr (GATED)
                    value = moe_silu(value) * sum[i][j + 1];
                c[(y + 16 * i) * ld + x + j / HALF * 16] = value;
            }
    }
};

#endif
