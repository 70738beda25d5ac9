/* SPDX-License-Identifier: Apache-2.0 */
/* Names and numbers that cross the interface. */
#include "moe.h"

int moe_version(void)
{
    return MOE_VERSION;
}

const char *moe_status_string(moe_status status)
{
    switch (status) {
#define MOE_STATUS_CASE(name, number, text)                                                                            \
    case name:                                                                                                         \
        return text;
        MOE_STATUS_MAP(MOE_STATUS_CASE)
#undef MOE_STATUS_CASE
    }
    return "unknown status";
}

size_t moe_dtype_size(moe_dtype dtype)
{
    switch (dtype) {
    case MOE_BF16:
    case MOE_F16:
        return 2;
    case MOE_F32:
    case MOE_I32:
        return 4;
    case MOE_I64:
        return 8;
    case MOE_DTYPE_NONE:
        break;
    }
    return 0;
}

const char *moe_dtype_name(moe_dtype dtype)
{
    switch (dtype) {
    case MOE_BF16:
        return "bf16";
    case MOE_F16:
        return "f16";
    case MOE_F32:
        return "f32";
    case MOE_I32:
        return "i32";
    case MOE_I64:
        return "i64";
    case MOE_DTYPE_NONE:
        break;
    }
    return "?";
}

static const char *const path_names[MOE_PATH_COUNT] = {
#define MOE_PATH_TEXT(name, number, text) [name] = text,
    MOE_PATH_MAP(MOE_PATH_TEXT)
#undef MOE_PATH_TEXT
};

const char *moe_path_name(moe_path path)
{
    return (unsigned)path < MOE_PATH_COUNT ? path_names[path] : NULL;
}

moe_status moe_path_from_name(const char *name, moe_path *path)
{
    if (name == NULL || path == NULL)
        return MOE_ERROR_INVALID_ARGUMENT;
    for (int i = 0; i < MOE_PATH_COUNT; i++) {
        if (strcmp(name, path_names[i]) == 0) {
            *path = (moe_path)i;
            return MOE_OK;
        }
    }
    return MOE_ERROR_INVALID_ARGUMENT;
}
