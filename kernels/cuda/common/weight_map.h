/* SPDX-License-Identifier: Apache-2.0 */
/* Row-major weights for the copy engine: in boxes of MOE_PACKED_COLS columns of MOE_PACKED_ROWS rows, the rows in the
 * order of the packed layout, so that a box is what a tile of packed weights is. */
#ifndef MOE_KERNELS_CUDA_COMMON_WEIGHT_MAP_H
#define MOE_KERNELS_CUDA_COMMON_WEIGHT_MAP_H

#include <cuda.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Coordinates: column, 0, 0, packed row / 16, group. */
moe_status moe_map_w13(const struct moe_call *call, CUtensorMap *map);
/* Coordinates: column, row, group. */
moe_status moe_map_w2(const struct moe_call *call, CUtensorMap *map);

#ifdef __cplusplus
}
#endif

#endif
