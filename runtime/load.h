/* SPDX-License-Identifier: Apache-2.0 */
/* Weights from files into the memory of a device, and the host memory that holds them on the CPU. */
#ifndef MOE_RUNTIME_LOAD_H
#define MOE_RUNTIME_LOAD_H

#include "runtime/internal.h"

/* Memory for layer weights: aligned to 2 MB and made of huge pages where the system has them, so that reading it costs
 * few page faults and TLB misses. Zeroed. MOE_ERROR_OUT_OF_MEMORY. Free with the same `bytes`; NULL is accepted. */
moe_status moe_host_alloc(uint64_t bytes, void **pointer);
void moe_host_free(void *pointer, uint64_t bytes);

/* Reads all segments of `source` into `parts`, which the caller allocated for `layout` (moe_view_bytes): host memory
 * for a CPU context, device memory for a CUDA one. Packed layers are for CUDA only. Waits until the bytes have arrived.
 * options may be NULL; its callback runs on the calling thread. MOE_ERROR_FILE names the file; after a failure the
 * contents of `parts` are undefined. */
moe_status moe_load_parts(moe_context *ctx, const struct moe_layer_source *source, moe_layout layout,
                          void *const parts[MOE_PART_COUNT], const moe_load_options *options, struct moe_error *err);

#endif
