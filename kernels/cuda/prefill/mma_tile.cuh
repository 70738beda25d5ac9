// SPDX-License-Identifier: Apache-2.0
// One warp's part of a tile on mma.sync: it reads tokens and weights from a stage of the ring, both as rows of 128
// bytes with 16-byte chunks placed by chunk ^ (row % 8), and holds 32 or 64 tokens x 64 weight rows of the product.
//
// Tokens are m and weights n: then a thread holds two neighbouring features of one token, gate features in the even
// blocks of eight weight rows and their up features in the odd ones after them. The activation needs no exchange, and
// the four lanes that share a token turn their pairs into whole chunks of 16 bytes with shuffles alone.
#ifndef MOE_KERNELS_CUDA_PREFILL_MMA_TILE_CUH
#define MOE_KERNELS_CUDA_PREFILL_MMA_TILE_CUH

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/packed.h"

template <typename T, int TOKENS> struct mma_part {
    static constexpr int WEIGHTS = 64;
    static constexpr int MI = TOKENS / 16, NI = WEIGHTS / 8;
    static constexpr int BLOCK = 16 * MOE_PACKED_ROW_BYTES; // 16 rows, which one ldmatrix brings 16 columns of

    float sum[MI][NI][4];
    uint32_t a[MI][4]; // 16 columns

    // Where this lane reads 16 columns of 16 rows, in rows that begin at a multiple of 128 bytes. Of tokens the four
    // 8x8 matrices are rows 0 to 7 and 8 to 15 of the first chunk, then of the second; of weights both chunks of rows 0
    // to 7, then of rows 8 to 15: each block of eight is an aligned pair of registers. The next 16 columns are at this
    // ^ 32, ^ 64 and ^ 96.
    static __device__ uint32_t token_place(int lane)
    {
        return lane % 16 * MOE_PACKED_ROW_BYTES + ((lane / 16) ^ (lane % 8)) * 16;
    }

    static __device__ uint32_t weight_place(int lane)
    {
        return (lane % 8 + lane / 16 * 8) * MOE_PACKED_ROW_BYTES + ((lane / 8 % 2) ^ (lane % 8)) * 16;
    }

    __device__ void clear()
    {
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int j = 0; j < NI; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sum[i][j][e] = 0.0f;
    }

    // Brings the tokens that step() begins with.
    __device__ void begin(uint32_t tokens)
    {
#pragma unroll
        for (int i = 0; i < MI; i++)
            moe_ldmatrix_at(a[i], tokens + i * BLOCK);
    }

    // Multiplies 16 columns, of which the weights are at `weights`. With the last 16 rows of weights each block of
    // tokens is used for the last time, and makes place for that of the next 16 columns. `next` is called when all of
    // these columns have been read, and changes tokens and weights to where the next ones are.
    template <typename Next> __device__ void step(uint32_t &tokens, uint32_t &weights, Next next)
    {
#pragma unroll
        for (int j = 0; j < NI / 2; j++) {
            const bool last = j == NI / 2 - 1;
            uint32_t b[4];
            moe_ldmatrix_at(b, weights + j * BLOCK);
            if (last)
                next();
#pragma unroll
            for (int i = 0; i < MI; i++) {
                moe_mma(sum[i][2 * j], a[i], b[0], b[1], T());
                moe_mma(sum[i][2 * j + 1], a[i], b[2], b[3], T());
                if (last)
                    moe_ldmatrix_at(a[i], tokens + i * BLOCK);
            }
        }
    }

    // c: the first of `rows` rows and `columns` columns (a multiple of eight) that there are, `stride` elements apart.
    template <bool GATED> __device__ void store(T *c, int64_t stride, int rows, int columns, int lane) const
    {
        constexpr int PAIRS = GATED ? NI / 2 : NI;
#pragma unroll
        for (int i = 0; i < MI; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = i * 16 + h * 8 + lane / 4;
                uint32_t pair[PAIRS];
#pragma unroll
                for (int j = 0; j < PAIRS; j++) {
                    float v[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if constexpr (GATED)
                            v[e] = moe_silu_fast(sum[i][2 * j][2 * h + e]) * sum[i][2 * j + 1][2 * h + e];
                        else
                            v[e] = sum[i][j][2 * h + e];
                    }
                    pair[j] = moe_pair(v[0], v[1], T());
                }
#pragma unroll
                for (int j = 0; j < PAIRS; j += 4) {
                    const uint4 chunk = moe_transpose_quad(lane, pair[j], pair[j + 1], pair[j + 2], pair[j + 3]);
                    const int column = (j + lane % 4) * 8;
                    if (row < rows && column < columns)
                        *reinterpret_cast<uint4 *>(c + row * stride + column) = chunk;
                }
            }
    }
};

#endif
