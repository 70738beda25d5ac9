// SPDX-License-Identifier: Apache-2.0
// What empties the stages of a block of prefill's grouped GEMM (wgmma_kernel.cuh), and leaves finished tiles in some of
// them: two warpgroups.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_MULTIPLY_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_MULTIPLY_CUH

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/prefill/wgmma_block.cuh"

namespace
{

template <typename T, class Shape> struct ffn_multiplier {
    const ffn_args &args;
    const uint32_t shared;
    const int half, thread; // which warpgroup of the two, and which thread in it
    moe_ring_place stage;
    float d[M_BLOCKS][Shape::NMAX / 2];

    __device__ ffn_multiplier(const ffn_args &a, uint32_t s)
        : args(a), shared(s), half(__shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP - 1, 0)),
          thread(threadIdx.x % WARPGROUP)
    {
    }

    __device__ void wait_full() const
    {
        moe_barrier_wait(shared + Shape::FULL + stage.at * 8, stage.parity);
    }

    // A stage is empty when both blocks of a pair have read it, for each brings some of it to both.
    __device__ void release() const
    {
        const uint32_t empty = shared + Shape::EMPTY + stage.at * 8;
        if constexpr (Shape::PAIRED) {
            if (thread % 32 < Shape::BLOCKS)
                moe_cluster_barrier_arrive(empty, thread % 32);
        } else if (thread % 32 == 0) {
            moe_barrier_arrive(empty);
        }
    }

    // d = weights . tokens^T over `blocks` stages. While this warpgroup waits for its products, to pass the stage on as
    // early as can be, the other one's keep the tensor cores busy.
    template <int N> __device__ __forceinline__ void multiply(int blocks, bool gathered)
    {
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            const uint32_t base = shared + stage.at * Shape::STAGE;
            const uint32_t a = moe_wgmma_matrix(base + half * TILE_BYTES), b = moe_wgmma_matrix(base + WEIGHT_BYTES);
            wait_full();
            if (gathered)
                moe_fence_async_shared(); // the loading threads' own copies, which the tensor cores might not see yet
            moe_wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLS / 16; k++)
#pragma unroll
                for (int m = 0; m < M_BLOCKS; m++)
                    moe_wgmma<T, N>::run(d[m], a + m * (TILE_BYTES / M_BLOCKS / 16) + k * 2, b + k * 2,
                                         (block | k) != 0);
            moe_wgmma_commit();
            moe_wgmma_wait();
            release();
            stage.next(Shape::STAGES);
        }
    }

    // With the number of tokens, in steps from FIRST to LAST, known to the compiler. Halves: each jump to code that did
    // not run yet is a wait for memory.
    template <int FIRST, int LAST> __device__ __forceinline__ void multiply_any(int steps, int blocks, bool gathered)
    {
        constexpr int MIDDLE = (FIRST + LAST) / 2;
        if constexpr (FIRST == LAST)
            multiply<FIRST * MOE_ROW_STEP>(blocks, gathered);
        else if (steps <= MIDDLE)
            multiply_any<FIRST, MIDDLE>(steps, blocks, gathered);
        else
            multiply_any<MIDDLE + 1, LAST>(steps, blocks, gathered);
    }

    // Of the lent stages: each warp says that it has written what it had to.
    __device__ __forceinline__ void pass_back(uint32_t at) const
    {
        moe_fence_async_shared();
        __syncwarp();
        if (thread % 32 == 0)
            moe_barrier_arrive(shared + Shape::WRITTEN + at * 8);
    }

    // For a warpgroup that has nothing to do in an item, or in some of its stages: passes them on, then those lent.
    __device__ __forceinline__ void go_along(int blocks, int lent)
    {
#pragma unroll 1
        for (int i = 0; i < blocks + lent; i++) {
            wait_full();
            if (i < blocks)
                release();
            else
                pass_back(stage.at);
            stage.next(Shape::STAGES);
        }
    }

    // GEMM 1: of each pair of eights of rows one is gate, one up.
    __device__ __forceinline__ void finish_gated(const moe_item &item)
    {
        const int lane = thread % 32, warp = thread / 32;
        const uint32_t place = shared + stage.at * Shape::STAGE + half * Shape::PIECE;
        // The second 64 weight rows have not been loaded where there are none. What was multiplied instead must not
        // come together with results.
        if (2 * args.intermediate - item.band * MOE_BAND_ROWS - half * MOE_PACKED_ROWS <= MOE_PACKED_ROWS / M_BLOCKS)
#pragma unroll
            for (int i = 0; i < Shape::NMAX / 2; i++)
                d[1][i] = 0.0f;
        wait_full();
#pragma unroll
        for (int q = 0; q < Shape::NMAX; q += 32) {
            if (q >= item.rows)
                break;
            uint32_t v[M_BLOCKS][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                static_assert(M_BLOCKS == 2, "two features of a token have their activation together");
                float *e = d[0] + (q / 8 + i) * 4, *f = d[1] + (q / 8 + i) * 4;
                moe_silu_fast_both(e[0], f[0]);
                moe_silu_fast_both(e[1], f[1]);
                v[0][i] = moe_pair(e[0] * e[2], e[1] * e[3], T());
                v[1][i] = moe_pair(f[0] * f[2], f[1] * f[3], T());
            }
#pragma unroll
            for (int m = 0; m < M_BLOCKS; m++)
                moe_stmatrix_trans(place + (q + lane) * ROW_BYTES + (((m * 4 + warp) ^ (lane & 7)) << 4), v[m][0],
                                   v[m][1], v[m][2], v[m][3]);
        }
        pass_back(stage.at);
        stage.next(Shape::STAGES);
    }

    // Each warpgroup has a stage of its own.
    __device__ __forceinline__ void finish_down(const moe_item &item, int lent)
    {
        const int lane = thread % 32, warp = thread / 32;
        go_along(0, half);
        const uint32_t to = shared + stage.at * Shape::STAGE + (lane / 16 * 8 + lane % 8) * ROW_BYTES +
                            (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
        wait_full();
#pragma unroll
        for (int q = 0; q < Shape::NMAX; q += MOE_ROW_STEP) {
            if (q >= item.rows)
                break;
#pragma unroll
            for (int m = 0; m < M_BLOCKS; m++) {
                const float *e = d[m] + q / 8 * 4;
                moe_stmatrix_trans(to + m * Shape::PIECE + q * ROW_BYTES, moe_pair(e[0], e[1], T()),
                                   moe_pair(e[2], e[3], T()), moe_pair(e[4], e[5], T()), moe_pair(e[6], e[7], T()));
            }
        }
        pass_back(stage.at);
        stage.next(Shape::STAGES);
        go_along(0, lent - 1 - half);
    }

    __device__ __forceinline__ void run()
    {
        item_reader<Shape> reader{shared};
        const int blocks1 = (args.hidden + COLS - 1) / COLS, blocks2 = (args.intermediate + COLS - 1) / COLS;
        for (;;) {
            const moe_item item = reader.item();
            reader.done();
            if (item.rows == 0)
                break;
            const int blocks = item.gemm2 ? blocks2 : blocks1;
            const int lent = lent_stages(item.gemm2, blocks);
            const int rows = item.gemm2 ? args.hidden : 2 * args.intermediate; // of weights
            if (item.idle || item.band * MOE_BAND_ROWS + half * MOE_PACKED_ROWS >= rows) {
                go_along(blocks, lent);
                continue;
            }
            multiply_any<1, Shape::NMAX / MOE_ROW_STEP>((item.rows + MOE_ROW_STEP - 1) / MOE_ROW_STEP, blocks,
                                                        !Shape::ORDERED && !item.gemm2);
            if (item.gemm2)
                finish_down(item, lent);
            else
                finish_gated(item);
        }
    }
};

} // namespace

#endif
