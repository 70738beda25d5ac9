/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `moe tune` measured on one device: the fastest path and configuration for layers of some shapes, by token count.
 * A table is a JSON file:
 *
 *     {"device": {"name": "NVIDIA H200", "compute_capability": 90, "cores": 132},
 *      "entries": [{"hidden_size": 4096, "intermediate_size": 14336, "num_experts": 8, "top_k": 2,
 *                   "dtype": "bf16", "layout": "packed",
 *                   "points": [{"tokens": 256, "path": "prefill"},
 *                              {"tokens": 1024, "path": "prefill", "config": "wgmma-128"}]}]}
 *
 * A point holds from its count up to the next one's; one without `config` leaves that to the path. Every other field
 * must be there, and no further ones.
 */
#ifndef MOE_CONFIG_TUNED_H
#define MOE_CONFIG_TUNED_H

#include <stdbool.h>

#include "config/error.h"
#include "config/output.h"

struct moe_tuned_point {
    int64_t tokens;
    moe_path path;  /* never AUTO */
    char name[32];  /* of its configuration; empty: none */
    int32_t config; /* the number of that name; 0 as read, because only the runtime knows the paths */
};

struct moe_tuned_entry {
    int64_t hidden_size, intermediate_size;
    int32_t num_experts, top_k;
    moe_dtype dtype;
    moe_layout layout;              /* never AUTO */
    struct moe_tuned_point *points; /* [count], by rising tokens */
    int32_t count;
};

/* All zero: an empty table of no device. */
struct moe_tuned {
    char *file; /* for messages */
    char device[256];
    int32_t compute_capability, cores; /* as in moe_device_info */
    struct moe_tuned_entry *entries;   /* [count], each of another shape */
    int32_t count;
};

/* `name` is the file as messages call it. On success *table owns memory: moe_tuned_free. MOE_ERROR_FILE,
 * MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe_tuned_parse(const char *text, size_t length, const char *name, struct moe_tuned *table,
                           struct moe_error *err);
moe_status moe_tuned_load(const char *path, struct moe_tuned *table, struct moe_error *err);
void moe_tuned_free(struct moe_tuned *table);

/* Whether the table was measured on a device like this one. If not, err (may be NULL) says so. */
bool moe_tuned_fits(const struct moe_tuned *table, const moe_device_info *device, struct moe_error *err);

/* The entry for layers like `desc` in `layout`, or NULL. */
const struct moe_tuned_entry *moe_tuned_find(const struct moe_tuned *table, const moe_layer_desc *desc,
                                             moe_layout layout);
/* The point that holds for a count, or NULL below the first. */
const struct moe_tuned_point *moe_tuned_at(const struct moe_tuned_entry *entry, int64_t tokens);

/* The count at which a measurement says most about where the path changes: between two neighbouring points of different
 * paths, the second one at more than a tenth more tokens. 0: every change is known that closely. */
int64_t moe_tuned_between(const struct moe_tuned_entry *entry);

/* Puts a copy of the entry, with neighbours that say the same made one, in the place of the entry of its shape, or
 * last. MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe_tuned_set(struct moe_tuned *table, const struct moe_tuned_entry *entry);

/* Writes the table as a file. The caller commits. */
moe_status moe_tuned_write(const struct moe_tuned *table, struct moe_output *output, struct moe_error *err);

#endif
