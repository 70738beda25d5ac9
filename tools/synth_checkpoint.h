/* SPDX-License-Identifier: Apache-2.0 */
/* The directory of a synthetic checkpoint: shards, index and config.json. */
#ifndef MOE_TOOLS_SYNTH_CHECKPOINT_H
#define MOE_TOOLS_SYNTH_CHECKPOINT_H

#include "tools/synth_fill.h"

struct synth_checkpoint {
    const char *directory;
    bool force; /* replace a checkpoint that is there */
    const struct synth_plan *plan;
    const cJSON *config; /* the config.json to write */
    struct synth_fill *fill;
    /* How far synth_checkpoint_write has come. */
    size_t files_written; /* shards under their names */
    bool made_directory;
};

/* Writes the whole checkpoint, or takes back what it has written. CLI_GO or, the line written, an exit code. */
int synth_checkpoint_write(struct synth_checkpoint *checkpoint);

#endif
