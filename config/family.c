/* SPDX-License-Identifier: Apache-2.0 */
#include "config/family.h"

#include <string.h>

/* clang-format off */
#define KEYS(...) {__VA_ARGS__}
#define FAMILY(type, experts, top_k, intermediate, sparse, renorm, in_model_dtype, name)                               \
    {type, experts, top_k, intermediate, sparse, renorm, in_model_dtype, name, NULL},
#define LACKING(type, what) {.model_type = type, .why_not = what},
/* clang-format on */

static const struct moe_family families[] = {
#include "config/families.inc"
};

const struct moe_family *moe_family_find(const char *model_type)
{
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (!strcmp(families[i].model_type, model_type))
            return &families[i];
    return NULL;
}

const struct moe_family *moe_family_at(size_t i)
{
    return i < sizeof families / sizeof *families ? &families[i] : NULL;
}
