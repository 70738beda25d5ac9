/* SPDX-License-Identifier: Apache-2.0 */
/* What tests need run on a GPU beside the library's kernels. */
#ifndef MOE_TESTS_UNIT_DEVICE_H
#define MOE_TESTS_UNIT_DEVICE_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* `blocks` SMs are taken, one by each block: with `shared_bytes` of shared memory, the most that a block can have, it
 * leaves no room for another. Block b says in running[b] that it is there; all leave when *stop is not zero, or after
 * 20 s, so that a test that fails does not keep the GPU. Both lie in pinned host memory. */
cudaError_t test_hold_sms(int32_t blocks, int32_t shared_bytes, volatile int32_t *running, const volatile int32_t *stop,
                          cudaStream_t stream);

/* How often test_compare has found a difference, and the lowest `number` that it had then. On the device. */
struct test_differences {
    unsigned long long count, first;
};

/* Compares `bytes`, a multiple of 16, at a and b, both aligned to 16. `count` grows by one for each 16 bytes that
 * differ. */
cudaError_t test_compare(const void *a, const void *b, int64_t bytes, unsigned long long number,
                         struct test_differences *found, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
