// SPDX-License-Identifier: Apache-2.0
// The instructions of compute capability 9.0a that have no intrinsic: bulk and tensor copies, what barriers do for
// them, warpgroup matrix products. Shared memory is named by its 32-bit address (moe_shared). For code that is
// compiled for sm_90a alone.
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

// What a matrix in shared memory is to wgmma: rows of 128 bytes, eight of them after another 1024 bytes, 16-byte chunks
// placed by chunk ^ (row % 8). Of the 64 bits that say so the lower half, in which `address` is: a multiple of 1024. 2
// more are 16 elements further along the row, 64 more eight rows further down.
static __device__ __forceinline__ uint32_t moe_wgmma_matrix(uint32_t address)
{
    return 1 << 16 | (address & 0x3ffff) >> 4;
}

// Before the first product after registers of d were touched.
static __device__ inline void moe_wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ inline void moe_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all products of the closed groups are finished, but for the last N groups.
template <int N = 0> __device__ inline void moe_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d[64][N] (+)= a[64][16] . b[N][16]^T in fp32, by a warpgroup; a and b as moe_wgmma_matrix describes them. Without
// `accumulate` d is only written. Of thread t, with lane l = t % 32: d[4 j + 2 i + c] is row 16 (t / 32) + l / 4 + 8 i
// and column 8 j + 2 (l % 4) + c. The first N / 2 registers are used.
template <typename T, int N> struct moe_wgmma;

#define MOE_D0  "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_D1  "%8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_D2  "%16, %17, %18, %19, %20, %21, %22, %23"
#define MOE_D3  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_D4  "%32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_D5  "%40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_D6  "%48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_D7  "%56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_D8  "%64, %65, %66, %67, %68, %69, %70, %71"
#define MOE_D9  "%72, %73, %74, %75, %76, %77, %78, %79"
#define MOE_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define MOE_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define MOE_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define MOE_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define MOE_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define MOE_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define MOE_L1  MOE_D0
#define MOE_L2  MOE_L1 ", " MOE_D1
#define MOE_L3  MOE_L2 ", " MOE_D2
#define MOE_L4  MOE_L3 ", " MOE_D3
#define MOE_L5  MOE_L4 ", " MOE_D4
#define MOE_L6  MOE_L5 ", " MOE_D5
#define MOE_L7  MOE_L6 ", " MOE_D6
#define MOE_L8  MOE_L7 ", " MOE_D7
#define MOE_L9  MOE_L8 ", " MOE_D8
#define MOE_L10 MOE_L9 ", " MOE_D9
#define MOE_L11 MOE_L10 ", " MOE_D10
#define MOE_L12 MOE_L11 ", " MOE_D11
#define MOE_L13 MOE_L12 ", " MOE_D12
#define MOE_L14 MOE_L13 ", " MOE_D13
#define MOE_L15 MOE_L14 ", " MOE_D14
#define MOE_L16 MOE_L15 ", " MOE_D15
#define MOE_O(i)                                                                                                       \
    "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]),                    \
        "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define MOE_R1  MOE_O(0)
#define MOE_R2  MOE_R1, MOE_O(1)
#define MOE_R3  MOE_R2, MOE_O(2)
#define MOE_R4  MOE_R3, MOE_O(3)
#define MOE_R5  MOE_R4, MOE_O(4)
#define MOE_R6  MOE_R5, MOE_O(5)
#define MOE_R7  MOE_R6, MOE_O(6)
#define MOE_R8  MOE_R7, MOE_O(7)
#define MOE_R9  MOE_R8, MOE_O(8)
#define MOE_R10 MOE_R9, MOE_O(9)
#define MOE_R11 MOE_R10, MOE_O(10)
#define MOE_R12 MOE_R11, MOE_O(11)
#define MOE_R13 MOE_R12, MOE_O(12)
#define MOE_R14 MOE_R13, MOE_O(13)
#define MOE_R15 MOE_R14, MOE_O(14)
#define MOE_R16 MOE_R15, MOE_O(15)
// The inputs are numbered after the n / 2 registers: a, b, p. The upper half of what describes a matrix is the same for
// all: this swizzle, and 1024 bytes from eight rows to the next.
#define MOE_WGMMA(type, name, n, eighths, a_, b_, p_)                                                                  \
    template <> struct moe_wgmma<type, n> {                                                                            \
        static __device__ __forceinline__ void run(float *d, uint32_t a, uint32_t b, int accumulate)                   \
        {                                                                                                              \
            asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #p_ ", 0;\n"                            \
                         "mov.b64 a, {%" #a_ ", 0x40000040};\nmov.b64 b, {%" #b_ ", 0x40000040};\n"                    \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" MOE_L##eighths           \
                         "}, a, b, p, 1, 1, 0, 0;\n}"                                                                  \
                         : MOE_R##eighths                                                                              \
                         : "r"(a), "r"(b), "r"(accumulate));                                                           \
        }                                                                                                              \
    };
#define MOE_WGMMA_BOTH(n, eighths, a, b, p)                                                                            \
    MOE_WGMMA(__nv_bfloat16, "bf16", n, eighths, a, b, p)                                                              \
    MOE_WGMMA(__half, "f16", n, eighths, a, b, p)
// Half an eighth: four registers.
#define MOE_LHALF "%0, %1, %2, %3"
#define MOE_RHALF "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
MOE_WGMMA_BOTH(8, HALF, 4, 5, 6)
MOE_WGMMA_BOTH(16, 1, 8, 9, 10)
MOE_WGMMA_BOTH(32, 2, 16, 17, 18)
MOE_WGMMA_BOTH(48, 3, 24, 25, 26)
MOE_WGMMA_BOTH(64, 4, 32, 33, 34)
MOE_WGMMA_BOTH(80, 5, 40, 41, 42)
MOE_WGMMA_BOTH(96, 6, 48, 49, 50)
MOE_WGMMA_BOTH(112, 7, 56, 57, 58)
MOE_WGMMA_BOTH(128, 8, 64, 65, 66)
MOE_WGMMA_BOTH(144, 9, 72, 73, 74)
MOE_WGMMA_BOTH(160, 10, 80, 81, 82)
MOE_WGMMA_BOTH(176, 11, 88, 89, 90)
MOE_WGMMA_BOTH(192, 12, 96, 97, 98)
MOE_WGMMA_BOTH(208, 13, 104, 105, 106)
MOE_WGMMA_BOTH(224, 14, 112, 113, 114)
MOE_WGMMA_BOTH(240, 15, 120, 121, 122)
MOE_WGMMA_BOTH(256, 16, 128, 129, 130)

#undef MOE_D0
#undef MOE_D1
#undef MOE_D2
#undef MOE_D3
#undef MOE_D4
#undef MOE_D5
#undef MOE_D6
#undef MOE_D7
#undef MOE_D8
#undef MOE_D9
#undef MOE_D10
#undef MOE_D11
#undef MOE_D12
#undef MOE_D13
#undef MOE_D14
#undef MOE_D15
#undef MOE_LHALF
#undef MOE_RHALF
#undef MOE_L1
#undef MOE_R1
#undef MOE_L2
#undef MOE_R2
#undef MOE_L3
#undef MOE_R3
#undef MOE_L4
#undef MOE_R4
#undef MOE_L5
#undef MOE_R5
#undef MOE_L6
#undef MOE_R6
#undef MOE_L7
#undef MOE_R7
#undef MOE_L8
#undef MOE_R8
#undef MOE_L9
#undef MOE_R9
#undef MOE_L10
#undef MOE_R10
#undef MOE_L11
#undef MOE_R11
#undef MOE_L12
#undef MOE_R12
#undef MOE_L13
#undef MOE_R13
#undef MOE_L14
#undef MOE_R14
#undef MOE_L15
#undef MOE_R15
#undef MOE_L16
#undef MOE_R16
#undef MOE_O
#undef MOE_WGMMA
#undef MOE_WGMMA_BOTH

#endif
