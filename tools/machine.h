/* SPDX-License-Identifier: Apache-2.0 */
/* The devices of this machine, and which paths they can run: what inspect and doctor report. */
#ifndef MOE_TOOLS_MACHINE_H
#define MOE_TOOLS_MACHINE_H

#include <cjson/cJSON.h>

#include "moe.h"

enum { MACHINE_MAX_GPUS = 16 };

struct machine {
    moe_context *cpu;
    moe_context *gpus[MACHINE_MAX_GPUS]; /* that work, by CUDA index */
    int gpu_count;
    char why_no_more[1024]; /* what the library said to the GPU after the last */
};

/* CLI_GO or an exit code. That there is no GPU is no failure. */
int machine_open(struct machine *machine);
void machine_close(struct machine *machine);

/* The name of the layout in which a layer like `desc` is loaded on the device that `auto` takes, and that device. */
const char *machine_layout(const struct machine *machine, const moe_layer_desc *desc, const char **device);
/* Prints one line a path, or appends one object a path to `paths`, for layers like `desc` (NULL: any). */
void machine_print_paths(const struct machine *machine, const moe_layer_desc *desc);
void machine_json_paths(const struct machine *machine, const moe_layer_desc *desc, cJSON *paths);

#endif
