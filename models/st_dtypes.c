/* SPDX-License-Identifier: Apache-2.0 */
#include "models/st_dtypes.h"

#include <stdbool.h>
#include <string.h>

static const struct moe_st_dtype dtypes[] = {
    {"BF16", 16, MOE_BF16},
    {"F16", 16, MOE_F16},
    {"F32", 32, MOE_F32},
    {"I32", 32, MOE_I32},
    {"I64", 64, MOE_I64},
    {"BOOL", 8, MOE_DTYPE_NONE},
    {"U8", 8, MOE_DTYPE_NONE},
    {"I8", 8, MOE_DTYPE_NONE},
    {"F8_E4M3", 8, MOE_DTYPE_NONE},
    {"F8_E5M2", 8, MOE_DTYPE_NONE},
    {"F8_E8M0", 8, MOE_DTYPE_NONE},
    {"F8_E4M3FNUZ", 8, MOE_DTYPE_NONE},
    {"F8_E5M2FNUZ", 8, MOE_DTYPE_NONE},
    {"F4", 4, MOE_DTYPE_NONE},
    {"F6_E2M3", 6, MOE_DTYPE_NONE},
    {"F6_E3M2", 6, MOE_DTYPE_NONE},
    {"I16", 16, MOE_DTYPE_NONE},
    {"U16", 16, MOE_DTYPE_NONE},
    {"U32", 32, MOE_DTYPE_NONE},
    {"U64", 64, MOE_DTYPE_NONE},
    {"F64", 64, MOE_DTYPE_NONE},
    {"C64", 64, MOE_DTYPE_NONE},
};

const struct moe_st_dtype *moe_st_dtype_by_name(const char *name)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(dtypes[i].name, name))
            return &dtypes[i];
    return NULL;
}

const struct moe_st_dtype *moe_st_dtype_by_type(moe_dtype type)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].type == type && type != MOE_DTYPE_NONE)
            return &dtypes[i];
    return NULL;
}

bool moe_st_shape_bytes(const struct moe_st_dtype *dtype, int32_t rank, const int64_t *shape, uint64_t *bytes)
{
    /* Zeroes are left out of the product, so that whether it overflows does not depend on where they stand. */
    uint64_t bits = dtype->bits;
    bool empty = false;
    for (int32_t i = 0; i < rank; i++) {
        if (shape[i] < 0 || (shape[i] && __builtin_mul_overflow(bits, (uint64_t)shape[i], &bits)))
            return false;
        empty |= shape[i] == 0;
    }
    *bytes = empty ? 0 : bits / 8;
    return empty || bits % 8 == 0;
}
