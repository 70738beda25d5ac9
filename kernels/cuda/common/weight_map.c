/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/common/weight_map.h"

#include "kernels/cuda/common/tensor_map.h"
#include "kernels/packed.h"

/* Eights of rows, of gate and of up in turn. */
moe_status moe_map_w13(const struct moe_call *call, CUtensorMap *map)
{
    const uint64_t row = (uint64_t)call->hidden * 2, width = (uint64_t)call->intermediate;
    const uint64_t sizes[] = {(uint64_t)call->hidden, 8, 2, width / 8, (uint64_t)call->plan.groups};
    const uint64_t strides[] = {row, width * row, 8 * row, 2 * width * row};
    const uint32_t boxes[] = {MOE_PACKED_COLS, 8, 2, MOE_PACKED_ROWS / 16, 1};
    return moe_tensor_map(map, call->dtype, 5, call->w13.data, sizes, strides, boxes, call->error);
}

moe_status moe_map_w2(const struct moe_call *call, CUtensorMap *map)
{
    const uint64_t row = (uint64_t)call->intermediate * 2, height = (uint64_t)call->hidden;
    const uint64_t sizes[] = {(uint64_t)call->intermediate, height, (uint64_t)call->plan.groups};
    const uint64_t strides[] = {row, height * row};
    const uint32_t boxes[] = {MOE_PACKED_COLS, MOE_PACKED_ROWS, 1};
    return moe_tensor_map(map, call->dtype, 3, call->w2.data, sizes, strides, boxes, call->error);
}
