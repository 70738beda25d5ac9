/* SPDX-License-Identifier: Apache-2.0 */
/* Which shard holds which tensor: model.safetensors.index.json, or what stands for it. */
#ifndef MOE_MODELS_INDEX_H
#define MOE_MODELS_INDEX_H

#include "config/error.h"

struct moe_index_entry {
    const char *tensor;
    int32_t file; /* into files */
};

struct moe_index {
    const char **files; /* [file_count] plain names in the checkpoint's directory, sorted */
    int32_t file_count;
    struct moe_index_entry *entries; /* [count], sorted by tensor */
    size_t count;
    char *text; /* what the names point into */
};

/* `name` is the file as messages call it. On success *index owns memory: moe_index_free. MOE_ERROR_FILE,
 * MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe_index_parse(const char *text, size_t length, const char *name, struct moe_index *index,
                           struct moe_error *err);
moe_status moe_index_load(const char *path, struct moe_index *index, struct moe_error *err);
/* The same for a directory that has no index, as after the download of single shards: from the headers of all the
 * model*.safetensors files that are in it. A tensor in two of them is an error. */
moe_status moe_index_scan(const char *directory, struct moe_index *index, struct moe_error *err);
void moe_index_free(struct moe_index *index);

/* The file that holds a tensor; -1 for a tensor that the index does not name. */
int32_t moe_index_find(const struct moe_index *index, const char *tensor);

#endif
