/* SPDX-License-Identifier: Apache-2.0 */
/* Failures and exit codes; the context and the layer that a command runs on. */
#include "tools/cli.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "runtime/internal.h"

/* ---- Failures ---- */

enum cli_exit cli_exit_of(moe_status status)
{
    switch (status) {
    case MOE_OK:
        return CLI_EXIT_OK;
    case MOE_ERROR_MISMATCH:
        return CLI_EXIT_MISMATCH;
    case MOE_ERROR_INVALID_ARGUMENT:
    case MOE_ERROR_WORKSPACE:
        return CLI_EXIT_USAGE;
    case MOE_ERROR_FILE:
        return CLI_EXIT_FILE;
    case MOE_ERROR_DEVICE:
    case MOE_ERROR_DEVICE_MEMORY:
        return CLI_EXIT_DEVICE;
    case MOE_ERROR_UNSUPPORTED:
    case MOE_ERROR_NO_DEVICE:
    case MOE_ERROR_CAPTURE:
    case MOE_ERROR_OUT_OF_MEMORY:
    case MOE_ERROR_WRITE:
        break;
    }
    return CLI_EXIT_CANNOT;
}

/* `text` may hold anything that a command line can; moe_fail knows what is safe to print. */
static void print_line(const char *text)
{
    struct moe_error line;
    moe_fail(&line, MOE_OK, "%s", text);
    fprintf(stderr, "moe: %s\n", line.text);
}

int cli_fail(enum cli_exit code, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    print_line(text);
    return code;
}

int cli_fail_status(const moe_context *ctx, moe_status status)
{
    struct moe_error err;
    moe_last_error(ctx, err.text, sizeof err.text);
    return cli_fail_error(status, &err);
}

int cli_fail_error(moe_status status, const struct moe_error *err)
{
    print_line(err->text[0] ? err->text : moe_status_string(status));
    return cli_exit_of(status);
}

int cli_fail_memory(void)
{
    return cli_fail(CLI_EXIT_CANNOT, "%s", moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
}

/* ---- Context and layer ---- */

static void print_log(void *verbose, moe_log_level level, const char *text)
{
    if (level == MOE_LOG_WARNING || *(const bool *)verbose)
        print_line(text);
}

int cli_context(const struct cli_target *target, bool verbose, moe_context **ctx)
{
    static bool show_all; /* the context keeps the address */
    show_all = verbose;
    moe_context_options options = moe_context_options_init();
    options.device = target->device.device;
    options.device_index = target->device.index;
    options.threads = (int32_t)target->threads;
    options.tuned = target->tuned;
    options.log = print_log;
    options.log_user = &show_all;
    moe_status status = moe_context_create(&options, ctx);
    return status == MOE_OK ? CLI_GO : cli_fail_status(NULL, status);
}

int cli_checkpoint(moe_context *ctx, const char *directory, int64_t *layer, moe_checkpoint **checkpoint,
                   moe_layer_desc *desc)
{
    *checkpoint = NULL;
    moe_status status = moe_checkpoint_open(ctx, directory, checkpoint);
    if (status != MOE_OK)
        return cli_fail_status(ctx, status);
    moe_checkpoint_info info = moe_checkpoint_info_init();
    status = moe_checkpoint_describe(*checkpoint, &info);
    if (status != MOE_OK)
        return cli_fail_status(ctx, status);
    if (*layer >= info.num_layers)
        return cli_fail(CLI_EXIT_USAGE, "--layer is %lld, but %s has layers 0 to %d", (long long)*layer, directory,
                        info.num_layers - 1);
    if (*layer < 0)
        *layer = info.first_moe_layer;
    if (*layer < 0)
        return cli_fail(CLI_EXIT_FILE, "%s/config.json: the model has no MoE layer", directory);
    *desc = moe_layer_desc_init(MOE_DTYPE_NONE);
    status = moe_checkpoint_layer(*checkpoint, (int32_t)*layer, desc);
    return status == MOE_OK ? CLI_GO : cli_fail_status(ctx, status);
}

int cli_load(moe_context *ctx, moe_checkpoint *checkpoint, int64_t index, moe_path path, moe_layer **layer,
             double *seconds)
{
    const struct moe_path_info *info = moe_path_info_get(path);
    char what[64];
    snprintf(what, sizeof what, "loading layer %lld", (long long)index);
    struct cli_progress progress = {.what = what};
    moe_load_options options = moe_load_options_init();
    options.progress = cli_progress_update;
    options.progress_user = &progress;
    if (info != NULL && (info->layouts & MOE_LAYOUT_PACKED) == 0)
        options.layout = MOE_LAYOUT_ROW_MAJOR;
    double start = cli_now();
    moe_status status = moe_layer_load(checkpoint, (int32_t)index, &options, layer);
    *seconds = cli_now() - start;
    cli_progress_end(&progress);
    return status == MOE_OK ? CLI_GO : cli_fail_status(ctx, status);
}

uint64_t cli_expert_bytes(const moe_layer_desc *desc)
{
    return 3 * (uint64_t)desc->hidden_size * (uint64_t)desc->intermediate_size * moe_dtype_size(desc->dtype);
}

uint64_t cli_gate_bytes(const moe_layer_desc *desc)
{
    return (uint64_t)desc->num_experts * (uint64_t)desc->hidden_size * moe_dtype_size(desc->gate_dtype);
}

uint64_t cli_layer_bytes(const moe_layer_desc *desc)
{
    return (uint64_t)desc->num_experts * cli_expert_bytes(desc) + cli_gate_bytes(desc);
}

const char *cli_show_desc(const moe_layer_desc *desc, char *buffer, size_t bytes)
{
    snprintf(buffer, bytes, "%d experts, top %d, hidden %lld, intermediate %lld, %s", desc->num_experts, desc->top_k,
             (long long)desc->hidden_size, (long long)desc->intermediate_size, moe_dtype_name(desc->dtype));
    return buffer;
}

const char *cli_show_device(const moe_context *ctx, char *buffer, size_t bytes)
{
    moe_device_info info = moe_device_info_init();
    moe_context_device(ctx, &info);
    if (info.device == MOE_DEVICE_CUDA)
        snprintf(buffer, bytes, "cuda:%d, %s, %d SMs", info.device_index, info.name, info.cores);
    else
        snprintf(buffer, bytes, "cpu, %d thread%s, %s", info.cores, info.cores == 1 ? "" : "s", info.features);
    return buffer;
}
