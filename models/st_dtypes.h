/* SPDX-License-Identifier: Apache-2.0 */
/* The dtypes of safetensors, shared by reader and writer. */
#ifndef MOE_MODELS_ST_DTYPES_H
#define MOE_MODELS_ST_DTYPES_H

#include "moe.h"

struct moe_st_dtype {
    const char *name;
    uint8_t bits;
    moe_dtype type; /* MOE_DTYPE_NONE: libmoe computes nothing with it */
};

/* NULL for a name or type that safetensors has not. */
const struct moe_st_dtype *moe_st_dtype_by_name(const char *name);
const struct moe_st_dtype *moe_st_dtype_by_type(moe_dtype type);

/* Bytes of `shape`; false if they overflow, a dimension is negative, or the bits do not fill whole bytes. */
_Bool moe_st_shape_bytes(const struct moe_st_dtype *dtype, int32_t rank, const int64_t *shape, uint64_t *bytes);

#endif
