// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/device.h"

namespace
{

__device__ inline unsigned long long nanoseconds()
{
    unsigned long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

__global__ void hold(volatile int32_t *running, const volatile int32_t *stop)
{
    constexpr unsigned long long MOST = 20ull * 1000 * 1000 * 1000;
    const unsigned long long begin = nanoseconds();
    running[blockIdx.x] = 1;
    __threadfence_system();
    while (*stop == 0 && nanoseconds() - begin < MOST)
        __nanosleep(1000);
}

__global__ void compare(const uint4 *a, const uint4 *b, int64_t count, unsigned long long number,
                        test_differences *found)
{
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        const uint4 x = a[i], y = b[i];
        if (x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w) {
            atomicAdd(&found->count, 1ull);
            atomicMin(&found->first, number);
        }
    }
}

} // namespace

cudaError_t test_hold_sms(int32_t blocks, int32_t shared_bytes, volatile int32_t *running, const volatile int32_t *stop,
                          cudaStream_t stream)
{
    const cudaError_t error = cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess)
        return error;
    hold<<<blocks, 1, shared_bytes, stream>>>(running, stop);
    return cudaGetLastError();
}

cudaError_t test_compare(const void *a, const void *b, int64_t bytes, unsigned long long number,
                         test_differences *found, cudaStream_t stream)
{
    compare<<<32, 256, 0, stream>>>((const uint4 *)a, (const uint4 *)b, bytes / 16, number, found);
    return cudaGetLastError();
}
