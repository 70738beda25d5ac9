/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/machine.h"

#include <stdio.h>

#include "runtime/internal.h"
#include "tools/cli.h"

int machine_open(struct machine *machine)
{
    memset(machine, 0, sizeof *machine);
    const struct cli_target cpu = {.device.device = MOE_DEVICE_CPU, .tuned = ""};
    int code = cli_context(&cpu, false, &machine->cpu);
    if (code != CLI_GO)
        return code;
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    options.tuned = ""; /* a table that is wrong makes no device unavailable */
    while (machine->gpu_count < MACHINE_MAX_GPUS) {
        options.device_index = machine->gpu_count;
        if (moe_context_create(&options, &machine->gpus[machine->gpu_count]) != MOE_OK) {
            moe_last_error(NULL, machine->why_no_more, sizeof machine->why_no_more);
            break;
        }
        machine->gpu_count++;
    }
    return CLI_GO;
}

void machine_close(struct machine *machine)
{
    for (int i = 0; i < machine->gpu_count; i++)
        moe_context_destroy(machine->gpus[i]);
    moe_context_destroy(machine->cpu);
    memset(machine, 0, sizeof *machine);
}

/* Whether any device runs the path. Where none does, `reason` is the most telling one: of a path that needs a GPU, and
 * would run on one, that there is none. */
static bool path_runs(const struct machine *machine, moe_path path, const moe_layer_desc *desc, char *reason,
                      size_t bytes)
{
    if (moe_path_available(machine->cpu, path, desc, reason, bytes) == MOE_OK) {
        snprintf(reason, bytes, "cpu");
        return true;
    }
    if (path == MOE_PATH_REFERENCE || path == MOE_PATH_CPU)
        return false;
    for (int i = 0; i < machine->gpu_count; i++) {
        if (moe_path_available(machine->gpus[i], path, desc, reason, bytes) == MOE_OK) {
            snprintf(reason, bytes, "cuda:%d", i);
            return true;
        }
    }
    if (machine->gpu_count == 0)
        snprintf(reason, bytes, "%s", machine->why_no_more);
    return false;
}

/* A reason begins with the path's name where it stands alone; in a list of paths that says nothing. */
static const char *without_name(const char *reason, moe_path path)
{
    char prefix[64];
    int length = snprintf(prefix, sizeof prefix, "path '%s': ", moe_path_name(path));
    return strncmp(reason, prefix, (size_t)length) == 0 ? reason + length : reason;
}

const char *machine_layout(const struct machine *machine, const moe_layer_desc *desc, const char **device)
{
    const moe_context *ctx = machine->gpu_count > 0 ? machine->gpus[0] : machine->cpu;
    moe_layout layout;
    *device = machine->gpu_count > 0 ? "cuda:0" : "cpu";
    moe_choose_layout(ctx, desc, MOE_LAYOUT_AUTO, &layout, NULL);
    return moe_layouts_name(layout);
}

void machine_print_paths(const struct machine *machine, const moe_layer_desc *desc)
{
    char reason[1024];
    for (int path = MOE_PATH_AUTO + 1; path < MOE_PATH_COUNT; path++) {
        bool runs = path_runs(machine, (moe_path)path, desc, reason, sizeof reason);
        printf("%-10s %-15s %s%s", path == MOE_PATH_AUTO + 1 ? "paths" : "", moe_path_name((moe_path)path),
               runs ? "on " : "no: ", without_name(reason, (moe_path)path));
        const struct moe_path_info *info = moe_path_info_get((moe_path)path);
        if (runs && info->device == MOE_DEVICE_CUDA)
            printf(", %s weights", moe_layouts_name(info->layouts));
        putchar('\n');
    }
}

void machine_json_paths(const struct machine *machine, const moe_layer_desc *desc, cJSON *paths)
{
    char reason[1024];
    for (int path = MOE_PATH_AUTO + 1; path < MOE_PATH_COUNT; path++) {
        bool runs = path_runs(machine, (moe_path)path, desc, reason, sizeof reason);
        cJSON *element = cli_json_element(paths);
        cli_json_string(element, "name", moe_path_name((moe_path)path));
        cli_json_bool(element, "available", runs);
        cli_json_string(element, runs ? "device" : "reason", without_name(reason, (moe_path)path));
        cJSON *layouts = cli_json_array(element, "layouts");
        for (unsigned layout = MOE_LAYOUT_ROW_MAJOR; layouts && layout <= MOE_LAYOUT_PACKED; layout++)
            if (moe_path_info_get((moe_path)path)->layouts & layout)
                cJSON_AddItemToArray(layouts, cJSON_CreateString(moe_layouts_name(layout)));
    }
}
