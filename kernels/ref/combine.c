/* SPDX-License-Identifier: Apache-2.0 */
/* combine: a token's weighted expert results, added in slot order in fp32 and rounded once. */
#include "config/convert.h"
#include "kernels/kernels.h"

moe_status moe_combine_ref(const struct moe_call *call)
{
    const struct moe_plan *plan = &call->plan.plan;
    const float *down = call->down;

    for (int64_t t = 0; t < call->tokens; t++)
        for (int64_t h = 0; h < call->hidden; h++) {
            float sum = 0;

            for (int32_t s = 0; s < call->slots; s++) {
                int32_t row = plan->slot_row[t * call->slots + s];

                if (row >= 0)
                    sum += plan->row_weight[row] * down[row * call->hidden + h];
            }
            moe_store_f32(call->output, call->io_dtype, t * call->hidden + h, sum);
        }
    return MOE_OK;
}
