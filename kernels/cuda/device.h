/* SPDX-License-Identifier: Apache-2.0 */
/* The CUDA device as the runtime needs it, in plain C. kernels/cuda/device.c, or device_none.c in a build without CUDA,
 * where every call answers MOE_ERROR_NO_DEVICE. */
#ifndef MOE_KERNELS_CUDA_DEVICE_H
#define MOE_KERNELS_CUDA_DEVICE_H

#include <stdbool.h>

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

struct moe_cuda_facts {
    char name[256];
    int32_t sms;
    int32_t compute_capability;
    int32_t shared_bytes, cluster; /* as in moe_exec */
    uint64_t memory_bytes, l2_bytes;
};

bool moe_cuda_built(void);
/* Why there is no device goes to err: no driver, no GPU, index out of range, too old, not in this build. */
moe_status moe_cuda_open(int32_t device, struct moe_cuda_facts *facts, struct moe_error *err);
moe_status moe_cuda_alloc(int32_t device, size_t bytes, void **pointer, struct moe_error *err);
void moe_cuda_free(int32_t device, void *pointer);
moe_status moe_cuda_copy(int32_t device, void *to, const void *from, size_t bytes, void *stream, struct moe_error *err);
moe_status moe_cuda_synchronize(int32_t device, void *stream, struct moe_error *err);
/* Makes `device` current for this thread, remembers which one was in *previous, and says whether `stream` is being
 * captured. After success moe_cuda_leave(*previous) puts the thread's device back. */
moe_status moe_cuda_enter(int32_t device, void *stream, int32_t *previous, bool *capturing, struct moe_error *err);
void moe_cuda_leave(int32_t previous);

/* Pinned staging for loading: two or more buffers, each with an event that says when its copy is done. */
struct moe_cuda_stage;
/* lands: moe_cuda_stage_pack will be called, and needs `bytes` of device memory beside. */
moe_status moe_cuda_stage_create(int32_t device, size_t bytes, bool lands, struct moe_cuda_stage **stage,
                                 struct moe_error *err);
/* The next buffer, free to be written; waits for the copy that last used it. */
moe_status moe_cuda_stage_next(struct moe_cuda_stage *stage, void **host, struct moe_error *err);
/* Starts the copy of that buffer's first `bytes` to the device. */
moe_status moe_cuda_stage_send(struct moe_cuda_stage *stage, void *device, size_t bytes, struct moe_error *err);
/* The same for canonical rows of a stack that is packed on the device; the arguments are those of moe_pack_rows. */
moe_status moe_cuda_stage_pack(struct moe_cuda_stage *stage, const struct moe_weights_view *view, bool w13,
                               int64_t first, int64_t rows, void *packed, struct moe_error *err);
/* Waits for all copies and frees; accepts NULL. */
moe_status moe_cuda_stage_destroy(struct moe_cuda_stage *stage, struct moe_error *err);

/* For moe_cuda_open: whether this build has kernels that the current device can run, and in clusters of how many blocks
 * (probe.cu). */
moe_status moe_cuda_probe(int32_t *cluster, struct moe_error *err);

#ifdef __cplusplus
}
#endif

#endif
