/* SPDX-License-Identifier: Apache-2.0 */
/* moe forward: hidden states from a file through one layer into a file. */
#include <stdio.h>
#include <stdlib.h>

#include "models/safetensors.h"
#include "runtime/session.h"
#include "tools/cli.h"
#include "tools/runner.h"

static const struct cli_usage usage = {
    .command = "forward",
    .summary = "run one layer of a model on hidden states from a file",
    .examples = "  moe forward --model Mixtral-8x7B-v0.1 --layer 0 --input x.safetensors --output y.safetensors\n"
                "  moe forward --model model --input x.safetensors --output y.safetensors --device cuda:1\n"
                "  moe forward --model model --input x.safetensors --capture session --phase decode\n"
                "  moe forward --model model --input x.safetensors --output y.safetensors --path reference --json\n",
    .notes =
        "The input holds 'hidden_states' [tokens, hidden] in BF16, F16 or F32; for --routing given also 'topk_ids'\n"
        "[tokens, k] (I32 or I64) and 'topk_weights' [tokens, k] (F32). The output holds 'hidden_states' in the\n"
        "input's shape and dtype, 'topk_ids' (I32), 'topk_weights' (F32) and, if the layer routed, 'router_logits'\n"
        "(F32) [tokens, experts]. It appears whole or not at all, and may be the input's own name.\n",
};

enum routing { ROUTING_NEW, ROUTING_GIVEN };

struct forward_options {
    const char *model, *input, *output, *capture, *phase;
    int64_t layer, repeat;
    int routing;
    bool json, verbose;
    struct cli_target target;
};

/* Everything that the run holds, so that one place frees it. */
struct forward {
    struct forward_options o;
    moe_context *ctx;
    moe_checkpoint *checkpoint;
    moe_layer *layer;
    moe_capture *capture;
    struct moe_st_writer *writer; /* of the output */
    moe_layer_desc desc;
    struct host_batch batch;
    struct runner runner;
    struct runner_result result;
    int32_t *given_ids; /* the batch's ids as I32, where they came as I64 */
    double load_seconds;
    double *seconds; /* of each repeat; rising once the median is known */
    double median;
};

static int parse(int argc, char **argv, struct forward_options *o)
{
    static const char *const routings[] = {"new", "given", NULL};
    *o = (struct forward_options){.layer = -1, .repeat = 1};
    const struct cli_option options[] = {
        {.name = "model", .kind = CLI_STRING, .value = &o->model, .argument = "DIR", .help = "checkpoint directory"},
        {.name = "layer",
         .kind = CLI_INTEGER,
         .value = &o->layer,
         .argument = "N",
         .help = "which layer (default: the first MoE layer)",
         .low = 0,
         .high = INT32_MAX},
        {.name = "input",
         .letter = 'i',
         .kind = CLI_STRING,
         .value = &o->input,
         .argument = "FILE",
         .help = "safetensors file with hidden_states"},
        {.name = "output",
         .letter = 'o',
         .kind = CLI_STRING,
         .value = &o->output,
         .argument = "FILE",
         .help = "where the result goes"},
        CLI_TARGET_OPTIONS(o->target),
        {.name = "routing",
         .kind = CLI_CHOICE,
         .value = &o->routing,
         .argument = "R",
         .help = "new: by the layer's router; given: as the input says (default new)",
         .choices = routings},
        {.name = "capture",
         .kind = CLI_STRING,
         .value = &o->capture,
         .argument = "SESSION",
         .help = "append the batch to this session directory"},
        {.name = "phase",
         .kind = CLI_STRING,
         .value = &o->phase,
         .argument = "WORD",
         .help = "the captured batch's phase (default: decode for one token, else prefill)"},
        {.name = "repeat",
         .kind = CLI_INTEGER,
         .value = &o->repeat,
         .argument = "N",
         .help = "run N times and report the median time (default 1)",
         .low = 1,
         .high = 1000000},
        {.name = "json", .kind = CLI_FLAG, .value = &o->json, .help = "report as JSON"},
        {.name = "verbose", .letter = 'v', .kind = CLI_FLAG, .value = &o->verbose, .help = "say more on stderr"},
        {.name = NULL},
    };
    int code = cli_parse(&usage, options, argc, argv);
    if (code != CLI_GO)
        return code;
    if (!o->model)
        return cli_fail(CLI_EXIT_USAGE, "forward: --model is required");
    if (!o->input)
        return cli_fail(CLI_EXIT_USAGE, "forward: --input is required");
    if (!o->output && !o->capture)
        return cli_fail(CLI_EXIT_USAGE, "forward: --output or --capture is required");
    if (o->phase && !o->capture)
        return cli_fail(CLI_EXIT_USAGE, "forward: --phase belongs to --capture, which is not given");
    if (o->phase && !moe_session_phase_ok(o->phase))
        return cli_fail(CLI_EXIT_USAGE,
                        "forward: --phase is '%s', expected 1 to %d characters of a-z, 0-9, '_' and '-'", o->phase,
                        MOE_SESSION_MAX_PHASE);
    return CLI_GO;
}

static int run_layer(struct forward *f)
{
    moe_status status = runner_init(&f->runner, f->ctx, f->layer, f->o.target.path);
    if (status == MOE_OK)
        status = runner_load(&f->runner, &f->batch);
    f->seconds = calloc((size_t)f->o.repeat, sizeof f->seconds[0]);
    if (status == MOE_OK && !f->seconds)
        return cli_fail_memory();
    for (int64_t i = 0; status == MOE_OK && i < f->o.repeat; i++) {
        double start = cli_now();
        status = runner_run(&f->runner);
        f->seconds[i] = cli_now() - start;
    }
    if (status == MOE_OK)
        status = runner_fetch(&f->runner, &f->result);
    if (status != MOE_OK)
        return cli_fail_status(f->ctx, status);
    f->median = cli_median(f->seconds, (size_t)f->o.repeat);
    return CLI_GO;
}

/* Fills in the ids and weights of the result from the batch if they came with it. The output and sessions hold I32; an
 * id beyond I32 is no expert, like -1. */
static int take_given_routing(struct forward *f)
{
    if (!f->batch.topk_ids)
        return CLI_GO;
    f->result.topk_weights = f->batch.topk_weights;
    f->result.topk_ids = f->batch.topk_ids;
    if (f->batch.ids_dtype == MOE_I32)
        return CLI_GO;
    int64_t count = f->batch.tokens * f->batch.top_k;
    const int64_t *ids = f->batch.topk_ids;
    f->given_ids = calloc((size_t)count + 1, sizeof f->given_ids[0]);
    if (!f->given_ids)
        return cli_fail_memory();
    for (int64_t i = 0; i < count; i++)
        f->given_ids[i] = ids[i] < 0 || ids[i] > INT32_MAX ? -1 : (int32_t)ids[i];
    f->result.topk_ids = f->given_ids;
    return CLI_GO;
}

static int32_t result_top_k(const struct forward *f)
{
    return f->batch.topk_ids ? f->batch.top_k : f->desc.top_k;
}

static int append_capture(struct forward *f)
{
    moe_record record = moe_record_init();
    record.layer = (int32_t)f->o.layer;
    record.phase = f->o.phase;
    record.tokens = f->batch.tokens;
    record.hidden_size = f->batch.hidden;
    record.num_experts = f->result.router_logits ? f->desc.num_experts : 0;
    record.top_k = result_top_k(f);
    record.dtype = f->batch.dtype;
    record.hidden_states = f->batch.hidden_states;
    record.topk_ids = f->result.topk_ids;
    record.topk_weights = f->result.topk_weights;
    record.router_logits = f->result.router_logits;
    record.output = f->result.output;
    moe_status status = moe_capture_append(f->capture, &record);
    return status == MOE_OK ? CLI_GO : cli_fail_status(f->ctx, status);
}

enum { OUTPUT_TENSORS = 4 };

/* What the output holds; before the layer has run, the shapes alone. Without a router's logits the last is left out. */
static size_t output_tensors(const struct forward *f, struct moe_st_write_tensor tensors[OUTPUT_TENSORS])
{
    const struct runner_result *r = &f->result;
    int64_t tokens = f->batch.tokens, k = result_top_k(f);
    tensors[0] = (struct moe_st_write_tensor){"hidden_states", f->batch.dtype, 2, {tokens, f->batch.hidden}, r->output};
    tensors[1] = (struct moe_st_write_tensor){"topk_ids", MOE_I32, 2, {tokens, k}, r->topk_ids};
    tensors[2] = (struct moe_st_write_tensor){"topk_weights", MOE_F32, 2, {tokens, k}, r->topk_weights};
    tensors[3] =
        (struct moe_st_write_tensor){"router_logits", MOE_F32, 2, {tokens, f->desc.num_experts}, r->router_logits};
    return f->batch.topk_ids ? OUTPUT_TENSORS - 1 : OUTPUT_TENSORS;
}

static int open_output(struct forward *f)
{
    struct moe_st_write_tensor tensors[OUTPUT_TENSORS];
    struct moe_error err = {{0}};
    moe_status status = moe_st_writer_open(f->o.output, tensors, output_tensors(f, tensors), &f->writer, &err);
    return status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
}

static int write_output(struct forward *f)
{
    struct moe_st_write_tensor tensors[OUTPUT_TENSORS];
    struct moe_error err = {{0}};
    moe_status status = moe_st_writer_finish(f->writer, tensors, output_tensors(f, tensors), &err);
    f->writer = NULL;
    return status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
}

static void print_json(cJSON *root, const struct forward *f, double weight_bytes)
{
    cli_json_string(root, "model", f->o.model);
    cli_json_number(root, "layer", (double)f->o.layer);
    cli_json_desc(cli_json_object(root, "shape"), &f->desc);
    cli_json_device(cli_json_object(root, "device"), f->ctx);
    cJSON *load = cli_json_object(root, "load");
    cli_json_number(load, "bytes", (double)cli_layer_bytes(&f->desc));
    cli_json_number(load, "seconds", f->load_seconds);
    cli_json_string(root, "path", moe_path_name(f->runner.path));
    cli_json_string(root, "path_reason", f->runner.reason);
    cli_json_number(root, "tokens", (double)f->batch.tokens);
    cli_json_string(root, "dtype", moe_dtype_name(f->batch.dtype));
    cli_json_number(root, "repeat", (double)f->o.repeat);
    cli_json_number(root, "seconds", f->median);
    cli_json_number(root, "seconds_min", f->seconds[0]);
    cli_json_number(root, "weight_bytes", weight_bytes);
    if (f->o.output)
        cli_json_string(root, "output", f->o.output);
    if (f->o.capture)
        cli_json_string(root, "session", f->o.capture);
}

static void print_text(const struct forward *f, double weight_bytes)
{
    char a[256], b[32], c[32];
    double loaded = (double)cli_layer_bytes(&f->desc);
    printf("model    %s, layer %lld: %s\n", f->o.model, (long long)f->o.layer, cli_show_desc(&f->desc, a, sizeof a));
    printf("device   %s\n", cli_show_device(f->ctx, a, sizeof a));
    printf("loaded   %s in %s, %s/s\n", cli_show_bytes(loaded, a, sizeof a),
           cli_show_seconds(f->load_seconds, b, sizeof b), cli_show_bytes(loaded / f->load_seconds, c, sizeof c));
    printf("path     %s\n", f->runner.reason);
    printf("ran      %lld token%s in %s", (long long)f->batch.tokens, f->batch.tokens == 1 ? "" : "s",
           cli_show_seconds(f->median, a, sizeof a));
    if (f->o.repeat > 1)
        printf(", the median of %lld", (long long)f->o.repeat);
    printf("; read %s of weights, %s/s\n", cli_show_bytes(weight_bytes, b, sizeof b),
           cli_show_bytes(weight_bytes / f->median, c, sizeof c));
    if (f->o.output)
        printf("output   %s\n", f->o.output);
    if (f->o.capture)
        printf("session  %s\n", f->o.capture);
}

static int report(const struct forward *f)
{
    double bytes = (double)runner_weight_bytes(&f->desc, f->result.topk_ids, MOE_I32, f->batch.tokens * result_top_k(f),
                                               f->runner.routes);
    if (!f->o.json) {
        print_text(f, bytes);
        return CLI_EXIT_OK;
    }
    cJSON *root = cli_json_object(NULL, NULL);
    print_json(root, f, bytes);
    return cli_json_print(root);
}

/* What is cheap to check comes before the layer is loaded, which may take a minute. */
static int forward(struct forward *f)
{
    struct moe_error err = {{0}};
    char reason[512];
    int code = cli_context(&f->o.target, f->o.verbose, &f->ctx);
    if (code == CLI_GO)
        code = cli_checkpoint(f->ctx, f->o.model, &f->o.layer, &f->checkpoint, &f->desc);
    if (code != CLI_GO)
        return code;
    moe_status status = MOE_OK;
    if (f->o.target.path != MOE_PATH_AUTO)
        status = moe_path_available(f->ctx, f->o.target.path, &f->desc, reason, sizeof reason);
    if (status != MOE_OK)
        return cli_fail(cli_exit_of(status), "%s", reason);
    status = host_batch_read(f->o.input, f->desc.hidden_size, f->o.routing == ROUTING_GIVEN, &f->batch, &err);
    if (status != MOE_OK)
        return cli_fail_error(status, &err);
    if (f->o.output)
        code = open_output(f);
    if (code != CLI_GO)
        return code;
    if (f->o.capture)
        status = moe_capture_open(f->ctx, f->o.capture, &f->capture);
    if (status != MOE_OK)
        return cli_fail_status(f->ctx, status);

    code = cli_load(f->ctx, f->checkpoint, f->o.layer, f->o.target.path, &f->layer, &f->load_seconds);
    if (code == CLI_GO)
        code = run_layer(f);
    if (code == CLI_GO)
        code = take_given_routing(f);
    if (code == CLI_GO && f->capture)
        code = append_capture(f);
    if (code == CLI_GO && f->o.output)
        code = write_output(f);
    return code == CLI_GO ? report(f) : code;
}

int moe_cmd_forward(int argc, char **argv)
{
    struct forward f = {.ctx = NULL};
    int code = parse(argc, argv, &f.o);
    if (code == CLI_GO)
        code = forward(&f);
    moe_capture_close(f.capture);
    moe_st_writer_abort(f.writer);
    runner_free(&f.runner);
    host_batch_free(&f.batch);
    free(f.given_ids);
    free(f.seconds);
    moe_layer_destroy(f.layer);
    moe_checkpoint_close(f.checkpoint);
    moe_context_destroy(f.ctx);
    return code;
}
