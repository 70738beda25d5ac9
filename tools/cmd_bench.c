/* SPDX-License-Identifier: Apache-2.0 */
/* moe bench: times the layer on every path over token counts, against ceilings measured in between; or its loading. */
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench/bench.h"
#include "tools/cli.h"

enum { MAX_POINTS = 64, MAX_TOKENS = 1 << 20 };

struct bench {
    const char *model, *like, *shape, *tokens, *paths, *layouts, *configs, *max_sms;
    int64_t layer_index, reps;
    double seconds;
    int routing;
    moe_dtype dtype;
    bool load, json, csv;
    struct cli_target target;
    struct bench_plan plan;

    int64_t counts[MAX_POINTS]; /* of --tokens, rising */
    int points;
    char title[128];
    moe_context *ctx;
    moe_device_info device;
    struct bench_machine *machine;
    struct bench_workload workload;
    struct bench_report *report;
    struct bench_meter *meter;
};

static const char *const routings[] = {"uniform", "zipf", "single", NULL};

/* ---- The command line ---- */

static int by_count(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int parse_tokens(struct bench *b)
{
    const char *list = b->tokens;
    char word[32];
    while (bench_word(&list, word, sizeof word)) {
        if (b->points == MAX_POINTS)
            return cli_fail(CLI_EXIT_USAGE, "bench: --tokens has more than %d counts", MAX_POINTS);
        if (!bench_count(word, MAX_TOKENS, &b->counts[b->points]))
            return cli_fail(CLI_EXIT_USAGE, "bench: --tokens has '%s', expected an integer from 1 to %d", word,
                            MAX_TOKENS);
        b->points++;
    }
    if (b->points == 0)
        return cli_fail(CLI_EXIT_USAGE, "bench: --tokens is empty, expected a list like 1,16,256");
    /* Rising, because every estimate is made from a smaller count. */
    qsort(b->counts, (size_t)b->points, sizeof *b->counts, by_count);
    return CLI_GO;
}

static int parse_shape(const char *text, struct bench_shape *shape)
{
    int64_t values[4];
    static const int64_t high[4] = {1 << 20, 1 << 20, MOE_MAX_EXPERTS, MOE_MAX_TOP_K};
    char word[32];
    const char *list = text;
    for (int i = 0; i < 4; i++) {
        if (!bench_word(&list, word, sizeof word) || !bench_count(word, high[i], &values[i]))
            return cli_fail(CLI_EXIT_USAGE, "bench: --shape is '%s', expected HIDDEN,INTERMEDIATE,EXPERTS,TOP_K", text);
    }
    if (*list || values[3] > values[2])
        return cli_fail(CLI_EXIT_USAGE, "bench: --shape is '%s', expected four numbers, top_k not above experts", text);
    *shape = (struct bench_shape){"layer", values[0], values[1], (int32_t)values[2], (int32_t)values[3]};
    return CLI_GO;
}

static int unknown_shape(const char *name)
{
    const char *names[32];
    size_t count = 0;
    for (; bench_shape_at(count) && count < 31; count++)
        names[count] = bench_shape_at(count)->name;
    names[count] = NULL;
    char hint[128];
    return cli_fail(CLI_EXIT_USAGE, "bench: --like '%s' is no shape that bench knows%s", name,
                    cli_did_you_mean(name, "", names, hint, sizeof hint));
}

static int check_options(const struct bench *b)
{
    if ((b->model != NULL) + (b->like != NULL) + (b->shape != NULL) > 1)
        return cli_fail(CLI_EXIT_USAGE, "bench: --model, --like and --shape exclude each other");
    if (b->json && b->csv)
        return cli_fail(CLI_EXIT_USAGE, "bench: --json and --csv exclude each other");
    if (b->model && (b->routing != BENCH_UNIFORM || b->dtype != MOE_DTYPE_NONE))
        return cli_fail(CLI_EXIT_USAGE, "bench: --routing and --dtype are the checkpoint's own with --model");
    if (!b->model && (b->layer_index >= 0 || b->load))
        return cli_fail(CLI_EXIT_USAGE, "bench: --%s needs --model", b->load ? "load" : "layer");
    if (b->load &&
        (b->tokens || b->paths || b->layouts || b->configs || b->max_sms || b->plan.stages || b->seconds > 0 || b->csv))
        return cli_fail(CLI_EXIT_USAGE,
                        "bench: --tokens, --paths, --layouts, --configs, --max-sms, --stages, --seconds "
                        "and --csv are not for --load");
    return CLI_GO;
}

static void set_defaults(struct bench *b)
{
    if (!b->tokens)
        b->tokens = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384";
    if (!b->paths)
        b->paths = "all";
    if (b->reps == 0)
        b->reps = b->load ? 5 : 20;
    if (b->seconds == 0)
        b->seconds = 5;
}

static int parse_options(struct bench *b, int argc, char **argv)
{
    const struct cli_option options[] = {
        {.name = "like",
         .kind = CLI_STRING,
         .value = &b->like,
         .argument = "NAME",
         .help = "a random layer of a known shape (default mixtral-8x7b)"},
        {.name = "shape",
         .kind = CLI_STRING,
         .value = &b->shape,
         .argument = "H,I,E,K",
         .help = "a random layer: hidden, intermediate, experts, top_k"},
        {.name = "model",
         .letter = 'm',
         .kind = CLI_STRING,
         .value = &b->model,
         .argument = "DIR",
         .help = "a layer of this checkpoint"},
        {.name = "layer",
         .letter = 'l',
         .kind = CLI_INTEGER,
         .value = &b->layer_index,
         .argument = "N",
         .help = "which (default: the first MoE layer)",
         .low = 0,
         .high = INT32_MAX},
        {.name = "tokens",
         .kind = CLI_STRING,
         .value = &b->tokens,
         .argument = "LIST",
         .help = "token counts (default 1,2,4,... 16384)"},
        {.name = "paths",
         .kind = CLI_STRING,
         .value = &b->paths,
         .argument = "LIST",
         .help = "paths by name, or all (default)"},
        {.name = "layouts",
         .kind = CLI_STRING,
         .value = &b->layouts,
         .argument = "LIST",
         .help = "of weights, for paths that read both: packed (default), row-major"},
        {.name = "configs",
         .kind = CLI_STRING,
         .value = &b->configs,
         .argument = "LIST",
         .help = "also configurations of paths, by name or number, or all"},
        {.name = "max-sms",
         .kind = CLI_STRING,
         .value = &b->max_sms,
         .argument = "LIST",
         .help = "also auto, and paths with configurations, on so many SMs"},
        {.name = "load", .kind = CLI_FLAG, .value = &b->load, .help = "time loading the layer of --model instead"},
        {.name = "stages", .kind = CLI_FLAG, .value = &b->plan.stages, .help = "also the router and the experts alone"},
        {.name = "routing",
         .kind = CLI_CHOICE,
         .value = &b->routing,
         .argument = "R",
         .help = "uniform (default), zipf, or single: all tokens to the same experts",
         .choices = routings},
        {.name = "dtype", .kind = CLI_DTYPE, .value = &b->dtype, .argument = "D", .help = "bf16 (default), f16 or f32"},
        {.name = "device",
         .kind = CLI_DEVICE,
         .value = &b->target.device,
         .argument = "D",
         .help = "auto, cpu, cuda or cuda:INDEX (default auto)"},
        {.name = "threads",
         .kind = CLI_INTEGER,
         .value = &b->target.threads,
         .argument = "N",
         .help = "CPU threads (default: as many as the process may use)",
         .low = 1,
         .high = 4096},
        {.name = "reps",
         .kind = CLI_INTEGER,
         .value = &b->reps,
         .argument = "N",
         .help = "samples of each path and point (default 20), or loads (default 5)",
         .low = 1,
         .high = 100000},
        {.name = "seconds",
         .kind = CLI_NUMBER,
         .value = &b->seconds,
         .argument = "S",
         .help = "a point with three samples ends after this long (default 5)"},
        {.name = "json", .kind = CLI_FLAG, .value = &b->json, .help = "JSON, at the end"},
        {.name = "csv", .kind = CLI_FLAG, .value = &b->csv, .help = "CSV, a line a result"},
        {.name = NULL}};
    static const struct cli_usage usage = {
        .command = "bench",
        .summary = "time layers and stages over token counts and paths",
        .examples = "  moe bench\n"
                    "  moe bench --like qwen3-30b-a3b --tokens 1,16,256 --device cpu\n"
                    "  moe bench --model Mixtral-8x7B-v0.1 --layer 3 --paths simple,cublas-loop --json\n"
                    "  moe bench --load --model Mixtral-8x7B-v0.1\n"
                    "  moe bench --shape 4096,1536,64,6 --routing zipf --csv\n"
                    "  moe bench --paths auto,prefill --layouts packed,row-major --configs all --max-sms 66,99,120\n",
        .notes = "Shapes: mixtral-8x7b, phi3.5-moe, dsv3-ep4, gpt-oss, qwen2-moe-a2.7b, qwen3-30b-a3b, olmoe.\n"
                 "\n"
                 "Samples of ceilings and paths take turns in an order that changes, each with cold caches; times\n"
                 "are medians. 'moved' is what any implementation has to move: the weights of the experts that\n"
                 "got tokens, and the hidden states in and out. The floor is the longer of reading that and of a\n"
                 "dense product of the same FLOPs; 'x floor' is a path's time as a multiple of it. A path that\n"
                 "would take over 10 s at a point is skipped.\n"
                 "On a GPU a sample is a CUDA graph; paths that wait for the host are launched as they are.\n"
                 "\n"
                 "--load times loading a layer, and in turns with it a plain read: a loop of pread over the same\n"
                 "bytes by one thread, into fresh memory like the layer's; for a GPU, into a host buffer of 16 MiB\n"
                 "and copied from there. All is read once before, so that both find it in the page cache.\n"};
    b->layer_index = -1;
    int code = cli_parse(&usage, options, argc, argv);
    if (code == CLI_GO)
        code = check_options(b);
    if (code == CLI_GO)
        set_defaults(b);
    if (code == CLI_GO)
        code = bench_plan_parse(&b->plan, b->paths, b->layouts, b->configs, b->max_sms);
    return code == CLI_GO ? parse_tokens(b) : code;
}

/* ---- Setting up ---- */

/* A status is CLI_GO, or a line on stderr and an exit code. */
static int settle(const struct bench *b, moe_status status, const struct moe_error *err)
{
    if (status == MOE_OK)
        return CLI_GO;
    return err && err->text[0] ? cli_fail_error(status, err) : cli_fail_status(b->ctx, status);
}

/* Opens the checkpoint, and settles which layer it is. */
static int open_model(struct bench *b, moe_checkpoint **checkpoint, moe_layer_desc *desc)
{
    int code = cli_checkpoint(b->ctx, b->model, &b->layer_index, checkpoint, desc);
    snprintf(b->title, sizeof b->title, "%s layer %lld", b->model, (long long)b->layer_index);
    return code;
}

static int load_model(struct bench *b)
{
    moe_checkpoint *checkpoint = NULL;
    moe_layer *layer = NULL;
    moe_layer_desc desc;
    double seconds;
    int code = open_model(b, &checkpoint, &desc);
    if (code == CLI_GO) /* row-major, which is what `reference` reads */
        code = cli_load(b->ctx, checkpoint, b->layer_index, MOE_PATH_REFERENCE, &layer, &seconds);
    moe_checkpoint_close(checkpoint);
    if (code != CLI_GO)
        return code;
    return settle(b, bench_workload_adopt(&b->workload, b->ctx, layer), NULL);
}

static int make_layer(struct bench *b)
{
    struct bench_shape shape;
    const char *name = b->like ? b->like : "mixtral-8x7b";
    int code = CLI_GO;
    if (b->shape)
        code = parse_shape(b->shape, &shape);
    else if (!bench_shape_find(name))
        code = unknown_shape(name);
    else
        shape = *bench_shape_find(name);
    if (code != CLI_GO)
        return code;
    snprintf(b->title, sizeof b->title, "%s", shape.name);
    moe_dtype dtype = b->dtype == MOE_DTYPE_NONE ? MOE_BF16 : b->dtype;
    return settle(b, bench_workload_create(&b->workload, b->ctx, &shape, dtype, (enum bench_routing)b->routing), NULL);
}

/* Where no path reads packed weights there are none, unless they were asked for. */
static int pack_layer(struct bench *b)
{
    if (!bench_plan_packs(&b->plan))
        return CLI_GO;
    moe_status status = bench_workload_pack(&b->workload);
    if (status == MOE_ERROR_UNSUPPORTED && !b->plan.layouts[MOE_LAYOUT_PACKED])
        return CLI_GO;
    return settle(b, status, NULL);
}

static int open_machine(struct bench *b)
{
    struct moe_error err = {{0}};
    moe_status status = b->device.device == MOE_DEVICE_CUDA ? bench_cuda_open(b->device.device_index, &b->machine, &err)
                                                            : bench_cpu_open(b->ctx, &b->machine, &err);
    return settle(b, status, &err);
}

static int open_context(struct bench *b)
{
    int code = cli_context(&b->target, false, &b->ctx);
    if (code != CLI_GO)
        return code;
    b->device = moe_device_info_init();
    code = settle(b, moe_context_device(b->ctx, &b->device), NULL);
    if (code == CLI_GO && b->plan.bounds && b->device.device != MOE_DEVICE_CUDA)
        return cli_fail(CLI_EXIT_CANNOT, "bench: --max-sms is for a GPU, and this is a CPU");
    return code;
}

static int set_up(struct bench *b)
{
    int code = open_context(b);
    if (code == CLI_GO)
        code = b->model ? load_model(b) : make_layer(b);
    if (code == CLI_GO)
        code = pack_layer(b);
    if (code == CLI_GO)
        code = settle(b, bench_workload_tokens(&b->workload, b->counts[b->points - 1], (enum bench_routing)b->routing),
                      NULL);
    if (code == CLI_GO)
        code = open_machine(b);
    if (code != CLI_GO)
        return code;
    enum bench_format format = b->json ? BENCH_JSON : b->csv ? BENCH_CSV : BENCH_TABLE;
    b->report = bench_report_open(format, &b->workload, b->title, routings[b->routing], b->machine);
    b->meter = bench_meter_open(&b->workload, b->machine, b->reps, b->seconds);
    return b->report && b->meter ? bench_plan_add(&b->plan, &b->workload, b->meter, b->report) : cli_fail_memory();
}

/* What --load does. */
static int time_loading(struct bench *b)
{
    moe_checkpoint *checkpoint = NULL;
    moe_layer_desc desc;
    struct bench_load result;
    struct moe_error err = {{0}};
    int code = cli_context(&b->target, false, &b->ctx);
    if (code == CLI_GO)
        code = open_model(b, &checkpoint, &desc);
    if (code == CLI_GO)
        code = settle(b, bench_load(&result, b->ctx, checkpoint, (int32_t)b->layer_index, b->reps, &err), &err);
    moe_checkpoint_close(checkpoint);
    return code == CLI_GO ? bench_report_load(b->json ? BENCH_JSON : BENCH_TABLE, &result, b->ctx, b->title, &desc)
                          : code;
}

/* Every point, against the ceilings. */
static int time_points(struct bench *b)
{
    int code = set_up(b);
    for (int i = 0; code == CLI_GO && i < b->points; i++) {
        struct moe_error err = {{0}};
        code = settle(b, bench_meter_point(b->meter, b->counts[i], b->report, &err), &err);
    }
    if (b->report) {
        int printed = bench_report_close(b->report, code == CLI_GO);
        code = code == CLI_GO ? printed : code;
    }
    return code;
}

static void tear_down(struct bench *b)
{
    bench_meter_close(b->meter);
    if (b->machine)
        b->machine->close(b->machine);
    bench_workload_free(&b->workload);
    moe_context_destroy(b->ctx);
}

int moe_cmd_bench(int argc, char **argv)
{
    struct bench *b = calloc(1, sizeof *b);
    if (!b)
        return cli_fail_memory();
    int code = parse_options(b, argc, argv);
    if (code == CLI_GO)
        code = b->load ? time_loading(b) : time_points(b);
    tear_down(b);
    free(b);
    return code;
}
