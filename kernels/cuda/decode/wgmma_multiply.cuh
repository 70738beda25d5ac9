// SPDX-License-Identifier: Apache-2.0
// What empties the stages of a block of decode's FFN (wgmma.cu): two warpgroups that multiply, add up partial sums and
// store results, and a thread for each that tells other blocks of these.
#ifndef MOE_KERNELS_CUDA_DECODE_WGMMA_MULTIPLY_CUH
#define MOE_KERNELS_CUDA_DECODE_WGMMA_MULTIPLY_CUH

#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/wgmma.cuh"
#include "kernels/cuda/decode/wgmma_block.cuh"

namespace
{

// ---- Telling other blocks: one thread for each multiplying warpgroup ----
//
// A release at the scope of the GPU waits until all that came before is in memory, one or two microseconds. So those
// who store leave a mail, which all their warps sign: what they have stored, or read, comes before the herald's
// release.

struct mailbox {
    const uint32_t shared;
    const int half; // which of the two
    moe_ring_place place;

    __device__ uint32_t full() const
    {
        return shared + MAIL_FULL + (half * MAILS + place.at) * 8;
    }

    __device__ uint32_t empty() const
    {
        return shared + MAIL_EMPTY + (half * MAILS + place.at) * 8;
    }

    __device__ mail *at() const
    {
        return reinterpret_cast<mail *>(__cvta_shared_to_generic(shared + MAIL)) + half * MAILS + place.at;
    }

    // By all of a warpgroup.
    __device__ __forceinline__ void send(int thread, int32_t *address, int32_t value, int32_t slots)
    {
        moe_barrier_wait(empty(), place.parity ^ 1);
        if (thread == 0)
            *at() = {address, value, slots};
        __syncwarp();
        if (thread % 32 == 0)
            moe_barrier_arrive(full());
        place.next(MAILS);
    }

    __device__ void run()
    {
        for (;; place.next(MAILS)) {
            moe_barrier_wait(full(), place.parity);
            const mail m = *at();
            moe_barrier_arrive(empty());
            if (m.address == NULL)
                return;
            if (m.slots == 0)
                moe_add_release(m.address, m.value);
#pragma unroll 1
            for (int i = m.slots - 1; i >= 0; i--)
                moe_store_release(m.address + i * MOE_SLOT_PARTS, m.value);
        }
    }
};

// ---- Multiplying: two warpgroups ----

template <typename T, int MOST> struct multiplier : follower {
    const int half, thread; // which of the two, and which thread in it
    mailbox mails;
    float d[MOST / 2];

    __device__ multiplier(const wgmma_args &a, uint32_t s)
        : follower(a, s), half(__shfl_sync(0xffffffffu, (threadIdx.x - LOADERS) / WARPGROUP, 0)),
          thread(threadIdx.x % WARPGROUP), mails{s, half}
    {
    }

    __device__ void sync() const
    {
        moe_named_sync(OWN_PIECE + half, WARPGROUP);
    }

    __device__ __forceinline__ void release(uint32_t at) const
    {
        if (thread % 32 == 0)
            moe_barrier_arrive(shared + EMPTY + at * 8);
    }

    // d = weights . tokens^T over the task's blocks. A stage's products are awaited when the next one's are under way.
    template <int N> __device__ __forceinline__ void multiply(int blocks)
    {
        uint32_t before = 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            d[i] = 0.0f;
#pragma unroll 1
        for (int block = 0; block < blocks; block++) {
            const uint32_t a = moe_wgmma_matrix(weights() + half * (TILE_BYTES / MULTIPLIERS));
            const uint32_t b = moe_wgmma_matrix(tokens());
            moe_barrier_wait(weights_full(), stage.parity);
            moe_barrier_wait(tokens_full(), stage.parity);
            moe_fence_async_shared(); // the loading threads' copies of tokens, which the tensor cores might not see yet
            moe_wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLS / 16; k++)
                moe_wgmma<T, N>::run(d, a + k * 2, b + k * 2, 1);
            moe_wgmma_commit();
            if (block > 0) {
                moe_wgmma_wait<1>();
                release(before);
            }
            before = stage.at;
            stage.next(stages);
        }
        moe_wgmma_wait<0>();
        release(before);
    }

    // With the number of tokens, rounded up, known to the compiler. The fewest are tried first: with them there is the
    // least to read, and what instructions a jump passes over does not have to come from memory.
    template <int N = 8> __device__ __forceinline__ void multiply_any(int rows, int blocks)
    {
        if constexpr (N < MOST) {
            if (rows > N) {
                multiply_any<(N < 16 ? 16 : N + 16)>(rows, blocks);
                return;
            }
        }
        multiply<N>(blocks);
    }

    // ---- Partial sums: each thread's registers, four at a time, as they are ----

    __device__ int32_t *slot_state(int slot) const
    {
        return args.decode.slot_state + slot * MOE_SLOT_PARTS + half;
    }

    __device__ float4 *slot_sums(int slot) const
    {
        const int64_t part = (int64_t)(slot * MOE_SLOT_PARTS + half) * (MOE_PACKED_ROWS / MOE_SLOT_PARTS);
        return reinterpret_cast<float4 *>(args.decode.sums + (part << args.decode.most_log2)) + thread;
    }

    // By all of the warpgroup: waits until the slots are in this state. A lane looks at each.
    __device__ __forceinline__ void await(int first, int slots, int32_t state) const
    {
        for (int slot = thread; slot < slots; slot += WARPGROUP)
            while (moe_load_acquire(slot_state(first + slot)) != state)
                ;
        sync();
    }

    __device__ __forceinline__ void leave_sums(const moe_decode_task &task)
    {
        if (task.slot_free != MOE_SLOT_FREE)
            await(task.own_slot, 1, task.slot_free);
        float4 *to = slot_sums(task.own_slot);
#pragma unroll
        for (int q = 0; q < MOST / 8; q++) {
            if (q * 8 >= task.rows)
                break;
            to[q * WARPGROUP] = make_float4(d[4 * q], d[4 * q + 1], d[4 * q + 2], d[4 * q + 3]);
        }
        mails.send(thread, slot_state(task.own_slot), task.gemm2 ? MOE_SLOT_SUM2 : MOE_SLOT_SUM1, 1);
    }

    __device__ __forceinline__ void add_sums(const moe_decode_task &task)
    {
        await(task.first_slot, task.slots, task.gemm2 ? MOE_SLOT_SUM2 : MOE_SLOT_SUM1);
        for (int slot = task.first_slot; slot < task.first_slot + task.slots; slot++) {
            const float4 *from = slot_sums(slot);
#pragma unroll
            for (int q = 0; q < MOST / 8; q++) {
                if (q * 8 >= task.rows)
                    break;
                const float4 v = __ldcg(from + q * WARPGROUP);
                d[4 * q] += v.x;
                d[4 * q + 1] += v.y;
                d[4 * q + 2] += v.z;
                d[4 * q + 3] += v.w;
            }
        }
        if (!task.gemm2 && args.decode.gemm2_slots == 0)
            mails.send(thread, slot_state(task.first_slot), MOE_SLOT_READ1, task.slots);
    }

    // ---- Those of a tile of few rows: passed, by the threads that have columns in use ----

    // Of four neighbouring threads, which have the same weight rows, each has two columns.
    __device__ bool passes_sums(const moe_decode_task &task) const
    {
        return MOST == MOE_ROUTED_TOKENS && task.rows <= args.decode.passed_rows;
    }

    __device__ uint4 *passed_sums(int slot) const
    {
        static_assert(WARPGROUP == 4 * MOE_PASSING_QUADS, "the host counts on it");
        const int threads = args.decode.passed_rows / 2; // of four
        return (uint4 *)args.decode.passed_sums +
               ((slot * MOE_SLOT_PARTS + half) * MOE_PASSING_QUADS + thread / 4) * threads + thread % 4;
    }

    __device__ __forceinline__ void pass_sums(const moe_decode_task &task) const
    {
        // Not by its bits, for which ptxas would have the products wait for each other.
        const auto seen = [](float v) { return __float_as_uint(v == 0.0f ? -0.0f : v); };
        if (thread % 4 * 2 < task.rows)
            moe_store_relaxed(passed_sums(task.own_slot), make_uint4(seen(d[0]), seen(d[1]), seen(d[2]), seen(d[3])));
    }

    __device__ __forceinline__ void add_passed_sums(const moe_decode_task &task)
    {
        if (thread % 4 * 2 >= task.rows)
            return;
#pragma unroll 1
        for (int slot = task.first_slot; slot < task.first_slot + task.slots; slot++) {
            const uint4 *from = passed_sums(slot);
            uint4 v;
            do
                v = moe_load_relaxed(from);
            while (v.x == 0 || v.y == 0 || v.z == 0 || v.w == 0);
            d[0] += __uint_as_float(v.x);
            d[1] += __uint_as_float(v.y);
            d[2] += __uint_as_float(v.z);
            d[3] += __uint_as_float(v.w);
        }
    }

    // ---- Results: turned to rows of tokens in shared memory, stored in chunks of 16 bytes ----

    // A warpgroup's piece has a row of 128 bytes for each token, chunk c of row r at place c ^ (r % 8); CHUNKS of
    // them are in use, the first of which belongs to column `column` of `columns`. PASSED: they are passed; else
    // `passed`: they are passed as well, beside where they belong.
    template <int CHUNKS, bool PASSED = false>
    __device__ __forceinline__ void store(const moe_decode_task &task, void *to, int columns, int64_t column,
                                          bool passed = false)
    {
        const uint32_t from = finished_tile(half);
        sync();
#pragma unroll 1
        for (int i = thread; i < task.rows * CHUNKS; i += WARPGROUP) {
            const int chunk = i % CHUNKS, r = i / CHUNKS;
            const int64_t c = column + chunk * 8;
            const uint4 *at = reinterpret_cast<const uint4 *>(
                __cvta_shared_to_generic(from + r * ROW_BYTES + ((chunk ^ (r & 7)) << 4)));
            if (c >= columns)
                continue;
            const int64_t place = (int64_t)(task.row + r) * columns + c;
            if constexpr (PASSED) {
                pass(to, place, *at);
            } else {
                if (passed)
                    pass(args.decode.passed, place, *at);
                *reinterpret_cast<uint4 *>((T *)to + place) = *at;
            }
        }
    }

    // Eight elements for who looks for them where zeros were: with pairs of +0 as -0, which changes no sum but the sign
    // of one that is zero.
    static __device__ __forceinline__ void pass(void *to, int64_t place, const uint4 &v)
    {
        const auto seen = [](uint32_t pair) { return pair != 0 ? pair : 0x80008000u; };
        moe_store_relaxed(reinterpret_cast<uint4 *>((T *)to + place),
                          make_uint4(seen(v.x), seen(v.y), seen(v.z), seen(v.w)));
    }

    // The sums of GEMM 1, GATED, of whose rows of each pair of eights one is gate, one up; or of GEMM 2.
    template <bool GATED> __device__ __forceinline__ void finish(const moe_decode_task &task)
    {
        const uint32_t to = finished_tile(half);
        const int lane = thread % 32, warp = thread / 32;
        sync(); // the last tile has left the piece
#pragma unroll
        for (int q = 0; q < MOST / 8; q++) {
            if (q * 8 >= task.rows)
                break;
            const float *e = d + q * 4;
            const int row = q * 8 + lane % 8, chunk = GATED ? warp : warp * 2 + lane / 8 % 2;
            const uint32_t at = to + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
            if constexpr (GATED)
                moe_stmatrix_trans(at, moe_pair(moe_silu_fast(e[0]) * e[2], moe_silu_fast(e[1]) * e[3], T()));
            else
                moe_stmatrix_trans(at, moe_pair(e[0], e[1], T()), moe_pair(e[2], e[3], T()));
        }
        if constexpr (GATED)
            store<4>(task, args.decode.act, args.decode.intermediate,
                     (int64_t)task.band * (MOE_PACKED_ROWS / 2) + half * 32, is_passed(args.decode));
        else
            store<8, MOST == MOE_ROUTED_TOKENS>(task, args.decode.down, args.decode.hidden,
                                                (int64_t)task.band * MOE_PACKED_ROWS + half * 64);
    }

    __device__ void run()
    {
        moe_decode_task task;
        measure();
        while (next(task)) {
            if (MOST > MOE_ROUTED_TOKENS)
                for (int i = task.guessed; i < 0; i++) {
                    // Only then is it free: with a phase that nobody has waited for others would mistake the next one.
                    moe_barrier_wait(weights_full(), stage.parity);
                    moe_barrier_wait(tokens_full(), stage.parity);
                    __syncwarp();
                    release(stage.at);
                    stage.next(stages);
                }
            multiply_any(task.rows, task.end - task.begin);
            const bool passes = passes_sums(task);
            if (task.slots > 0) {
                if (passes)
                    add_passed_sums(task);
                else
                    add_sums(task);
            }
            if (task.own_slot >= 0) {
                if (passes)
                    pass_sums(task);
                else
                    leave_sums(task);
            } else if (task.gemm2) {
                finish<false>(task);
            } else {
                finish<true>(task);
                if (!is_passed(args.decode))
                    mails.send(thread, args.decode.finished + task.tile, 1, 0);
            }
        }
        mails.send(thread, NULL, 0, 0);
    }
};

} // namespace

#endif
