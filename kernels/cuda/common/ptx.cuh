// SPDX-License-Identifier: Apache-2.0
// The few instructions of compute capability 8.0 that have no intrinsic, and the two of 9.0 that let a kernel start
// before the one ahead of it in the stream has finished (moe_launch).
#ifndef MOE_KERNELS_CUDA_COMMON_PTX_CUH
#define MOE_KERNELS_CUDA_COMMON_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Waits until all kernels ahead in the stream have finished and what they wrote can be read. A kernel ahead may let
// this one start as soon as its own blocks have, while yet earlier kernels run: so each kernel of a chain calls this
// before it reads or writes anything that another one touches. Below 9.0 kernels never start early.
static __device__ inline void moe_grid_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel in the stream start as soon as all blocks of this one have come here or ended. It only moves the
// start forward: what the next one may touch is up to its own moe_grid_wait().
static __device__ inline void moe_grid_launch_dependents()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ inline uint32_t moe_shared(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Starts a copy of 16 bytes to shared memory. Only the first `bytes` (0 to 16) are read, the rest becomes zero.
static __device__ inline void moe_cp_async_to(uint32_t shared, const void *global, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// The same by a pointer.
static __device__ inline void moe_cp_async(void *shared, const void *global, int bytes)
{
    moe_cp_async_to(moe_shared(shared), global, bytes);
}

// Closes the group of this thread's copies since the last commit; a group may be empty.
static __device__ inline void moe_cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's groups are unfinished.
template <int N> __device__ inline void moe_cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Barriers (mbarrier): a phase ends when all arrivals are in ----

static __device__ inline void moe_barrier_init(uint32_t barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

static __device__ inline void moe_barrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives when all cp.async of this thread so far are complete; one of the arrivals of the init.
static __device__ inline void moe_barrier_arrive_cp_async(uint32_t barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity (0, 1, 0, ...). A fresh barrier counts as having ended parity 1.
static __device__ inline void moe_barrier_wait(uint32_t barrier, uint32_t parity)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900 // cannot sleep until the phase ends
    uint32_t done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#else
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra.uni end;\n"
                 "bra.uni again;\n"
                 "end:\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}

// ---- Matrices ----

// Four 8x8 matrices of 16-bit elements in shared memory, named by its 32-bit address. Lane 8i + r gives the address of
// row r of matrix i; of each matrix, lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
static __device__ inline void moe_ldmatrix_at(uint32_t (&r)[4], uint32_t shared)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// The same by a pointer.
static __device__ inline void moe_ldmatrix(uint32_t (&r)[4], const void *shared)
{
    moe_ldmatrix_at(r, moe_shared(shared));
}

// d[16][8] += a[16][16] . b[8][16]^T, in fp32. Lane l holds of a: rows l / 4 and l / 4 + 8, columns 2 (l % 4) + {0, 1}
// and the same + 8, as (row, +8 rows) of the first columns, then of the second; of b: row l / 4, the same columns; of
// d: rows l / 4 and l / 4 + 8, columns 2 (l % 4) + {0, 1}.
static __device__ inline void moe_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ inline void moe_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
