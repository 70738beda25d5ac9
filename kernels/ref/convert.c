/* SPDX-License-Identifier: Apache-2.0 */
/* entry: the caller's hidden states in the layer's dtype. */
#include "config/convert.h"
#include "kernels/kernels.h"

moe_status moe_entry_ref(const struct moe_call *call)
{
    if (call->io_dtype != call->dtype) /* else x is the input itself */
        moe_convert(call->x, call->dtype, call->input, call->io_dtype, call->tokens * call->hidden);
    return MOE_OK;
}
