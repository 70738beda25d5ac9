/* SPDX-License-Identifier: Apache-2.0 */
/* A checkpoint directory: config.json, the shards, and where each layer's tensors lie in them. */
#ifndef MOE_MODELS_MODEL_H
#define MOE_MODELS_MODEL_H

#include "config/config.h"
#include "models/safetensors.h"

struct moe_model;

/* Opens config.json and either model.safetensors (which wins, as in transformers), or model.safetensors.index.json with
 * the shards that it names, or without both whatever model*.safetensors files there are. A shard is opened and checked
 * when moe_model_layer first needs it, and may be missing until then: a layer that lies wholly in the shards at hand
 * loads. */
moe_status moe_model_open(const char *directory, struct moe_model **model, struct moe_error *err);
void moe_model_close(struct moe_model *model);
const struct moe_config *moe_model_config(const struct moe_model *model);
const char *moe_model_directory(const struct moe_model *model);
/* The safetensors files that belong to the checkpoint, and the bytes of those that are there. */
int32_t moe_model_file_count(const struct moe_model *model);
uint64_t moe_model_file_bytes(const struct moe_model *model);

/* The parts of a layer in canonical form. */
enum moe_part {
    MOE_PART_GATE, /* [E, H], gate_dtype */
    MOE_PART_W13,  /* [E, 2I, H]: gate rows, then up rows */
    MOE_PART_W2,   /* [E, H, I] */
    MOE_PART_COUNT
};

/* One contiguous run of bytes from a file into a part. */
struct moe_segment {
    int file;         /* descriptor, open as long as the model is */
    const char *path; /* for messages */
    uint64_t file_offset;
    uint64_t bytes;
    enum moe_part part;
    uint64_t part_offset;
};

/* Where the bytes of one layer are. The segments cover every part exactly once, ordered by file and offset so that
 * reading is sequential. */
struct moe_layer_source {
    moe_layer_desc desc; /* dtypes from the tensors */
    uint64_t part_bytes[MOE_PART_COUNT];
    struct moe_segment *segments;
    size_t segment_count;
};

/* Finds layer `index` and checks that all its tensors are there, with the right shape and one dtype; an error names
 * the layer, the tensor and the file. MOE_ERROR_FILE; MOE_ERROR_INVALID_ARGUMENT for a layer number that the model has
 * not. Free with moe_layer_source_free. Thread-safe for one model. */
moe_status moe_model_layer(struct moe_model *model, int32_t index, struct moe_layer_source *source,
                           struct moe_error *err);
void moe_layer_source_free(struct moe_layer_source *source);

/* Reads `bytes` at `offset` of a segment into memory (pread, retried on short reads). A file that has become shorter
 * is MOE_ERROR_FILE. */
moe_status moe_segment_read(const struct moe_segment *segment, uint64_t offset, void *destination, uint64_t bytes,
                            struct moe_error *err);

#endif
