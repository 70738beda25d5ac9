/* SPDX-License-Identifier: Apache-2.0 */
/* moe doctor: what this build and this machine have, and why a path is unavailable. */
#include <stdio.h>

#include "kernels/cuda/device.h"
#include "tools/cli.h"
#include "tools/machine.h"

static const struct cli_usage usage = {
    .command = "doctor",
    .summary = "what this machine has, and why a path is unavailable",
    .examples = "  moe doctor\n"
                "  moe doctor --json\n",
};

static moe_device_info describe(const moe_context *ctx)
{
    moe_device_info info = moe_device_info_init();
    moe_context_device(ctx, &info);
    return info;
}

static void print_text(const struct machine *machine)
{
    char memory[32], cache[32];
    int version = moe_version();
    moe_device_info cpu = describe(machine->cpu);
    printf("%-10s libmoe %d.%d.%d\n", "version", version / 10000, version / 100 % 100, version % 100);
    printf("%-10s %s%s\n", "build", moe_cuda_built() ? "CUDA, for compute capabilities " : "without CUDA",
           moe_cuda_built() ? MOE_GPU_ARCHS : "");
    printf("%-10s %s, %d core%s, %s, %s of memory, %s of last-level cache\n", "cpu", cpu.name, cpu.cores,
           cpu.cores == 1 ? "" : "s", cpu.features, cli_show_bytes((double)cpu.memory_bytes, memory, sizeof memory),
           cli_show_bytes((double)cpu.l2_bytes, cache, sizeof cache));
    for (int i = 0; i < machine->gpu_count; i++) {
        moe_device_info gpu = describe(machine->gpus[i]);
        char name[32];
        snprintf(name, sizeof name, "cuda:%d", i);
        printf("%-10s %s, compute capability %d.%d, %d SMs, %s of memory, %s of L2\n", name, gpu.name,
               gpu.compute_capability / 10, gpu.compute_capability % 10, gpu.cores,
               cli_show_bytes((double)gpu.memory_bytes, memory, sizeof memory),
               cli_show_bytes((double)gpu.l2_bytes, cache, sizeof cache));
    }
    if (machine->gpu_count == 0)
        printf("%-10s none: %s\n", "cuda", machine->why_no_more);
    machine_print_paths(machine, NULL);
}

static int print_json(const struct machine *machine)
{
    cJSON *root = cli_json_object(NULL, NULL);
    char text[32];
    int version = moe_version();
    snprintf(text, sizeof text, "%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    cli_json_string(root, "version", text);
    cJSON *build = cli_json_object(root, "build");
    cli_json_bool(build, "cuda", moe_cuda_built());
    cli_json_string(build, "gpu_archs", moe_cuda_built() ? MOE_GPU_ARCHS : "");
    cli_json_device(cli_json_object(root, "cpu"), machine->cpu);
    cJSON *gpus = cli_json_array(root, "gpus");
    for (int i = 0; i < machine->gpu_count; i++)
        cli_json_device(cli_json_element(gpus), machine->gpus[i]);
    if (machine->gpu_count == 0)
        cli_json_string(root, "why_no_gpu", machine->why_no_more);
    machine_json_paths(machine, NULL, cli_json_array(root, "paths"));
    return cli_json_print(root);
}

int moe_cmd_doctor(int argc, char **argv)
{
    bool json = false;
    const struct cli_option options[] = {
        {.name = "json", .kind = CLI_FLAG, .value = &json, .help = "report as JSON"},
        {.name = NULL},
    };
    int code = cli_parse(&usage, options, argc, argv);
    if (code != CLI_GO)
        return code;
    struct machine machine;
    code = machine_open(&machine);
    if (code == CLI_GO) {
        code = CLI_EXIT_OK;
        if (json)
            code = print_json(&machine);
        else
            print_text(&machine);
    }
    machine_close(&machine);
    return code;
}
