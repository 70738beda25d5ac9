/* SPDX-License-Identifier: Apache-2.0 */
/* What a synthetic checkpoint holds: the tensors of its MoE layers in file order, cut into shards. */
#ifndef MOE_TOOLS_SYNTH_PLAN_H
#define MOE_TOOLS_SYNTH_PLAN_H

#include "config/config.h"
#include "models/safetensors.h"

/* Standard deviations differ by the number of columns. */
enum synth_stream { SYNTH_HIDDEN, SYNTH_INTERMEDIATE, SYNTH_UNIT, SYNTH_STREAMS };

/* Zeroes: an empty plan. */
struct synth_plan {
    struct moe_st_write_tensor *tensors; /* own their names */
    enum synth_stream *streams;          /* of each tensor */
    size_t count, room;
    size_t *shards; /* first tensor of each shard, then the end */
    size_t shard_count;
    uint64_t bytes; /* of all tensors */
};

uint64_t synth_tensor_bytes(const struct moe_st_write_tensor *tensor);

/* CLI_GO or, the line written, an exit code. The caller frees the plan either way. */
int synth_plan_make(struct synth_plan *plan, const struct moe_config *config, int64_t shard_size);
void synth_plan_free(struct synth_plan *plan);

#endif
