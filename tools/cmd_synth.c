/* SPDX-License-Identifier: Apache-2.0 */
/* moe synth: a random checkpoint in the on-disk form of a model family, and random hidden states. */
#include <signal.h>
#include <stdio.h>

#include "config/json.h"
#include "tools/cli.h"
#include "tools/synth_checkpoint.h"
#include "tools/synth_config.h"

static const struct cli_usage usage = {
    .command = "synth",
    .summary = "write a random checkpoint in the on-disk form of a model family",
    .examples = "  moe synth --like mixtral-8x7b --output model\n"
                "  moe synth --like tiny-mixtral --output model --hidden-states x.safetensors --tokens 16\n"
                "  moe synth --like qwen3-30b-a3b --output model --experts 32 --layers 2 --shard-size 500MB\n"
                "  moe synth --config Mixtral-8x7B-v0.1/config.json --output model --seed 7\n"
                "  moe synth --model Mixtral-8x7B-v0.1 --hidden-states x.safetensors --tokens 512\n",
    .notes =
        "The checkpoint holds the tensors of the MoE layers and no others, under the names of the family. Weights\n"
        "are normal with standard deviation 1/sqrt(columns), hidden states with 1: so logits vary by about 1 and\n"
        "activations keep their size. Same options, same bytes, whatever the number of threads.\n"
        "Models: mixtral-8x7b, mixtral-8x22b, qwen3-30b-a3b, qwen3-235b-a22b, olmoe-1b-7b, and for tests\n"
        "tiny-mixtral, tiny-qwen3-moe.\n",
};

struct synth_options {
    int like; /* -1: not given */
    const char *config, *model, *output, *hidden_states;
    struct synth_changes changes;
    int64_t seed, shard_size, tokens, threads;
    bool force, json;
};

struct synth {
    struct synth_options o;
    struct moe_config config;
    cJSON *json; /* the config.json to write */
    struct synth_plan plan;
    struct synth_fill fill;
    double seconds;
};

enum { MAX_CONFIG_BYTES = 16 << 20 };

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    interrupted = number;
}

/* ---- Options ---- */

static int parse(int argc, char **argv, struct synth_options *o)
{
    *o = (struct synth_options){.like = -1, .seed = 1, .shard_size = 5000000000, .changes.layers = 0};
    const struct cli_option options[] = {
        {.name = "like",
         .kind = CLI_CHOICE,
         .value = &o->like,
         .argument = "NAME",
         .help = "shape and form of a released model, see below",
         .choices = synth_models},
        {.name = "config",
         .kind = CLI_STRING,
         .value = &o->config,
         .argument = "FILE",
         .help = "shape and form of this config.json"},
        {.name = "model",
         .kind = CLI_STRING,
         .value = &o->model,
         .argument = "DIR",
         .help = "a checkpoint to write hidden states for"},
        {.name = "output",
         .letter = 'o',
         .kind = CLI_STRING,
         .value = &o->output,
         .argument = "DIR",
         .help = "write the checkpoint here"},
        {.name = "layers",
         .kind = CLI_INTEGER,
         .value = &o->changes.layers,
         .argument = "N",
         .help = "layers (default 1)",
         .low = 1,
         .high = 100000},
        {.name = "dtype",
         .kind = CLI_DTYPE,
         .value = &o->changes.dtype,
         .argument = "D",
         .help = "bf16, f16 or f32 (default: the model's)"},
        {.name = "seed",
         .kind = CLI_INTEGER,
         .value = &o->seed,
         .argument = "S",
         .help = "default 1",
         .low = 0,
         .high = INT64_MAX},
        {.name = "hidden",
         .kind = CLI_INTEGER,
         .value = &o->changes.hidden,
         .argument = "N",
         .help = "change hidden_size",
         .low = 1,
         .high = MOE_MAX_SIZE},
        {.name = "intermediate",
         .kind = CLI_INTEGER,
         .value = &o->changes.intermediate,
         .argument = "N",
         .help = "change the experts' intermediate size",
         .low = 1,
         .high = MOE_MAX_SIZE},
        {.name = "experts",
         .kind = CLI_INTEGER,
         .value = &o->changes.experts,
         .argument = "N",
         .help = "change the number of experts",
         .low = 1,
         .high = MOE_MAX_EXPERTS},
        {.name = "top-k",
         .kind = CLI_INTEGER,
         .value = &o->changes.top_k,
         .argument = "N",
         .help = "change the experts per token",
         .low = 1,
         .high = MOE_MAX_TOP_K},
        {.name = "shard-size",
         .kind = CLI_BYTES,
         .value = &o->shard_size,
         .argument = "BYTES",
         .help = "largest file, if a tensor fits (default 5GB)",
         .low = 1,
         .high = INT64_MAX},
        {.name = "force",
         .kind = CLI_FLAG,
         .value = &o->force,
         .help = "replace the checkpoint that the directory holds"},
        {.name = "hidden-states",
         .kind = CLI_STRING,
         .value = &o->hidden_states,
         .argument = "FILE",
         .help = "write random hidden_states [tokens, hidden] here"},
        {.name = "tokens",
         .kind = CLI_INTEGER,
         .value = &o->tokens,
         .argument = "T",
         .help = "how many tokens of hidden states",
         .low = 0,
         .high = INT32_MAX},
        {.name = "threads",
         .kind = CLI_INTEGER,
         .value = &o->threads,
         .argument = "N",
         .help = "CPU threads (default: as many as the process may use)",
         .low = 1,
         .high = 4096},
        {.name = "json", .kind = CLI_FLAG, .value = &o->json, .help = "report as JSON"},
        {.name = NULL},
    };
    o->tokens = -1;
    int code = cli_parse(&usage, options, argc, argv);
    if (code != CLI_GO)
        return code;
    if ((o->like >= 0) + !!o->config + !!o->model != 1)
        return cli_fail(CLI_EXIT_USAGE, "synth: expected one of --like, --config and --model");
    if (o->model && o->output)
        return cli_fail(CLI_EXIT_USAGE, "synth: --output takes its form from --like or --config, not from --model");
    if (o->model &&
        (o->changes.layers || o->changes.hidden || o->changes.intermediate || o->changes.experts || o->changes.top_k))
        return cli_fail(CLI_EXIT_USAGE, "synth: the sizes of --model are fixed, only --dtype and --tokens go with it");
    if (!o->output && !o->hidden_states)
        return cli_fail(CLI_EXIT_USAGE, "synth: --output or --hidden-states is required");
    if (!o->hidden_states != (o->tokens < 0))
        return cli_fail(CLI_EXIT_USAGE, "synth: --hidden-states and --tokens belong together");
    return CLI_GO;
}

/* The description, from wherever it comes, with the changes applied. What a file says wrong is an error in the file,
 * what the changes make of it is one of usage. */
static int read_config(struct synth *s)
{
    struct synth_options *o = &s->o;
    struct moe_error err = {{0}};
    moe_status status = MOE_OK;
    const char *name = "the config";
    char path[4096];
    if (o->like >= 0) {
        s->json = synth_config_like(o->like);
        if (!s->json)
            return cli_fail_memory();
        name = synth_models[o->like];
    } else {
        snprintf(path, sizeof path, "%s%s", o->config ? o->config : o->model, o->config ? "" : "/config.json");
        name = path;
        status = moe_config_load(path, &s->config, &err);
        if (status == MOE_OK && s->config.layer.dtype == MOE_DTYPE_NONE && o->changes.dtype == MOE_DTYPE_NONE)
            o->changes.dtype = MOE_BF16;
        moe_config_free(&s->config);
        if (status == MOE_OK)
            status = moe_json_load(path, MAX_CONFIG_BYTES, &s->json, &err);
        if (status != MOE_OK)
            return cli_fail_error(status, &err);
    }
    if (o->changes.layers == 0 && !o->model)
        o->changes.layers = 1;
    status = synth_config_change(s->json, &o->changes, name, &s->config, &err);
    if (status == MOE_ERROR_FILE)
        return cli_fail(CLI_EXIT_USAGE, "%s", err.text);
    return status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
}

/* ---- Writing ---- */

static int write_checkpoint(struct synth *s)
{
    int code = synth_plan_make(&s->plan, &s->config, s->o.shard_size);
    struct synth_checkpoint checkpoint = {
        .directory = s->o.output, .force = s->o.force, .plan = &s->plan, .config = s->json, .fill = &s->fill};
    s->fill.bytes_total = s->plan.bytes;
    return code == CLI_GO ? synth_checkpoint_write(&checkpoint) : code;
}

static int write_hidden_states(struct synth *s)
{
    struct moe_error err = {{0}};
    const moe_layer_desc *desc = &s->config.layer;
    struct moe_st_write_tensor tensor = {"hidden_states", desc->dtype, 2, {s->o.tokens, desc->hidden_size}, NULL};
    enum synth_stream stream = SYNTH_UNIT;
    s->fill.bytes = 0;
    s->fill.bytes_total = synth_tensor_bytes(&tensor);
    moe_status status = synth_fill_file(&s->fill, s->o.hidden_states, &tensor, &stream, 1, &err);
    cli_progress_end(&s->fill.progress);
    return status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
}

/* ---- The command ---- */

static int report(const struct synth *s)
{
    const struct synth_options *o = &s->o;
    if (o->json) {
        cJSON *root = cli_json_object(NULL, NULL);
        cli_json_string(root, "model_type", s->config.model_type);
        cli_json_desc(cli_json_object(root, "shape"), &s->config.layer);
        cli_json_number(root, "seed", (double)o->seed);
        if (o->output) {
            cli_json_string(root, "output", o->output);
            cli_json_number(root, "layers", s->config.num_layers);
            cli_json_number(root, "files", (double)s->plan.shard_count);
            cli_json_number(root, "bytes", (double)s->plan.bytes);
        }
        if (o->hidden_states) {
            cli_json_string(root, "hidden_states", o->hidden_states);
            cli_json_number(root, "tokens", (double)o->tokens);
        }
        cli_json_number(root, "seconds", s->seconds);
        return cli_json_print(root);
    }
    char a[256], b[32];
    if (o->output)
        printf("model          %s: %s, %d layer%s, %s\n", o->output, s->config.model_type, s->config.num_layers,
               s->config.num_layers == 1 ? "" : "s", cli_show_desc(&s->config.layer, a, sizeof a));
    if (o->output)
        printf("wrote          %s in %zu file%s\n", cli_show_bytes((double)s->plan.bytes, a, sizeof a),
               s->plan.shard_count, s->plan.shard_count == 1 ? "" : "s");
    if (o->hidden_states)
        printf("hidden states  %s: %lld tokens of %lld, %s\n", o->hidden_states, (long long)o->tokens,
               (long long)s->config.layer.hidden_size, moe_dtype_name(s->config.layer.dtype));
    printf("time           %s\n", cli_show_seconds(s->seconds, b, sizeof b));
    return CLI_EXIT_OK;
}

static int synth(struct synth *s)
{
    double start = cli_now();
    int code = read_config(s);
    s->fill.seed = s->o.seed;
    if (code == CLI_GO && !synth_fill_init(&s->fill, &s->config.layer, s->o.threads))
        code = cli_fail_memory();
    if (code == CLI_GO && s->o.output)
        code = write_checkpoint(s);
    if (code == CLI_GO && s->o.hidden_states)
        code = write_hidden_states(s);
    s->seconds = cli_now() - start;
    return code == CLI_GO ? report(s) : code;
}

int moe_cmd_synth(int argc, char **argv)
{
    struct synth s = {.fill = {.progress.what = "writing", .stop = &interrupted}};
    int code = parse(argc, argv, &s.o);
    /* Without SA_RESTART: a write that waits returns, and the loop ends. */
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    if (code == CLI_GO)
        code = synth(&s);
    synth_plan_free(&s.plan);
    synth_fill_free(&s.fill);
    moe_config_free(&s.config);
    cJSON_Delete(s.json);
    if (interrupted)
        raise(interrupted); /* its default action by now: the caller sees what ended the command */
    return code;
}
