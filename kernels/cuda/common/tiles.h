/* SPDX-License-Identifier: Apache-2.0 */
/* How many tiles rows can make, whatever the routing. In plain C, so that it can be tested without a GPU. */
#ifndef MOE_KERNELS_CUDA_COMMON_TILES_H
#define MOE_KERNELS_CUDA_COMMON_TILES_H

#include <stdint.h>

/* The most tiles of up to `most` rows that `rows` rows in `groups` groups can make, where each group is cut into as few
 * as can be. */
static inline int64_t moe_max_tiles(int64_t rows, int32_t groups, int32_t most)
{
    return rows / most + (groups < rows ? groups : rows);
}

#endif
