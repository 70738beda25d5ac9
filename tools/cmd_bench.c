/* SPDX-License-Identifier: Apache-2.0 */
/* moe bench: times the layer on every path over token counts, against ceilings measured in between, by itself or as the
 * layers of a model that decodes; or its loading. */
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench/source.h"

struct bench {
    struct bench_source source;
    const char *tokens, *paths, *layouts, *configs, *max_sms;
    int64_t reps;
    double seconds;
    bool load, decode, json, csv;
    struct cli_target target;
    struct bench_plan plan;

    struct bench_counts counts;
    moe_context *ctx;
    moe_device_info device;
    struct bench_machine *machine;
    struct bench_workload workload;
    struct bench_report *report;
    struct bench_meter *meter;
};

#define DECODE_TOKENS "1,2,4,8,16,32,64,128,256"
static const char *const routings[] = {"uniform", "zipf", "single", NULL};
enum { ANY_ROUTING = -1 };

/* ---- The command line ---- */

static int check_options(const struct bench *b)
{
    if (b->json && b->csv)
        return cli_fail(CLI_EXIT_USAGE, "bench: --json and --csv exclude each other");
    if (b->source.model && b->source.routing > BENCH_UNIFORM)
        return cli_fail(CLI_EXIT_USAGE, "bench: --routing is the checkpoint's own with --model");
    if (b->decode && (b->load || b->plan.stages))
        return cli_fail(CLI_EXIT_USAGE, "bench: %s is not for --decode", b->load ? "--load" : "--stages");
    if (!b->source.model && b->load)
        return cli_fail(CLI_EXIT_USAGE, "bench: --load needs --model");
    if (b->load &&
        (b->tokens || b->paths || b->layouts || b->configs || b->max_sms || b->plan.stages || b->seconds > 0 || b->csv))
        return cli_fail(CLI_EXIT_USAGE,
                        "bench: --tokens, --paths, --layouts, --configs, --max-sms, --stages, --seconds "
                        "and --csv are not for --load");
    return bench_source_check(&b->source);
}

static void set_defaults(struct bench *b)
{
    if (!b->tokens)
        b->tokens = b->decode ? DECODE_TOKENS : BENCH_TOKENS;
    if (!b->paths)
        b->paths = b->decode ? "auto" : "all";
    if (b->reps == 0)
        b->reps = b->load ? 5 : b->decode ? 100 : 20;
    if (b->seconds == 0)
        b->seconds = 5;
    /* Without --decode one routing is enough, and a checkpoint has but its own. */
    if (b->source.routing == ANY_ROUTING && (!b->decode || b->source.model))
        b->source.routing = BENCH_UNIFORM;
    b->plan.chain = b->decode;
}

static int parse_options(struct bench *b, int argc, char **argv)
{
    const struct cli_option options[] = {
        BENCH_SOURCE_OPTIONS(b->source),
        {.name = "tokens",
         .kind = CLI_STRING,
         .value = &b->tokens,
         .argument = "LIST",
         .help = "token counts (default 1,2,4,... 16384, with --decode 256)"},
        {.name = "paths",
         .kind = CLI_STRING,
         .value = &b->paths,
         .argument = "LIST",
         .help = "paths by name, or all (default; with --decode auto)"},
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
        {.name = "decode", .kind = CLI_FLAG, .value = &b->decode, .help = "time few tokens as a model runs them"},
        {.name = "load", .kind = CLI_FLAG, .value = &b->load, .help = "time loading the layer of --model instead"},
        {.name = "stages", .kind = CLI_FLAG, .value = &b->plan.stages, .help = "also the router and the experts alone"},
        {.name = "routing",
         .kind = CLI_CHOICE,
         .value = &b->source.routing,
         .argument = "R",
         .help = "uniform (default), zipf, or single: all to the same experts; with --decode all three",
         .choices = routings},
        CLI_DEVICE_OPTION(b->target),
        CLI_THREADS_OPTION(b->target),
        {.name = "reps",
         .kind = CLI_INTEGER,
         .value = &b->reps,
         .argument = "N",
         .help = "samples of each path and point (default 20, with --decode 100), or loads (5)",
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
                    "  moe bench --decode --like qwen3-30b-a3b --paths decode,prefill\n"
                    "  moe bench --load --model Mixtral-8x7B-v0.1\n"
                    "  moe bench --shape 4096,1536,64,6 --routing zipf --csv\n"
                    "  moe bench --paths auto,prefill --layouts packed,row-major --configs all --max-sms 66,99,120\n",
        .notes = BENCH_SHAPES
        "\n"
        "Samples of ceilings and paths take turns in an order that changes, each with cold caches; times\n"
        "are medians. 'moved' is what any implementation has to move: the weights of the experts that\n"
        "got tokens, and the hidden states in and out. The floor is the longer of reading that and of a\n"
        "dense product of the same FLOPs; 'x floor' is a path's time as a multiple of it. A path that\n"
        "would take over 10 s at a point is skipped.\n"
        "On a GPU a sample is a CUDA graph; paths that wait for the host are launched as they are.\n"
        "\n"
        "--decode times whole layers at few tokens in two ways: one alone, as above, and one in a chain, as a\n"
        "model runs it: 32 layers one after the other (on a GPU, in one graph), whose time is divided by 32.\n"
        "The layers of the chain have copies of the weights, as many as fill half of the memory, and send\n"
        "the same tokens to other experts, so that the weights come from memory each time. Both are given\n"
        "as median and 99th percentile, in microseconds, and as share of the floor, in percent.\n"
        "\n"
        "--load times loading a layer, and in turns with it a plain read: a loop of pread over the same\n"
        "bytes by one thread, into fresh memory like the layer's; for a GPU, into a host buffer of 16 MiB\n"
        "and copied from there. All is read once before, so that both find it in the page cache.\n"};
    b->source.command = "bench";
    b->source.layer = -1;
    b->source.routing = ANY_ROUTING;
    int code = cli_parse(&usage, options, argc, argv);
    if (code == CLI_GO)
        code = check_options(b);
    if (code == CLI_GO)
        set_defaults(b);
    if (code == CLI_GO)
        code = bench_plan_parse(&b->plan, b->paths, b->layouts, b->configs, b->max_sms);
    return code == CLI_GO ? bench_counts_parse(&b->counts, "bench", b->tokens) : code;
}

/* ---- Setting up ---- */

/* Where no path reads packed weights there are none, unless they were asked for. */
static int pack_layer(struct bench *b)
{
    if (!bench_plan_packs(&b->plan))
        return CLI_GO;
    moe_status status = bench_workload_pack(&b->workload);
    if (status == MOE_ERROR_UNSUPPORTED && !b->plan.layouts[MOE_LAYOUT_PACKED])
        return CLI_GO;
    return bench_settle(b->ctx, status, NULL);
}

static int open_context(struct bench *b)
{
    int code = cli_context(&b->target, false, &b->ctx);
    if (code != CLI_GO)
        return code;
    b->device = moe_device_info_init();
    code = bench_settle(b->ctx, moe_context_device(b->ctx, &b->device), NULL);
    if (code == CLI_GO && b->plan.bounds && b->device.device != MOE_DEVICE_CUDA)
        return cli_fail(CLI_EXIT_CANNOT, "bench: --max-sms is for a GPU, and this is a CPU");
    return code;
}

/* For --decode: the chain, in the layouts that the meter's runs read. */
static int make_chain(struct bench *b)
{
    bool layouts[BENCH_LAYOUTS] = {false};
    const struct bench_result *result;
    struct moe_error err = {{0}};
    for (int i = 0; (result = bench_meter_result(b->meter, i)) != NULL; i++)
        layouts[result->run.layout] = true;
    int code = bench_settle(b->ctx, bench_chain_create(&b->workload, layouts, &err), &err);
    if (code == CLI_GO)
        bench_report_chain(b->report, &b->workload);
    return code;
}

static int set_up(struct bench *b)
{
    int code = open_context(b);
    if (code == CLI_GO)
        code = bench_source_open(&b->source, b->ctx, &b->workload);
    if (code == CLI_GO)
        code = pack_layer(b);
    bool biased = b->source.routing != BENCH_UNIFORM; /* also for all routings in turn */
    if (code == CLI_GO)
        code = bench_settle(b->ctx, bench_workload_tokens(&b->workload, b->counts.tokens[b->counts.count - 1], biased),
                            NULL);
    if (code == CLI_GO)
        code = bench_machine_open(b->ctx, &b->machine);
    if (code != CLI_GO)
        return code;
    enum bench_format format = b->json ? BENCH_JSON : b->csv ? BENCH_CSV : BENCH_TABLE;
    const char *routing = b->decode ? NULL : routings[b->source.routing];
    b->report = bench_report_open(format, &b->workload, b->source.title, routing, b->machine);
    b->meter = bench_meter_open(&b->workload, b->machine, b->reps, b->seconds);
    if (!b->report || !b->meter)
        return cli_fail_memory();
    code = bench_plan_add(&b->plan, &b->workload, b->meter, b->report);
    return code == CLI_GO && b->decode ? make_chain(b) : code;
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
        code = bench_source_model(&b->source, b->ctx, &checkpoint, &desc);
    if (code == CLI_GO)
        code = bench_settle(b->ctx, bench_load(&result, b->ctx, checkpoint, (int32_t)b->source.layer, b->reps, &err),
                            &err);
    moe_checkpoint_close(checkpoint);
    return code == CLI_GO
               ? bench_report_load(b->json ? BENCH_JSON : BENCH_TABLE, &result, b->ctx, b->source.title, &desc)
               : code;
}

/* Every token count, against the ceilings. */
static int time_counts(struct bench *b)
{
    int code = CLI_GO;
    for (int i = 0; code == CLI_GO && i < b->counts.count; i++) {
        struct moe_error err = {{0}};
        code = bench_settle(b->ctx, bench_meter_point(b->meter, b->counts.tokens[i], b->report, &err), &err);
    }
    return code;
}

/* What --decode does: every token count with every routing asked for. */
static int time_decode(struct bench *b)
{
    int code = CLI_GO;
    for (int routing = BENCH_UNIFORM; code == CLI_GO && routings[routing]; routing++) {
        if (b->source.routing != ANY_ROUTING && b->source.routing != routing)
            continue;
        if (b->source.routing == ANY_ROUTING)
            code = bench_settle(b->ctx, bench_workload_route(&b->workload, (enum bench_routing)routing), NULL);
        bench_report_routing(b->report, b->source.model ? "model" : routings[routing]);
        if (code == CLI_GO)
            code = time_counts(b);
    }
    return code;
}

static int time_points(struct bench *b)
{
    int code = set_up(b);
    if (code == CLI_GO)
        code = b->decode ? time_decode(b) : time_counts(b);
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
