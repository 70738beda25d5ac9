/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOE_KERNELS_CUDA_COMMON_TENSOR_MAP_H
#define MOE_KERNELS_CUDA_COMMON_TENSOR_MAP_H

#include <cuda.h>

#include "config/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Describes a tensor of `rank` dimensions of 16-bit elements at `base` (16-byte aligned), the fastest dimension first,
 * to the copy engine: strides[i], in bytes, is dimension i + 1's. A box of it comes with 16-byte chunks placed by chunk
 * ^ (row % 8) in rows of 128 bytes, and zeros where it reaches past the tensor.
 */
moe_status moe_tensor_map(CUtensorMap *map, moe_dtype dtype, uint32_t rank, const void *base, const uint64_t *sizes,
                          const uint64_t *strides, const uint32_t *box, struct moe_error *err);

#ifdef __cplusplus
}
#endif

#endif
