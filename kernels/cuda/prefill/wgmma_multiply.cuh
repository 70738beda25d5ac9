// SPDX-License-Identifier: Apache-2.0
// What empties the stages of a block of prefill's grouped GEMM (wgmma_kernel.cuh), and leaves finished tiles in some of
// them: two warpgroups.
#ifndef MOE_KERNELS_CUDA_PREFILL_WGMMA_MULTIPLY_CUH
#define MOE_KERNELS_CUDA_PREFILL_WGMMA_MULTIPLY_CUH

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/wgmma.cuh"
#include "kernels/cuda/prefill/wgmma_block.cuh"

namespace
{

template <typename T, class Shape> struct ffn_multiplier {
    const ffn_args &args;
    const uint32_t shared;
    const int half, thread; // which warpgroup of the two, and which thread in it
    moe_ring_place stage;

    // A thread's sums of M times 64 weight rows.
    template <int M> struct sums {
        static constexpr int STEPS = Shape::template STEPS<M>, ROWS = STEPS * MOE_ROW_STEP, EACH = ROWS / 2;
        float d[M * EACH];
    };

    __device__ ffn_multiplier(const ffn_args &a, uint32_t s)
        : args(a), shared(s), half(__shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP - 1, 0)),
          thread(threadIdx.x % WARPGROUP)
    {
    }

    __device__ void wait_full() const
    {
        moe_barrier_wait(shared + Shape::FULL + stage.at * 8, stage.parity);
    }

    // A stage is empty when both blocks of a pair have read it, for each brings some of it to both. They are told at
    // once, or the one that hears first could be back before the other has heard; and that rests on arrivals at the
    // other block not overtaking each other on their way, which PTX does not promise.
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

    // d = weights . tokens^T over `blocks` stages, M times 64 weight rows. While this warpgroup waits for its products,
    // to pass the stage on as early as can be, the other one's keep the tensor cores busy.
    template <int M, int N> __device__ __forceinline__ void multiply(sums<M> &s, int blocks, bool gathered)
    {
        // A place's description is that of the ring's begin and the distance, in units of 16 bytes: so no address has
        // to be made for it.
        const uint32_t ring = moe_wgmma_matrix(shared);
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            const uint32_t place = ring + stage.at * (Shape::STAGE / 16);
            const uint32_t a = place + half * (M * TILE_BYTES / M_BLOCKS / 16), b = place + M * TILE_BYTES / 16;
            wait_full();
            if (gathered)
                moe_fence_async_shared(); // the loading threads' own copies, which the tensor cores might not see yet
            moe_wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLS / 16; k++)
#pragma unroll
                for (int m = 0; m < M; m++)
                    moe_wgmma<T, N>::run(s.d + m * s.EACH, a + m * (TILE_BYTES / M_BLOCKS / 16) + k * 2, b + k * 2,
                                         (block | k) != 0);
            moe_wgmma_commit();
            moe_wgmma_wait();
            release();
            stage.next(Shape::STAGES);
        }
    }

    // Tokens are multiplied in multiples of this. Where threads gather them tiles come in more sizes and have less to
    // multiply: there the code of twice as many products, which comes from memory, would take longer than they save.
    static constexpr int STEP = Shape::ORDERED ? 8 : MOE_ROW_STEP;

    // With the number of tokens, of LEAST to MOST, known to the compiler. Halves: each jump to code that did not run
    // yet is a wait for memory.
    template <int M, int LEAST, int MOST>
    __device__ __forceinline__ void multiply_any(sums<M> &s, int tokens, int blocks, bool gathered)
    {
        constexpr int MIDDLE = (LEAST + MOST) / (2 * STEP) * STEP;
        if constexpr (LEAST == MOST)
            multiply<M, MOST>(s, blocks, gathered);
        else if (tokens <= MIDDLE)
            multiply_any<M, LEAST, MIDDLE>(s, tokens, blocks, gathered);
        else
            multiply_any<M, MIDDLE + STEP, MOST>(s, tokens, blocks, gathered);
    }

    // Of the lent stages: each warp says that it has written what it had to.
    __device__ __forceinline__ void pass_back(uint32_t at) const
    {
        moe_fence_async_shared();
        __syncwarp();
        if (thread % 32 == 0)
            moe_barrier_arrive_as(shared + Shape::WRITTEN + at * 8, 32);
    }

    // ---- Sums of an item that is cut, as registers hold them: 16 bytes of each thread after another's ----

    // Of a stage that brought others' sums: each lane says that it has read its own. One of them for all behind
    // __syncwarp() would do, but racecheck does not see the order that this makes. In two branches, or the compiler has
    // a register too few in pairs.
    __device__ __forceinline__ void pass_back_sums() const
    {
        const uint32_t written = shared + Shape::WRITTEN + stage.at * 8;
        if (thread % 32 == 0)
            moe_barrier_arrive(written);
        else
            moe_barrier_arrive(written);
    }

    // That this warp has left its sums, or has none. All lanes store: were it one of them, the compiler would no longer
    // take the place in the ring for the same in all, and multiply() would move matrix descriptors between products.
    // Whichever lane's store is seen, all lanes' sums come before it.
    __device__ __forceinline__ void say_summed(const moe_item &item) const
    {
        __syncwarp();
        moe_store_release(summed_of<Shape>(args, item, item.slice) + half * (WARPGROUP / 32) + thread / 32, 1);
    }

    template <int M> __device__ __forceinline__ void leave_sums(const moe_item &item, const sums<M> &s) const
    {
        constexpr int IN_STAGE = Shape::template SUM_STEPS<M>;
        char *to = sums_of<Shape>(args, item, item.slice) + half * Shape::HALF_SUM_BYTES + thread * 16;
#pragma unroll
        for (int q = 0; q < s.STEPS; q++) {
            if (q * MOE_ROW_STEP >= item.rows)
                break;
#pragma unroll
            for (int i = 0; i < 2 * M; i++) {
                const float *e = s.d + i / 2 * s.EACH + q * 8 + i % 2 * 4;
                const int at =
                    q / IN_STAGE * (MULTIPLIERS * Shape::HALF_SUM_BYTES) + q % IN_STAGE * (M * SUM_UNIT_BYTES);
                *reinterpret_cast<float4 *>(to + at + i * (WARPGROUP * 16)) = make_float4(e[0], e[1], e[2], e[3]);
            }
        }
        say_summed(item);
    }

    // Adds what the other slices have left, in their order.
    template <int M> __device__ __forceinline__ void add_sums(const moe_item &item, sums<M> &s)
    {
        constexpr int IN_STAGE = Shape::template SUM_STEPS<M>;
#pragma unroll 1
        for (int slice = 1; slice < item.slices; slice++)
#pragma unroll
            for (int part = 0; part < Shape::SUM_STAGES; part++) {
                const uint32_t place = shared + stage.at * Shape::STAGE + half * Shape::HALF_SUM_BYTES + thread * 16;
                const char *from = static_cast<const char *>(__cvta_shared_to_generic(place));
                wait_full();
#pragma unroll
                for (int q = part * IN_STAGE; q < (part + 1) * IN_STAGE && q < s.STEPS; q++) {
                    if (q * MOE_ROW_STEP >= item.rows)
                        break;
#pragma unroll
                    for (int i = 0; i < 2 * M; i++) {
                        float *e = s.d + i / 2 * s.EACH + q * 8 + i % 2 * 4;
                        const float4 v = *reinterpret_cast<const float4 *>(from + q % IN_STAGE * (M * SUM_UNIT_BYTES) +
                                                                           i * (WARPGROUP * 16));
                        e[0] += v.x;
                        e[1] += v.y;
                        e[2] += v.z;
                        e[3] += v.w;
                    }
                }
                pass_back_sums();
                stage.next(Shape::STAGES);
            }
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
    __device__ __forceinline__ void finish_gated(const moe_item &item, sums<M_BLOCKS> &s)
    {
        const int lane = thread % 32, warp = thread / 32;
        const uint32_t place = shared + stage.at * Shape::STAGE + half * Shape::PIECE;
        // The second 64 weight rows have not been loaded where there are none. What was multiplied instead must not
        // come together with results.
        if (2 * args.intermediate - item.band * MOE_BAND_ROWS - half * MOE_PACKED_ROWS <= MOE_PACKED_ROWS / M_BLOCKS)
#pragma unroll
            for (int i = 0; i < s.EACH; i++)
                s.d[s.EACH + i] = 0.0f;
        wait_full();
#pragma unroll
        for (int q = 0; q < Shape::NMAX; q += 32) {
            if (q >= item.rows)
                break;
            uint32_t v[M_BLOCKS][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                static_assert(M_BLOCKS == 2, "two features of a token have their activation together");
                float *e = s.d + (q / 8 + i) * 4, *f = e + s.EACH;
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

    // The same of a joint item, whose 64 features are in one piece.
    __device__ __forceinline__ void finish_gated(const moe_item &item, const sums<1> &s)
    {
        const int lane = thread % 32, chunk = half * 4 + thread / 32;
        const uint32_t place = shared + stage.at * Shape::STAGE;
        wait_full();
#pragma unroll
        for (int q = 0; q < s.ROWS; q += 32) {
            if (q >= item.rows)
                break;
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *e = s.d + (q / 8 + i) * 4;
                v[i] = moe_pair(moe_silu_fast(e[0]) * e[2], moe_silu_fast(e[1]) * e[3], T());
            }
            moe_stmatrix_trans(place + (q + lane) * ROW_BYTES + ((chunk ^ (lane & 7)) << 4), v[0], v[1], v[2], v[3]);
        }
        pass_back(stage.at);
        stage.next(Shape::STAGES);
    }

    // Each warpgroup has a stage of its own.
    template <int M> __device__ __forceinline__ void finish_down(const moe_item &item, const sums<M> &s, int lent)
    {
        const int lane = thread % 32, warp = thread / 32;
        go_along(0, half);
        const uint32_t to = shared + stage.at * Shape::STAGE + (lane / 16 * 8 + lane % 8) * ROW_BYTES +
                            (((warp * 2 + lane / 8 % 2) ^ (lane & 7)) << 4);
        wait_full();
#pragma unroll
        for (int q = 0; q < s.ROWS; q += MOE_ROW_STEP) {
            if (q >= item.rows)
                break;
#pragma unroll
            for (int m = 0; m < M; m++) {
                const float *e = s.d + m * s.EACH + q / 8 * 4;
                moe_stmatrix_trans(to + m * Shape::PIECE + q * ROW_BYTES, moe_pair(e[0], e[1], T()),
                                   moe_pair(e[2], e[3], T()), moe_pair(e[4], e[5], T()), moe_pair(e[6], e[7], T()));
            }
        }
        pass_back(stage.at);
        stage.next(Shape::STAGES);
        go_along(0, lent - 1 - half);
    }

    // An item of LEAST to MOST tokens, or fewer than a step less.
    template <int M, int LEAST, int MOST>
    __device__ __forceinline__ void run(const moe_item &item, sums<M> &s, const item_stages<Shape> &of)
    {
        multiply_any<M, LEAST, MOST>(s, item.rows, of.blocks, !Shape::ORDERED && !item.gemm2);
        if (of.leaves_sums()) {
            leave_sums(item, s);
            return;
        }
        if (of.sums > 0)
            add_sums(item, s);
        if (item.gemm2)
            finish_down(item, s, of.lent);
        else
            finish_gated(item, s);
    }

    __device__ __forceinline__ void run()
    {
        sums<M_BLOCKS> s;
        item_reader<Shape> reader{shared};
        const int blocks1 = (args.hidden + COLS - 1) / COLS, blocks2 = (args.intermediate + COLS - 1) / COLS;
        for (;;) {
            const moe_item item = reader.item();
            reader.done();
            if (item.rows == 0)
                break;
            const item_stages<Shape> of(item, item.gemm2 ? blocks2 : blocks1);
            if (!has_weights<Shape>(args, item, half)) {
                go_along(of.blocks, of.sums + of.lent);
                if (of.leaves_sums())
                    say_summed(item);
                continue;
            }
            if constexpr (Shape::PAIRED)
                if (item.joint) {
                    // Zeros, of no use but that the compiler keeps neither kind of sums while the other one is made.
                    sums<1> joint_sums = {};
                    run<1, Shape::NMAX + STEP, Shape::JOINT>(item, joint_sums, of);
                    s = {};
                    continue;
                }
            run<M_BLOCKS, STEP, Shape::NMAX>(item, s, of);
        }
    }
};

} // namespace

#endif
