/* SPDX-License-Identifier: Apache-2.0 */
/* Batches of tokens in safetensors files. */
#ifndef MOE_TOOLS_TENSOR_IO_H
#define MOE_TOOLS_TENSOR_IO_H

#include <stdbool.h>

#include "config/error.h"

/* A batch in host memory, as runner.h runs it. */
struct host_batch {
    int64_t tokens, hidden;
    moe_dtype dtype;           /* of hidden_states and output */
    const void *hidden_states; /* [tokens, hidden] */

    /* Routing from outside; topk_ids NULL: the layer routes. */
    const void *topk_ids;      /* [tokens, top_k], ids_dtype */
    const float *topk_weights; /* [tokens, top_k] */
    moe_dtype ids_dtype;       /* MOE_I32 or MOE_I64 */
    int32_t top_k;             /* columns of topk_ids */
};

/* Reads `hidden_states` [tokens, hidden] (BF16, F16 or F32) from a safetensors file, and with `routing` also `topk_ids`
 * [tokens, k] (I32 or I64) and `topk_weights` [tokens, k] (F32). The batch owns its memory: host_batch_free. Messages
 * name file and tensor. */
moe_status host_batch_read(const char *path, int64_t hidden, bool routing, struct host_batch *batch,
                           struct moe_error *err);
void host_batch_free(struct host_batch *batch);

#endif
