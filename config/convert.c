/* SPDX-License-Identifier: Apache-2.0 */
#include "config/convert.h"

void moe_convert(void *to, moe_dtype to_dtype, const void *from, moe_dtype from_dtype, int64_t count)
{
    if (to_dtype == from_dtype && count > 0) { /* memcpy takes no NULL, not even for nothing */
        memcpy(to, from, (size_t)count * moe_dtype_size(to_dtype));
        return;
    }
    for (int64_t i = 0; i < count; i++)
        moe_store_f32(to, to_dtype, i, moe_load_f32(from, from_dtype, i));
}

double moe_dot(const void *a, moe_dtype a_dtype, const void *b, moe_dtype b_dtype, int64_t count)
{
    double sum = 0;

    for (int64_t i = 0; i < count; i++)
        sum += (double)moe_load_f32(a, a_dtype, i) * moe_load_f32(b, b_dtype, i);
    return sum;
}
