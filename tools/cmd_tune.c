/* SPDX-License-Identifier: Apache-2.0 */
/* moe tune: times every way in which auto may run a layer, and writes the fastest by token count to the table that it
 * chooses by. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "runtime/internal.h"
#include "tools/bench/source.h"

/* What is faster by less than this share may be so by chance, and then the formula's choice stays. */
static const double least_gain = 0.01;

enum { MAX_SAMPLES = 50, MAX_POINTS = 2 * BENCH_MAX_POINTS };

struct tune {
    struct bench_source source;
    struct cli_target target;
    const char *tokens, *output;
    double seconds;
    bool json;
    struct bench_counts counts;

    moe_context *ctx;
    moe_device_info device;
    struct moe_tuned table; /* as it was, then with this layer's entry */
    struct moe_output *file;
    struct bench_workload workload;
    moe_layout layout; /* in which the layer would be loaded */
    struct bench_machine *machine;
    struct bench_meter *meter;                 /* its runs are the candidates */
    struct moe_tuned_point points[MAX_POINTS]; /* the entry's */
    struct moe_tuned_entry entry;
    cJSON *root, *json_points;
};

/* ---- The command line ---- */

static int parse_options(struct tune *t, int argc, char **argv)
{
    const struct cli_option options[] = {
        BENCH_SOURCE_OPTIONS(t->source),
        {.name = "tokens",
         .kind = CLI_STRING,
         .value = &t->tokens,
         .argument = "LIST",
         .help = "token counts to measure (default 1,2,4,... 16384)"},
        {.name = "output",
         .letter = 'o',
         .kind = CLI_STRING,
         .value = &t->output,
         .argument = "FILE",
         .help = "the table (default moe-tuned.json); other layers' entries in it stay"},
        CLI_DEVICE_OPTION(t->target),
        CLI_THREADS_OPTION(t->target),
        {.name = "seconds",
         .kind = CLI_NUMBER,
         .value = &t->seconds,
         .argument = "S",
         .help = "a count with three samples ends after this long (default 5)"},
        {.name = "json", .kind = CLI_FLAG, .value = &t->json, .help = "report as JSON, at the end"},
        {.name = NULL}};
    static const struct cli_usage usage = {
        .command = "tune",
        .summary = "measure this device, and write the table that auto chooses by",
        .examples =
            "  moe tune\n"
            "  moe tune --like qwen3-30b-a3b --tokens 256,1024,8192\n"
            "  moe tune --model Mixtral-8x7B-v0.1 --output h200.json\n"
            "  MOE_TUNED=moe-tuned.json moe forward --model Mixtral-8x7B-v0.1 --input x.safetensors --output y\n",
        .notes = BENCH_SHAPES
        "\n"
        "Every path and configuration that can run the layer without waiting for the host is timed at each\n"
        "count, as in 'moe bench': in turns, with cold caches, on a GPU as CUDA graphs. The fastest one holds\n"
        "from its count up to the next; the formula's choice stays where nothing is 1 % faster. Where the path\n"
        "changes from one count to the next, counts in between are measured too, until the change is known\n"
        "to a tenth.\n"
        "\n"
        "The table is for one device: its name, compute capability and SMs (on a CPU, threads). Wherever the\n"
        "environment variable MOE_TUNED names it, for the other commands and any program with the library,\n"
        "'auto' chooses by it for layers of the shapes it has, and by its formula for all others.\n"};
    t->source.command = "tune";
    t->source.layer = -1;
    t->tokens = BENCH_TOKENS;
    t->output = "moe-tuned.json";
    t->seconds = 5;
    t->target.tuned = ""; /* what is measured against is the formula */
    int code = cli_parse(&usage, options, argc, argv);
    if (code == CLI_GO)
        code = bench_source_check(&t->source);
    return code == CLI_GO ? bench_counts_parse(&t->counts, "tune", t->tokens) : code;
}

/* ---- Setting up ---- */

/* The place for the new table, and the one that is there already, if it is this device's: what can fail fails before
 * the measurements. */
static int open_table(struct tune *t)
{
    struct moe_error err = {{0}};
    moe_status status = moe_output_open(t->output, &t->file, &err);
    if (status == MOE_OK && access(t->output, F_OK) == 0) {
        status = moe_tuned_load(t->output, &t->table, &err);
        if (status == MOE_OK && !moe_tuned_fits(&t->table, &t->device, &err))
            return cli_fail(CLI_EXIT_FILE, "%s: give another --output", err.text);
    } else if (status == MOE_OK) {
        snprintf(t->table.device, sizeof t->table.device, "%s", t->device.name);
        t->table.compute_capability = t->device.compute_capability;
        t->table.cores = t->device.cores;
    }
    return bench_settle(t->ctx, status, &err);
}

static const moe_layer *layer_of(const struct tune *t)
{
    return t->workload.layers[t->layout];
}

/* `reference` is what others are checked against, not a choice. */
static int add_candidates(struct tune *t)
{
    for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++) {
        struct bench_run run = {.path = (moe_path)p, .layout = t->layout};
        moe_path path;
        if (p == MOE_PATH_REFERENCE || moe_path_info_get(run.path)->synchronises ||
            moe_path_choose(layer_of(t), run.path, 1, &path, NULL, 0) != MOE_OK)
            continue;
        do {
            if (moe_choose_config(t->ctx, moe_path_info_get(run.path), run.config, NULL) == MOE_OK &&
                !bench_meter_add(t->meter, &run))
                return cli_fail_memory();
        } while (moe_path_config_name(run.path, ++run.config));
    }
    return CLI_GO;
}

static int set_up(struct tune *t)
{
    int code = cli_context(&t->target, false, &t->ctx);
    if (code != CLI_GO)
        return code;
    t->device = moe_device_info_init();
    code = bench_settle(t->ctx, moe_context_device(t->ctx, &t->device), NULL);
    if (code == CLI_GO)
        code = open_table(t);
    if (code == CLI_GO)
        code = bench_source_open(&t->source, t->ctx, &t->workload);
    if (code != CLI_GO)
        return code;
    struct moe_error err = {{0}};
    moe_status status = moe_choose_layout(t->ctx, &t->workload.desc, MOE_LAYOUT_AUTO, &t->layout, &err);
    if (status == MOE_OK && t->layout == MOE_LAYOUT_PACKED)
        status = bench_workload_pack(&t->workload);
    if (status == MOE_OK)
        status = bench_workload_tokens(&t->workload, t->counts.tokens[t->counts.count - 1], false);
    code = bench_settle(t->ctx, status, &err);
    if (code == CLI_GO)
        code = bench_machine_open(t->ctx, &t->machine);
    if (code != CLI_GO)
        return code;
    t->entry.points = t->points;
    t->meter = bench_meter_open(&t->workload, t->machine, MAX_SAMPLES, t->seconds);
    return t->meter ? add_candidates(t) : cli_fail_memory();
}

/* ---- Reporting ---- */

/* A column of the table: a path's own choice under the path's name, then its configurations. */
static const char *column_of(const struct bench_run *run, int *width)
{
    const char *title = run->config ? moe_path_config_name(run->path, run->config) : moe_path_name(run->path);
    *width = strlen(title) > 9 ? (int)strlen(title) : 9;
    return title;
}

/* "prefill wgmma-128"; without a configuration, the path's own choice: "prefill". */
static const char *name_of(const struct bench_run *run, char *buffer, size_t bytes)
{
    const char *config = moe_path_config_name(run->path, run->config);
    snprintf(buffer, bytes, "%s%s%s", moe_path_name(run->path), config ? " " : "", config ? config : "");
    return buffer;
}

static void begin_report(struct tune *t)
{
    char desc[256], device[512];
    const struct bench_result *result;
    if (t->json) {
        t->root = cli_json_object(NULL, NULL);
        cli_json_string(t->root, "workload", t->source.title);
        cli_json_desc(cli_json_object(t->root, "layer"), &t->workload.desc);
        cli_json_string(t->root, "layout", moe_layouts_name(t->layout));
        cli_json_device(cli_json_object(t->root, "device"), t->ctx);
        t->json_points = cli_json_array(t->root, "points");
        return;
    }
    printf("%s: %s, %s\n%s\n\ntokens", t->source.title, cli_show_desc(&t->workload.desc, desc, sizeof desc),
           moe_layouts_name(t->layout), cli_show_device(t->ctx, device, sizeof device));
    for (int i = 0, width; (result = bench_meter_result(t->meter, i)) != NULL; i++) {
        const char *title = column_of(&result->run, &width);
        printf(" %*s", width, title);
    }
    puts("  chosen");
}

static void json_run(cJSON *object, const struct bench_run *run)
{
    cli_json_string(object, "path", moe_path_name(run->path));
    if (run->config)
        cli_json_string(object, "config", moe_path_config_name(run->path, run->config));
}

/* What one count came to. */
struct verdict {
    int64_t tokens;
    char formula[512];                     /* its choice, with the reason */
    const struct bench_result *by_formula; /* NULL: that could not be timed */
    const struct bench_result *chosen;     /* NULL: nothing could */
    double gain;                           /* the share of the formula's time that the chosen one saves; 0 without */
};

static void json_point(const struct tune *t, const struct verdict *v)
{
    cJSON *point = cli_json_element(t->json_points), *list = cli_json_array(point, "candidates");
    const struct bench_result *result;
    cli_json_number(point, "tokens", (double)v->tokens);
    cli_json_string(point, "formula", v->formula);
    if (v->chosen)
        json_run(cli_json_object(point, "chosen"), &v->chosen->run);
    cli_json_number(point, "gain", v->gain);
    for (int i = 0; (result = bench_meter_result(t->meter, i)) != NULL; i++) {
        cJSON *entry = cli_json_element(list);
        json_run(entry, &result->run);
        cli_json_number(entry, "samples", result->time.samples);
        if (result->time.samples)
            cli_json_number(entry, "median_seconds", result->time.median);
        else
            cli_json_string(entry, "skipped", result->note);
    }
}

static void print_point(const struct tune *t, const struct verdict *v)
{
    const struct bench_result *result;
    char text[64];
    printf("%6lld", (long long)v->tokens);
    for (int i = 0, width; (result = bench_meter_result(t->meter, i)) != NULL; i++) {
        column_of(&result->run, &width);
        printf(" %*s", width, result->time.samples ? cli_show_seconds(result->time.median, text, sizeof text) : "-");
    }
    printf("  %s", v->chosen ? name_of(&v->chosen->run, text, sizeof text) : bench_meter_result(t->meter, 0)->note);
    if (v->chosen && v->chosen == v->by_formula)
        printf(", the formula's choice");
    else if (v->by_formula)
        printf(", %.1f %% less time than %s", 100 * v->gain, v->formula);
    else if (v->chosen)
        printf("; the formula's choice could not be timed");
    putchar('\n');
    fflush(stdout); /* a point can take a minute */
}

static int end_report(struct tune *t)
{
    const struct moe_tuned_entry *entry = moe_tuned_find(&t->table, &t->workload.desc, t->layout);
    if (t->json) {
        cli_json_string(t->root, "file", t->output);
        cli_json_number(t->root, "points_written", entry->count);
        int code = cli_json_print(t->root);
        t->root = NULL;
        return code;
    }
    printf("\n%s: %d point%s for this layer; to choose by it: MOE_TUNED=%s\n", t->output, entry->count,
           entry->count == 1 ? "" : "s", t->output);
    return CLI_EXIT_OK;
}

/* ---- Measuring ---- */

/* Puts a choice into its place among the points. */
static void keep(struct tune *t, int64_t tokens, const struct bench_run *run)
{
    const char *config = moe_path_config_name(run->path, run->config);
    struct moe_tuned_point *point = &t->points[t->entry.count++];
    for (; point > t->points && point[-1].tokens > tokens; point--)
        *point = point[-1];
    *point = (struct moe_tuned_point){.tokens = tokens, .path = run->path};
    snprintf(point->name, sizeof point->name, "%s", config ? config : "");
}

/* Judges the meter's last point, and keeps what is to be written. */
static int judge(struct tune *t, int64_t tokens)
{
    struct verdict v = {.tokens = tokens};
    const struct bench_result *result;
    moe_path path;
    moe_status status = moe_path_choose(layer_of(t), MOE_PATH_AUTO, tokens, &path, v.formula, sizeof v.formula);
    if (status != MOE_OK)
        return cli_fail_status(t->ctx, status);
    for (int i = 0; (result = bench_meter_result(t->meter, i)) != NULL; i++) {
        if (!result->time.samples)
            continue;
        if (!v.chosen || result->time.median < v.chosen->time.median)
            v.chosen = result;
        if (result->run.path == path && !result->run.config)
            v.by_formula = result;
    }
    if (v.by_formula && v.chosen->time.median > (1 - least_gain) * v.by_formula->time.median)
        v.chosen = v.by_formula;
    if (v.by_formula)
        v.gain = 1 - v.chosen->time.median / v.by_formula->time.median;
    if (v.chosen)
        keep(t, tokens, &v.chosen->run);
    if (t->json)
        json_point(t, &v);
    else
        print_point(t, &v);
    return CLI_GO;
}

static int measure_count(struct tune *t, int64_t tokens)
{
    struct moe_error err = {{0}};
    int code = bench_settle(t->ctx, bench_meter_point(t->meter, tokens, NULL, &err), &err);
    return code == CLI_GO ? judge(t, tokens) : code;
}

/* The counts asked for, then those that say where the path changes. */
static int measure(struct tune *t)
{
    int code = CLI_GO;
    begin_report(t);
    for (int i = 0; code == CLI_GO && i < t->counts.count; i++) {
        if (i == 0 || t->counts.tokens[i] != t->counts.tokens[i - 1])
            code = measure_count(t, t->counts.tokens[i]);
    }
    int32_t known = 0; /* points before the last count: one at which nothing could be timed is the last */
    int64_t tokens;
    while (code == CLI_GO && t->entry.count > known && t->entry.count < MAX_POINTS &&
           (tokens = moe_tuned_between(&t->entry)) != 0) {
        known = t->entry.count;
        code = measure_count(t, tokens);
    }
    return code;
}

static int write_table(struct tune *t)
{
    if (t->entry.count == 0)
        return cli_fail(CLI_EXIT_CANNOT, "tune: nothing could be timed: %s", bench_meter_result(t->meter, 0)->note);
    const moe_layer_desc *d = &t->workload.desc;
    struct moe_error err = {{0}};
    t->entry.hidden_size = d->hidden_size;
    t->entry.intermediate_size = d->intermediate_size;
    t->entry.num_experts = d->num_experts;
    t->entry.top_k = d->top_k;
    t->entry.dtype = d->dtype;
    t->entry.layout = t->layout;
    if (moe_tuned_set(&t->table, &t->entry) != MOE_OK)
        return cli_fail_memory();
    moe_status status = moe_tuned_write(&t->table, t->file, &err);
    if (status == MOE_OK) {
        status = moe_output_commit(t->file, &err);
        t->file = NULL;
    }
    return status == MOE_OK ? end_report(t) : cli_fail_error(status, &err);
}

static void tear_down(struct tune *t)
{
    cJSON_Delete(t->root);
    bench_meter_close(t->meter);
    if (t->machine)
        t->machine->close(t->machine);
    bench_workload_free(&t->workload);
    moe_output_abort(t->file);
    moe_tuned_free(&t->table);
    moe_context_destroy(t->ctx);
}

int moe_cmd_tune(int argc, char **argv)
{
    struct tune *t = calloc(1, sizeof *t);
    if (!t)
        return cli_fail_memory();
    int code = parse_options(t, argc, argv);
    if (code == CLI_GO)
        code = set_up(t);
    if (code == CLI_GO)
        code = measure(t);
    if (code == CLI_GO)
        code = write_table(t);
    tear_down(t);
    free(t);
    return code;
}
