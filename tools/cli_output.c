/* SPDX-License-Identifier: Apache-2.0 */
/* What commands show: progress, sizes and times for people, JSON for programs. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "tools/cli.h"

/* ---- Progress ---- */

static bool stderr_is_terminal(void)
{
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) && !(term && strcmp(term, "dumb") == 0);
}

void cli_progress_update(void *user, uint64_t done, uint64_t total)
{
    struct cli_progress *progress = user;
    double now = cli_now();
    if (progress->last == 0)
        progress->last = now;
    if (now - progress->last < 0.1 || !stderr_is_terminal())
        return;
    progress->last = now;
    progress->shown = true;
    enum { WIDTH = 30 };
    double part = total ? (double)done / (double)total : 1;
    int filled = (int)(part * WIDTH);
    char bar[WIDTH + 1], done_text[32], total_text[32];
    memset(bar, '.', WIDTH);
    memset(bar, '#', (size_t)(filled < WIDTH ? filled : WIDTH));
    bar[WIDTH] = 0;
    fprintf(stderr, "\r%s [%s] %3.0f %%, %s of %s\033[K", progress->what, bar, 100 * part,
            cli_show_bytes((double)done, done_text, sizeof done_text),
            cli_show_bytes((double)total, total_text, sizeof total_text));
    fflush(stderr);
}

void cli_progress_end(struct cli_progress *progress)
{
    if (progress->shown)
        fputs("\r\033[K", stderr);
    progress->last = 0;
    progress->shown = false;
}

/* ---- Output ---- */

double cli_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double cli_median(double *values, size_t count)
{
    qsort(values, count, sizeof *values, compare_doubles);
    return 0.5 * (values[(count - 1) / 2] + values[count / 2]);
}

const char *cli_show_bytes(double bytes, char *buffer, size_t size)
{
    static const char *const units[] = {"bytes", "KB", "MB", "GB", "TB", "PB", "EB"};
    int unit = 0;
    while (bytes >= 999.5 && unit < 6) {
        bytes /= 1000;
        unit++;
    }
    int digits = unit == 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2;
    snprintf(buffer, size, "%.*f %s", digits, bytes, units[unit]);
    return buffer;
}

const char *cli_show_seconds(double seconds, char *buffer, size_t size)
{
    if (seconds >= 1)
        snprintf(buffer, size, "%.2f s", seconds);
    else if (seconds >= 1e-3)
        snprintf(buffer, size, "%.2f ms", 1e3 * seconds);
    else
        snprintf(buffer, size, "%.1f us", 1e6 * seconds);
    return buffer;
}

static bool json_failed;

cJSON *cli_json_object(cJSON *object, const char *name)
{
    cJSON *made = object ? cJSON_AddObjectToObject(object, name) : cJSON_CreateObject();
    json_failed |= !made;
    return made;
}

cJSON *cli_json_array(cJSON *object, const char *name)
{
    cJSON *made = object ? cJSON_AddArrayToObject(object, name) : NULL;
    json_failed |= object && !made;
    return made;
}

cJSON *cli_json_element(cJSON *array)
{
    cJSON *made = array ? cJSON_CreateObject() : NULL;
    if (made && !cJSON_AddItemToArray(array, made)) {
        cJSON_Delete(made);
        made = NULL;
    }
    json_failed |= array && !made;
    return made;
}

void cli_json_number(cJSON *object, const char *name, double value)
{
    json_failed |= object && !cJSON_AddNumberToObject(object, name, value);
}

void cli_json_string(cJSON *object, const char *name, const char *value)
{
    json_failed |= object && !cJSON_AddStringToObject(object, name, value);
}

void cli_json_bool(cJSON *object, const char *name, bool value)
{
    json_failed |= object && !cJSON_AddBoolToObject(object, name, value);
}

void cli_json_desc(cJSON *object, const moe_layer_desc *desc)
{
    cli_json_number(object, "num_experts", desc->num_experts);
    cli_json_number(object, "top_k", desc->top_k);
    cli_json_number(object, "hidden_size", (double)desc->hidden_size);
    cli_json_number(object, "intermediate_size", (double)desc->intermediate_size);
    cli_json_string(object, "dtype", moe_dtype_name(desc->dtype));
    cli_json_string(object, "gate_dtype", moe_dtype_name(desc->gate_dtype));
}

void cli_json_device(cJSON *object, const moe_context *ctx)
{
    moe_device_info info = moe_device_info_init();
    moe_context_device(ctx, &info);
    bool cuda = info.device == MOE_DEVICE_CUDA;
    cli_json_string(object, "kind", cuda ? "cuda" : "cpu");
    cli_json_number(object, "index", info.device_index);
    cli_json_string(object, "name", info.name);
    cli_json_number(object, cuda ? "sms" : "threads", info.cores);
    if (cuda)
        cli_json_number(object, "compute_capability", info.compute_capability);
    else
        cli_json_string(object, "features", info.features);
    cli_json_number(object, "memory_bytes", (double)info.memory_bytes);
    cli_json_number(object, "cache_bytes", (double)info.l2_bytes);
}

int cli_json_print(cJSON *root)
{
    char *text = root && !json_failed ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    if (!text)
        return cli_fail_memory();
    puts(text);
    cJSON_free(text);
    return CLI_EXIT_OK;
}
