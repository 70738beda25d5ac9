// SPDX-License-Identifier: Apache-2.0
// The few instructions of compute capability 8.0 that have no intrinsic, and of 9.0 those that kernels for both use: an
// early start (moe_launch), prefetches, clusters.
#ifndef MOE_KERNELS_CUDA_COMMON_PTX_CUH
#define MOE_KERNELS_CUDA_COMMON_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Waits until all kernels ahead in the stream have finished and what they wrote can be read. A kernel ahead may let
// this one start as soon as its own blocks have, while yet earlier kernels run: so each kernel of a chain calls this
// before it reads or writes anything that another one touches, or says why it may do so before. Below 9.0 kernels never
// start early.
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

// The thread's number, read anew: what is made of it before and after a loop that needs all registers is not to be kept
// through that loop.
static __device__ inline int moe_thread_again()
{
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// A kernel's parameter, the same in all lanes, in a register from here on: through a shuffle, of whose result the
// compiler knows nothing. Otherwise it would be read where it is used, from constant memory. By a whole warp.
static __device__ __forceinline__ void moe_read_now(int32_t &v)
{
    v = __shfl_sync(0xffffffffu, v, 0);
}

static __device__ __forceinline__ void moe_read_now(uint32_t &v)
{
    v = __shfl_sync(0xffffffffu, v, 0);
}

// Starts to bring `bytes` from p on (both multiples of 16) into L2. As it changes nothing and returns nothing, it may
// come before moe_grid_wait(). Nothing happens below 9.0, where kernels never start early.
static __device__ inline void moe_prefetch_l2(const void *p, uint32_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#else
    (void)p;
    (void)bytes;
#endif
}

// What is read only once, so that in L2 it makes way for everything else first.
static __device__ inline uint64_t moe_policy_once()
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Sixteen bytes under such a policy, kept in no cache of the SM.
static __device__ inline uint4 moe_load_once(const void *p, uint64_t policy)
{
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(policy)
                 : "memory");
    return v;
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
    uint32_t done;
    do {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#else // cannot sleep until the phase ends
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#endif
    } while (!done);
}

// ---- Between blocks ----

static __device__ inline int32_t moe_load_acquire(const int32_t *p)
{
    int32_t v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ inline void moe_store_release(int32_t *p, int32_t v)
{
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

static __device__ inline void moe_add_release(int32_t *p, int32_t v)
{
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// The same to two numbers at once, with one wait for what came before.
static __device__ inline void moe_add_release_both(int32_t *p, int32_t *q, int32_t v)
{
    asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.s32 [%0], %2;\n"
                 "red.relaxed.gpu.global.add.s32 [%1], %2;" ::"l"(p),
                 "l"(q), "r"(v)
                 : "memory");
}

// The first lane of the warp, all of which call it, adds v to *p and has in *before what it was. An addition by one
// lane the compiler makes one for all lanes, with a shuffle that waits for the result at once, unless it knows by the
// lane's number that it is one: of this it waits where the result is used.
static __device__ inline void moe_fetch_add_first(uint32_t *p, uint32_t v, uint32_t *before)
{
    asm volatile("{\n.reg .pred first;\n.reg .b32 lane;\nmov.u32 lane, %%laneid;\nsetp.eq.u32 first, lane, 0;\n"
                 "@first atom.relaxed.gpu.global.add.u32 %0, [%1], %2;\n}"
                 : "+r"(*before)
                 : "l"(p), "r"(v)
                 : "memory");
}

// Four words, each of them whole, which need not be of the same moment. Not from a cache of the SM.
static __device__ inline uint4 moe_load_relaxed(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Four words, which others see one by one, each of them whole.
static __device__ inline void moe_store_relaxed(uint4 *p, uint4 v)
{
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- Clusters: below 9.0 a block is one by itself ----

// A barrier of all threads of a cluster, in two halves: what a thread did before it arrived can be seen by those that
// have waited. Each arrives and waits in turns.
static __device__ inline void moe_cluster_arrive()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

static __device__ inline void moe_cluster_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// What lies at p, an address in this block's shared memory, in that of the cluster's block of this number.
static __device__ inline int32_t moe_cluster_load(const int32_t *p, uint32_t block)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t there;
    int32_t v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(moe_shared(p)), "r"(block));
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(there) : "memory");
    return v;
#else
    (void)block;
    return *p;
#endif
}

// The same of four floats, aligned to 16.
static __device__ inline float4 moe_cluster_load(const float4 *p, uint32_t block)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(moe_shared(p)), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
#else
    (void)block;
    return *p;
#endif
}

// Initialises the barrier for a phase, which ends when moe_cluster_store() has brought `bytes`. The other blocks may
// use it after a moe_cluster_arrive_relaxed() of this thread.
static __device__ inline void moe_cluster_expect(uint64_t *barrier, uint32_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    moe_barrier_init(moe_shared(barrier), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(moe_shared(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// moe_cluster_arrive(), without what it does for other memory than such barriers.
static __device__ inline void moe_cluster_arrive_relaxed()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

// Stores v to p of the cluster's block of this number, where the barrier then has 4 bytes more; both are addresses in
// this block's shared memory.
static __device__ inline void moe_cluster_store(int32_t *p, uint32_t block, int32_t v, uint64_t *barrier)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t there, barrier_there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(moe_shared(p)), "r"(block));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier_there) : "r"(moe_shared(barrier)), "r"(block));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there), "r"(v),
                 "r"(barrier_there)
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

// Transposes an 8x8 matrix of 16-bit elements, of which lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
static __device__ inline uint32_t moe_transpose_8x8(uint32_t v)
{
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
    return v;
}

// Lanes 4q to 4q + 3 exchange so that lane 4q + i ends up with element i of each of them, in the order of the lanes.
static __device__ inline uint4 moe_transpose_quad(int lane, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    const bool odd = lane & 1, high = lane & 2;
    const uint32_t r01 = __shfl_xor_sync(ALL_LANES, odd ? v0 : v1, 1);
    const uint32_t r23 = __shfl_xor_sync(ALL_LANES, odd ? v2 : v3, 1);
    const uint32_t w0 = odd ? r01 : v0, w1 = odd ? v1 : r01, w2 = odd ? r23 : v2, w3 = odd ? v3 : r23;
    const uint32_t r02 = __shfl_xor_sync(ALL_LANES, high ? w0 : w2, 2);
    const uint32_t r13 = __shfl_xor_sync(ALL_LANES, high ? w1 : w3, 2);
    return high ? make_uint4(r02, r13, w2, w3) : make_uint4(w0, w1, r02, r13);
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
