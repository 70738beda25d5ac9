/* SPDX-License-Identifier: Apache-2.0 */
/* Runs batches that are in host memory on a layer, wherever the layer is. */
#ifndef MOE_TOOLS_RUNNER_H
#define MOE_TOOLS_RUNNER_H

#include "tools/tensor_io.h"

/* Memory of one kind that grows to the largest batch seen. */
struct runner_buffer {
    void *data;
    size_t bytes;
};

struct runner {
    moe_context *ctx;
    const moe_layer *layer;
    moe_layer_desc desc;
    moe_path wanted;

    /* Of the batch that runner_load took. */
    moe_batch batch;  /* with device pointers */
    bool routes;      /* whole layer, not only the experts */
    moe_path path;    /* what runs it */
    char reason[256]; /* and why */

    struct runner_buffer x, ids, weights, output, logits, ids_out, weights_out, workspace; /* on the device */
    struct runner_buffer host_output, host_logits, host_ids, host_weights;
};

/* What a batch gave, in host memory that lives until the next runner_fetch. Without routing of its own the ids, weights
 * and logits are NULL. */
struct runner_result {
    const void *output;         /* [tokens, hidden], the batch's dtype */
    const float *router_logits; /* [tokens, experts] */
    const int32_t *topk_ids;    /* [tokens, top_k] */
    const float *topk_weights;  /* [tokens, top_k] */
};

moe_status runner_init(struct runner *r, moe_context *ctx, const moe_layer *layer, moe_path wanted);
void runner_free(struct runner *r);
/* Takes a batch to the device and chooses its path. On failure of any call the text is the context's last error. */
moe_status runner_load(struct runner *r, const struct host_batch *batch);
/* Runs it, waits, and adds nothing else: what is timed. */
moe_status runner_run(struct runner *r);
moe_status runner_fetch(struct runner *r, struct runner_result *result);

/* Bytes of the weights that a batch needs: its distinct experts, and the gate's if the layer routed. */
uint64_t runner_weight_bytes(const moe_layer_desc *desc, const void *ids, moe_dtype ids_dtype, int64_t count,
                             bool routes);

#endif
