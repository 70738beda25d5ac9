/* SPDX-License-Identifier: Apache-2.0 */
/* moe replay: reruns captured batches, times them by phase and compares them with what was recorded. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tools/cli.h"
#include "tools/compare.h"
#include "tools/runner.h"

static const struct cli_usage usage = {
    .command = "replay",
    .summary = "rerun captured batches, and compare with the recorded outputs",
    .examples = "  moe replay --model Mixtral-8x7B-v0.1 --session session\n"
                "  moe replay --model Mixtral-8x7B-v0.1 --session session --verify\n"
                "  moe replay --model Mixtral-8x7B-v0.1 --session session --routing new --path reference --verify\n"
                "  moe replay --model Mixtral-8x7B-v0.1 --session session --layer 3 --json\n",
    .notes =
        "Batches run layer by layer, within a layer in the order of the session, after one run of each layer that is\n"
        "not timed. --verify compares each token's output row with the recorded one: ||got - recorded|| over\n"
        "||recorded|| may be 2e-5 in f32, 3e-3 in f16 and 2e-2 in bf16 (what either may be off the exact result,\n"
        "twice), by the less precise of batch and layer.\n"
        "With --routing new the chosen experts must agree too, save where their logits are within 2 ulps; the\n"
        "outputs of such tokens are not compared. The first mismatch is named, and the exit code is 1.\n",
};

enum routing { ROUTING_RECORDED, ROUTING_NEW };

struct replay_options {
    const char *model, *session;
    int64_t layer; /* -1: all */
    int routing;
    double tolerance; /* 0: by dtype */
    bool verify, json, verbose;
    struct cli_target target;
};

/* What is kept of each batch of the session. */
struct entry {
    int32_t layer;
    int64_t tokens;
    size_t phase; /* in replay.phases */
    moe_path path;
    bool run;
    double seconds;
    double error; /* the worst row's; NAN: not compared */
};

/* A word of the session, and what its batches took. */
struct phase {
    char name[64];
    int64_t batches, tokens;
    double seconds, median;
    unsigned paths; /* bits 1 << moe_path */
};

struct replay {
    struct replay_options o;
    moe_context *ctx;
    moe_checkpoint *checkpoint;
    moe_checkpoint_info info;
    moe_session *session;
    moe_layer *layer;
    int32_t loaded; /* number of `layer` */
    struct runner runner;
    struct entry *entries;
    int64_t count;
    struct phase *phases;
    size_t phase_count;
    bool *tied; /* by token, as large as the largest batch */
    int64_t compared, without_output, ties;
    double worst;
};

static int parse(int argc, char **argv, struct replay_options *o)
{
    static const char *const routings[] = {"recorded", "new", NULL};
    *o = (struct replay_options){.layer = -1};
    const struct cli_option options[] = {
        {.name = "model", .kind = CLI_STRING, .value = &o->model, .argument = "DIR", .help = "checkpoint directory"},
        {.name = "session",
         .kind = CLI_STRING,
         .value = &o->session,
         .argument = "DIR",
         .help = "session directory, as 'moe forward --capture' writes it"},
        {.name = "layer",
         .kind = CLI_INTEGER,
         .value = &o->layer,
         .argument = "N",
         .help = "only the batches of this layer",
         .low = 0,
         .high = INT32_MAX},
        CLI_TARGET_OPTIONS(o->target),
        {.name = "routing",
         .kind = CLI_CHOICE,
         .value = &o->routing,
         .argument = "R",
         .help = "recorded: with the session's ids and weights; new: by the router (default recorded)",
         .choices = routings},
        {.name = "verify", .kind = CLI_FLAG, .value = &o->verify, .help = "compare with the recorded outputs"},
        {.name = "tolerance",
         .kind = CLI_NUMBER,
         .value = &o->tolerance,
         .argument = "X",
         .help = "allowed relative error of a token's row (default: by dtype, see below)"},
        {.name = "json", .kind = CLI_FLAG, .value = &o->json, .help = "report as JSON"},
        {.name = "verbose", .letter = 'v', .kind = CLI_FLAG, .value = &o->verbose, .help = "report each batch"},
        {.name = NULL},
    };
    int code = cli_parse(&usage, options, argc, argv);
    if (code != CLI_GO)
        return code;
    if (!o->model)
        return cli_fail(CLI_EXIT_USAGE, "replay: --model is required");
    if (!o->session)
        return cli_fail(CLI_EXIT_USAGE, "replay: --session is required");
    if (o->tolerance > 0 && !o->verify)
        return cli_fail(CLI_EXIT_USAGE, "replay: --tolerance belongs to --verify, which is not given");
    return CLI_GO;
}

/* ---- Reading the session ---- */

/* An error in a batch: "SESSION: batch 3: ...". */
#define bad_batch(r, index, format, ...)                                                                               \
    cli_fail(CLI_EXIT_FILE, "%s: batch %lld: " format, (r)->o.session, (long long)(index), __VA_ARGS__)

static int find_phase(struct replay *r, const char *name, size_t *index)
{
    for (*index = 0; *index < r->phase_count; (*index)++) {
        if (strcmp(r->phases[*index].name, name) == 0)
            return CLI_GO;
    }
    struct phase *phases = realloc(r->phases, (r->phase_count + 1) * sizeof *phases);
    if (!phases)
        return cli_fail_memory();
    r->phases = phases;
    memset(&phases[r->phase_count], 0, sizeof *phases);
    snprintf(phases[r->phase_count].name, sizeof phases[0].name, "%s", name);
    r->phase_count++;
    return CLI_GO;
}

/* Notes layer, phase and size of every batch, so that each layer need be loaded only once. */
static int survey(struct replay *r)
{
    int64_t most = 0;
    r->count = moe_session_count(r->session);
    r->entries = calloc((size_t)r->count + 1, sizeof r->entries[0]);
    if (!r->entries)
        return cli_fail_memory();
    for (int64_t i = 0; i < r->count; i++) {
        moe_record record = moe_record_init();
        moe_status status = moe_session_read(r->session, i, &record);
        if (status != MOE_OK)
            return cli_fail_status(r->ctx, status);
        if (record.layer >= r->info.num_layers)
            return bad_batch(r, i, "layer %d, but %s has layers 0 to %d", record.layer, r->o.model,
                             r->info.num_layers - 1);
        r->entries[i] = (struct entry){.layer = record.layer, .tokens = record.tokens, .error = NAN};
        int code = find_phase(r, record.phase, &r->entries[i].phase);
        if (code != CLI_GO)
            return code;
        if (record.tokens > most)
            most = record.tokens;
    }
    r->tied = calloc((size_t)most + 1, sizeof r->tied[0]);
    return r->tied ? CLI_GO : cli_fail_memory();
}

/* ---- Running ---- */

/* The next layer above `above` that the session has and the options ask for; INT32_MAX: none. */
static int32_t next_layer(const struct replay *r, int32_t above)
{
    int32_t next = INT32_MAX;
    for (int64_t i = 0; i < r->count; i++) {
        int32_t layer = r->entries[i].layer;
        if (layer > above && layer < next && (r->o.layer < 0 || r->o.layer == layer))
            next = layer;
    }
    return next;
}

static int load_layer(struct replay *r, int32_t index)
{
    double seconds;
    runner_free(&r->runner);
    moe_layer_destroy(r->layer);
    r->layer = NULL;
    r->loaded = index;
    int code = cli_load(r->ctx, r->checkpoint, index, r->o.target.path, &r->layer, &seconds);
    if (code != CLI_GO)
        return code;
    moe_status status = runner_init(&r->runner, r->ctx, r->layer, r->o.target.path);
    return status == MOE_OK ? CLI_GO : cli_fail_status(r->ctx, status);
}

static int check_record(const struct replay *r, int64_t index, const moe_record *record)
{
    const moe_layer_desc *desc = &r->runner.desc;
    if (record->hidden_size != desc->hidden_size)
        return bad_batch(r, index, "hidden_states has %lld columns, but layer %d of %s has hidden_size %lld",
                         (long long)record->hidden_size, r->loaded, r->o.model, (long long)desc->hidden_size);
    if (r->o.routing == ROUTING_NEW && r->o.verify && record->top_k != desc->top_k)
        return bad_batch(r, index, "topk_ids has %d columns, but layer %d of %s has top_k %d", record->top_k, r->loaded,
                         r->o.model, desc->top_k);
    return CLI_GO;
}

static int verify(struct replay *r, int64_t index, const moe_record *record, const struct runner_result *result)
{
    const moe_layer_desc *desc = &r->runner.desc;
    struct id_mismatch id;
    struct row_mismatch row;
    memset(r->tied, 0, (size_t)record->tokens * sizeof r->tied[0]);
    if (r->runner.routes && !compare_ids(result->topk_ids, record->topk_ids, result->router_logits, desc->logits_dtype,
                                         desc->num_experts, record->tokens, record->top_k, r->tied, &id))
        return cli_fail(CLI_EXIT_MISMATCH,
                        "%s: batch %lld, layer %d: token %lld, slot %d: chose expert %d, recorded %d", r->o.session,
                        (long long)index, r->loaded, (long long)id.token, id.slot, id.got, id.expected);
    for (int64_t t = 0; t < record->tokens; t++)
        r->ties += r->tied[t];
    if (!record->output) {
        r->without_output++;
        return CLI_GO;
    }
    double budget = r->o.tolerance;
    if (budget == 0)
        budget = fmax(compare_budget(record->dtype), compare_budget(desc->dtype));
    r->compared++;
    if (!compare_rows(result->output, record->output, record->dtype, record->tokens, record->hidden_size, r->tied,
                      budget, &r->entries[index].error, &row))
        return cli_fail(
            CLI_EXIT_MISMATCH,
            "%s: batch %lld, layer %d: token %lld, column %lld: got %.9g, recorded %.9g; the row's relative "
            "error is %.3g, allowed %.3g",
            r->o.session, (long long)index, r->loaded, (long long)row.token, (long long)row.column, row.got,
            row.expected, row.error, budget);
    if (r->entries[index].error > r->worst)
        r->worst = r->entries[index].error;
    return CLI_GO;
}

static int run_batch(struct replay *r, int64_t index, bool warm)
{
    struct entry *entry = &r->entries[index];
    moe_record record = moe_record_init();
    moe_status status = moe_session_read(r->session, index, &record);
    if (status != MOE_OK)
        return cli_fail_status(r->ctx, status);
    int code = check_record(r, index, &record);
    if (code != CLI_GO)
        return code;
    struct host_batch batch = {.tokens = record.tokens,
                               .hidden = record.hidden_size,
                               .dtype = record.dtype,
                               .hidden_states = record.hidden_states};
    if (r->o.routing == ROUTING_RECORDED) {
        batch.topk_ids = record.topk_ids;
        batch.topk_weights = record.topk_weights;
        batch.ids_dtype = MOE_I32;
        batch.top_k = record.top_k;
    }
    struct runner_result result;
    status = runner_load(&r->runner, &batch);
    if (status == MOE_OK && !warm)
        status = runner_run(&r->runner);
    double start = cli_now();
    if (status == MOE_OK)
        status = runner_run(&r->runner);
    entry->seconds = cli_now() - start;
    if (status == MOE_OK)
        status = runner_fetch(&r->runner, &result);
    if (status != MOE_OK)
        return cli_fail_status(r->ctx, status);
    entry->run = true;
    entry->path = r->runner.path;
    return r->o.verify ? verify(r, index, &record, &result) : CLI_GO;
}

static int run_all(struct replay *r)
{
    for (int32_t layer = next_layer(r, -1); layer != INT32_MAX; layer = next_layer(r, layer)) {
        int code = load_layer(r, layer);
        bool warm = false;
        for (int64_t i = 0; code == CLI_GO && i < r->count; i++) {
            if (r->entries[i].layer != layer)
                continue;
            code = run_batch(r, i, warm);
            warm = true;
        }
        if (code != CLI_GO)
            return code;
    }
    return CLI_GO;
}

/* ---- Reporting ---- */

static int sum_up(struct replay *r)
{
    double *seconds = calloc((size_t)r->count + 1, sizeof *seconds);
    if (!seconds)
        return cli_fail_memory();
    for (size_t p = 0; p < r->phase_count; p++) {
        struct phase *phase = &r->phases[p];
        for (int64_t i = 0; i < r->count; i++) {
            const struct entry *entry = &r->entries[i];
            if (!entry->run || entry->phase != p)
                continue;
            seconds[phase->batches++] = entry->seconds;
            phase->tokens += entry->tokens;
            phase->seconds += entry->seconds;
            phase->paths |= 1u << entry->path;
        }
        if (phase->batches > 0)
            phase->median = cli_median(seconds, (size_t)phase->batches);
    }
    free(seconds);
    return CLI_GO;
}

static const char *show_paths(unsigned paths, char *buffer, size_t bytes)
{
    size_t used = 0;
    buffer[0] = 0;
    for (int path = 0; path < MOE_PATH_COUNT && used < bytes; path++) {
        if (paths & 1u << path)
            used +=
                (size_t)snprintf(buffer + used, bytes - used, "%s%s", used ? ", " : "", moe_path_name((moe_path)path));
    }
    return buffer;
}

static void print_text(const struct replay *r)
{
    char a[128], b[32];
    printf("session  %s: %lld batch%s\n", r->o.session, (long long)r->count, r->count == 1 ? "" : "es");
    printf("device   %s\n", cli_show_device(r->ctx, a, sizeof a));
    for (int64_t i = 0; r->o.verbose && i < r->count; i++) {
        const struct entry *e = &r->entries[i];
        if (!e->run)
            continue;
        printf("batch    %lld: layer %d, %s, %lld token%s, %s, %s", (long long)i, e->layer, r->phases[e->phase].name,
               (long long)e->tokens, e->tokens == 1 ? "" : "s", moe_path_name(e->path),
               cli_show_seconds(e->seconds, a, sizeof a));
        if (!isnan(e->error))
            printf(", error %.2g", e->error);
        putchar('\n');
    }
    for (size_t p = 0; p < r->phase_count; p++) {
        const struct phase *phase = &r->phases[p];
        if (phase->batches == 0)
            continue;
        printf("phase    %s: %lld batch%s, %lld token%s in %s, ", phase->name, (long long)phase->batches,
               phase->batches == 1 ? "" : "es", (long long)phase->tokens, phase->tokens == 1 ? "" : "s",
               cli_show_seconds(phase->seconds, a, sizeof a));
        printf("median %s a batch, path %s\n", cli_show_seconds(phase->median, b, sizeof b),
               show_paths(phase->paths, a, sizeof a));
    }
    if (!r->o.verify)
        return;
    printf("verified %lld batch%s, worst row error %.2g", (long long)r->compared, r->compared == 1 ? "" : "es",
           r->worst);
    if (r->ties > 0)
        printf("; %lld token%s with tied logits left out", (long long)r->ties, r->ties == 1 ? "" : "s");
    if (r->without_output > 0)
        printf("; %lld batch%s without recorded output", (long long)r->without_output,
               r->without_output == 1 ? "" : "es");
    putchar('\n');
}

static int print_json(const struct replay *r)
{
    char paths[128];
    cJSON *root = cli_json_object(NULL, NULL);
    cli_json_string(root, "model", r->o.model);
    cli_json_string(root, "session", r->o.session);
    cli_json_string(root, "routing", r->o.routing == ROUTING_NEW ? "new" : "recorded");
    cli_json_device(cli_json_object(root, "device"), r->ctx);
    cJSON *list = cli_json_array(root, "phases");
    for (size_t p = 0; p < r->phase_count; p++) {
        const struct phase *phase = &r->phases[p];
        if (phase->batches == 0)
            continue;
        cJSON *element = cli_json_element(list);
        cli_json_string(element, "phase", phase->name);
        cli_json_number(element, "batches", (double)phase->batches);
        cli_json_number(element, "tokens", (double)phase->tokens);
        cli_json_number(element, "seconds", phase->seconds);
        cli_json_number(element, "median_seconds", phase->median);
        cli_json_string(element, "path", show_paths(phase->paths, paths, sizeof paths));
    }
    list = cli_json_array(root, "batches");
    for (int64_t i = 0; i < r->count; i++) {
        const struct entry *e = &r->entries[i];
        if (!e->run)
            continue;
        cJSON *element = cli_json_element(list);
        cli_json_number(element, "index", (double)i);
        cli_json_number(element, "layer", e->layer);
        cli_json_string(element, "phase", r->phases[e->phase].name);
        cli_json_number(element, "tokens", (double)e->tokens);
        cli_json_string(element, "path", moe_path_name(e->path));
        cli_json_number(element, "seconds", e->seconds);
        if (!isnan(e->error))
            cli_json_number(element, "error", e->error);
    }
    if (r->o.verify) {
        cJSON *verified = cli_json_object(root, "verify");
        cli_json_number(verified, "batches", (double)r->compared);
        cli_json_number(verified, "without_output", (double)r->without_output);
        cli_json_number(verified, "tied_tokens", (double)r->ties);
        cli_json_number(verified, "worst_error", r->worst);
    }
    return cli_json_print(root);
}

static int replay(struct replay *r)
{
    int code = cli_context(&r->o.target, r->o.verbose, &r->ctx);
    if (code != CLI_GO)
        return code;
    moe_status status = moe_checkpoint_open(r->ctx, r->o.model, &r->checkpoint);
    r->info = moe_checkpoint_info_init();
    if (status == MOE_OK)
        status = moe_checkpoint_describe(r->checkpoint, &r->info);
    if (status != MOE_OK)
        return cli_fail_status(r->ctx, status);
    if (r->o.layer >= r->info.num_layers)
        return cli_fail(CLI_EXIT_USAGE, "--layer is %lld, but %s has layers 0 to %d", (long long)r->o.layer, r->o.model,
                        r->info.num_layers - 1);
    status = moe_session_open(r->ctx, r->o.session, &r->session);
    if (status != MOE_OK)
        return cli_fail_status(r->ctx, status);
    code = survey(r);
    if (code == CLI_GO)
        code = run_all(r);
    if (code == CLI_GO)
        code = sum_up(r);
    if (code != CLI_GO)
        return code;
    /* Nothing compared must not pass for nothing wrong. */
    if (r->o.verify && r->compared == 0)
        return cli_fail(CLI_EXIT_FILE, "%s: no batch with a recorded output to verify", r->o.session);
    if (r->o.json)
        return print_json(r);
    print_text(r);
    return CLI_EXIT_OK;
}

int moe_cmd_replay(int argc, char **argv)
{
    struct replay r = {.loaded = -1};
    int code = parse(argc, argv, &r.o);
    if (code == CLI_GO)
        code = replay(&r);
    moe_session_close(r.session);
    runner_free(&r.runner);
    moe_layer_destroy(r.layer);
    moe_checkpoint_close(r.checkpoint);
    moe_context_destroy(r.ctx);
    free(r.entries);
    free(r.phases);
    free(r.tied);
    return code;
}
