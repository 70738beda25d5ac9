/* SPDX-License-Identifier: Apache-2.0 */
/* Files of random tensors: the same seed and names give the same bytes, whatever the number of threads. */
#ifndef MOE_TOOLS_SYNTH_FILL_H
#define MOE_TOOLS_SYNTH_FILL_H

#include <signal.h>

#include "kernels/cpu/pool.h"
#include "tools/cli.h"
#include "tools/normal.h"
#include "tools/synth_plan.h"

struct synth_fill {
    int64_t seed;
    const volatile sig_atomic_t *stop; /* not 0: writing ends with a failure */
    struct cli_progress progress;
    uint64_t bytes, bytes_total; /* written, and what is the whole */
    struct moe_pool *pool;
    struct normal *streams[SYNTH_STREAMS]; /* a table for each standard deviation */
    void *buffer;
};

/* Makes what a layer like `desc` takes; threads 0: as many as the process may use. False if memory is short. */
bool synth_fill_init(struct synth_fill *fill, const moe_layer_desc *desc, int64_t threads);
void synth_fill_free(struct synth_fill *fill);

/* Writes the file of these tensors, each from its stream. It appears whole or not at all. */
moe_status synth_fill_file(struct synth_fill *fill, const char *path, const struct moe_st_write_tensor *tensors,
                           const enum synth_stream *streams, size_t count, struct moe_error *err);

#endif
