// SPDX-License-Identifier: Apache-2.0
// The instructions of compute capability 9.0a that have no intrinsic: bulk and tensor copies, what barriers do for
// them; those of matrix products are in wgmma.cuh. Shared memory is named by its 32-bit address (moe_shared). For code
// that is compiled for sm_90a alone.
#ifndef MOE_KERNELS_CUDA_COMMON_HOPPER_CUH
#define MOE_KERNELS_CUDA_COMMON_HOPPER_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// ---- Barriers (those of ptx.cuh), as copies and blocks of this kind use them ----

// A place in a ring of stages or the like, and the parity of the phase in which its barriers are used.
struct moe_ring_place {
    uint32_t at = 0, parity = 0;

    __device__ __forceinline__ void next(uint32_t size)
    {
        if (++at == size) {
            at = 0;
            parity ^= 1;
        }
    }
};

// After the inits, before the block's __syncthreads: makes them visible to copies and to the other threads.
static __device__ inline void moe_barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ inline void moe_barrier_arrive_as(uint32_t barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Arrives at the barrier of the cluster's block of this number, which lies where `barrier` does in this one. It says
// that reads are over and hands on no writes: at the scope of a cluster it would be a membar of the whole GPU.
static __device__ inline void moe_cluster_barrier_arrive(uint32_t barrier, uint32_t block, uint32_t arrivals = 1)
{
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there], %2;\n}" ::"r"(barrier),
                 "r"(block), "r"(arrivals)
                 : "memory");
}

// The number of this block in its cluster.
static __device__ inline uint32_t moe_cluster_rank()
{
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Arrives, and makes the phase wait for `bytes` that copies will bring.
static __device__ inline void moe_barrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A barrier among `threads` threads of a block, the numbers 1 to 15 are free (0 is __syncthreads).
static __device__ inline void moe_named_sync(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// True for one lane of the warp, all of which call it: always the same one. Other than with a comparison of numbers the
// compiler knows that it is one, and does not turn each copy into a loop over the lanes.
static __device__ __forceinline__ bool moe_elect()
{
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// ---- Copies by the copy engine: one thread starts them, the barrier counts their bytes ----

// `bytes` and both addresses are multiples of 16.
static __device__ inline void moe_bulk_load(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

static __device__ inline void moe_bulk_load(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                            uint64_t policy)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                 "[%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// The same to both blocks of a cluster of two, to the same place and with its bytes at the same barrier in each.
static __device__ inline void moe_bulk_load_both(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                                 uint64_t policy)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4, %5;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"((uint16_t)3), "l"(policy)
                 : "memory");
}

static __device__ inline void moe_tensor_load_2d(uint32_t to, const CUtensorMap *map, int c0, int c1, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(barrier)
                 : "memory");
}

static __device__ inline void moe_tensor_load_3d(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2,
                                                 uint32_t barrier)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(to),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
        : "memory");
}

static __device__ inline void moe_tensor_load_5d(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2, int c3,
                                                 int c4, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
                 "%5, %6}], [%7];" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier)
                 : "memory");
}

// These to both blocks, like moe_bulk_load_both().
static __device__ inline void moe_tensor_load_2d_both(uint32_t to, const CUtensorMap *map, int c0, int c1,
                                                      uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(barrier), "h"((uint16_t)3)
                 : "memory");
}

static __device__ inline void moe_tensor_load_3d_both(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2,
                                                      uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"((uint16_t)3)
                 : "memory");
}

static __device__ inline void moe_tensor_load_5d_both(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2,
                                                      int c3, int c4, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "h"((uint16_t)3)
                 : "memory");
}

static __device__ inline void moe_tensor_load_3d(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2,
                                                 uint32_t barrier, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "l"(policy)
                 : "memory");
}

static __device__ inline void moe_tensor_load_5d(uint32_t to, const CUtensorMap *map, int c0, int c1, int c2, int c3,
                                                 int c4, uint32_t barrier, uint64_t policy)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier), "l"(policy)
                 : "memory");
}

// Between what threads write or see and what copies and tensor cores, in the other proxy, read.
static __device__ inline void moe_fence_async()
{
    asm volatile("fence.proxy.async;" ::: "memory");
}

// The same, for what they wrote to shared memory.
static __device__ inline void moe_fence_async_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Copies out: the thread that starts them closes and awaits groups of them ----

static __device__ inline void moe_tensor_store_2d(const CUtensorMap *map, uint32_t from, int c0, int c1)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
                 "r"(c0), "r"(c1)
                 : "memory");
}

static __device__ inline void moe_store_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all groups have read shared memory.
static __device__ inline void moe_store_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Until all groups are in memory.
static __device__ inline void moe_store_wait()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- Registers of a warpgroup ----

template <int REGISTERS> __device__ inline void moe_registers_less()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ inline void moe_registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- Matrices ----

// Four 8x8 matrices of 16-bit elements to shared memory, transposed: of each, lane l holds elements 2 (l % 4) and
// 2 (l % 4) + 1 of column l / 4. Lane 8i + r gives the address of row r of matrix i.
static __device__ inline void moe_stmatrix_trans(uint32_t to, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

// The same with one matrix, whose rows lanes 0 to 7 give, and with two.
static __device__ inline void moe_stmatrix_trans(uint32_t to, uint32_t r0)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared::cta.b16 [%0], {%1};" ::"r"(to), "r"(r0) : "memory");
}

static __device__ inline void moe_stmatrix_trans(uint32_t to, uint32_t r0, uint32_t r1)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [%0], {%1, %2};" ::"r"(to), "r"(r0), "r"(r1)
                 : "memory");
}

#endif
