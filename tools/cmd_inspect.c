/* SPDX-License-Identifier: Apache-2.0 */
/* moe inspect: what a checkpoint holds, from its headers alone, and which paths can run it here. */
#include <stdio.h>
#include <stdlib.h>

#include "runtime/internal.h"
#include "tools/cli.h"
#include "tools/machine.h"

static const struct cli_usage usage = {
    .command = "inspect",
    .summary = "what a checkpoint holds, and which paths can run it here",
    .examples = "  moe inspect --model Mixtral-8x7B-v0.1\n"
                "  moe inspect --model Mixtral-8x7B-v0.1 --layer 31\n"
                "  moe inspect --model Mixtral-8x7B-v0.1 --json\n",
    .notes =
        "Reads headers only. A directory with some of its shards is fine: the layers that are whole are listed. With\n"
        "--layer that layer must be a whole MoE layer.\n",
};

enum layer_state { LAYER_WHOLE, LAYER_DENSE, LAYER_BROKEN, LAYER_STATES };

struct inspect {
    const char *model;
    int64_t layer; /* -1: the first whole one */
    bool json;
    struct machine machine;
    moe_checkpoint *checkpoint;
    moe_checkpoint_info info;
    unsigned char *states; /* enum layer_state of each layer */
    char why_broken[1024]; /* of the first broken layer */
    moe_layer_desc desc;
};

static int parse(int argc, char **argv, struct inspect *s)
{
    s->layer = -1;
    const struct cli_option options[] = {
        {.name = "model", .kind = CLI_STRING, .value = &s->model, .argument = "DIR", .help = "checkpoint directory"},
        {.name = "layer",
         .kind = CLI_INTEGER,
         .value = &s->layer,
         .argument = "N",
         .help = "which layer (default: the first that is whole)",
         .low = 0,
         .high = INT32_MAX},
        {.name = "json", .kind = CLI_FLAG, .value = &s->json, .help = "report as JSON"},
        {.name = NULL},
    };
    int code = cli_parse(&usage, options, argc, argv);
    if (code == CLI_GO && !s->model)
        return cli_fail(CLI_EXIT_USAGE, "inspect: --model is required");
    return code;
}

/* Looks at every layer. */
static int survey(struct inspect *s)
{
    const struct moe_config *config = moe_model_config(s->checkpoint->model);
    s->states = calloc((size_t)s->info.num_layers, 1);
    if (!s->states)
        return cli_fail_memory();
    for (int32_t i = 0; i < s->info.num_layers; i++) {
        moe_layer_desc desc = moe_layer_desc_init(MOE_DTYPE_NONE);
        if (!moe_config_layer_is_sparse(config, i)) {
            s->states[i] = LAYER_DENSE;
        } else if (moe_checkpoint_layer(s->checkpoint, i, &desc) != MOE_OK) {
            s->states[i] = LAYER_BROKEN;
            if (!s->why_broken[0])
                moe_last_error(s->machine.cpu, s->why_broken, sizeof s->why_broken);
        } else if (s->layer < 0 || s->layer == i) {
            s->layer = i;
            s->desc = desc;
        }
    }
    return CLI_GO;
}

/* "0-3, 7", or "none"; returns buffer. */
static const char *show_layers(const struct inspect *s, enum layer_state state, char *buffer, size_t bytes)
{
    size_t used = 0;
    snprintf(buffer, bytes, "none");
    for (int32_t i = 0; i < s->info.num_layers && used < bytes; i++) {
        int32_t last = i;
        if (s->states[i] != state)
            continue;
        while (last + 1 < s->info.num_layers && s->states[last + 1] == state)
            last++;
        used += (size_t)snprintf(buffer + used, bytes - used, last > i ? "%s%d-%d" : "%s%d", used ? ", " : "", i, last);
        i = last;
    }
    return buffer;
}

static void print_text(const struct inspect *s)
{
    const moe_layer_desc *d = &s->desc;
    char a[512], b[64];
    printf("%-10s %s\n", "model", s->model);
    printf("%-10s %s, %d layer%s\n", "type", s->info.model_type, s->info.num_layers,
           s->info.num_layers == 1 ? "" : "s");
    printf("%-10s %d, %s\n", "files", s->info.num_files, cli_show_bytes((double)s->info.file_bytes, a, sizeof a));
    printf("%-10s whole: %s", "layers", show_layers(s, LAYER_WHOLE, a, sizeof a));
    printf("; dense: %s", show_layers(s, LAYER_DENSE, a, sizeof a));
    printf("; incomplete: %s\n", show_layers(s, LAYER_BROKEN, a, sizeof a));
    if (s->why_broken[0])
        printf("%-10s %s\n", "", s->why_broken);
    if (s->layer < 0)
        return;
    printf("\n%-10s %lld: %s\n", "layer", (long long)s->layer, cli_show_desc(d, a, sizeof a));
    printf("%-10s gate     [%d, %lld] %s, %s\n", "weights", d->num_experts, (long long)d->hidden_size,
           moe_dtype_name(d->gate_dtype), cli_show_bytes((double)cli_gate_bytes(d), a, sizeof a));
    printf("%-10s gate_up  [%d, %lld, %lld] %s\n", "", d->num_experts, 2 * (long long)d->intermediate_size,
           (long long)d->hidden_size, moe_dtype_name(d->dtype));
    printf("%-10s down     [%d, %lld, %lld] %s\n", "", d->num_experts, (long long)d->hidden_size,
           (long long)d->intermediate_size, moe_dtype_name(d->dtype));
    printf("%-10s %s an expert, %s in all\n", "", cli_show_bytes((double)cli_expert_bytes(d), a, sizeof a),
           cli_show_bytes((double)cli_layer_bytes(d), b, sizeof b));
    const char *device, *layout = machine_layout(&s->machine, d, &device);
    printf("%-10s %s on %s\n", "layout", layout, device);
    printf("%-10s logits rounded to %s, softmax in f32 over %d experts, top %d%s, weights in %s\n", "routing",
           moe_dtype_name(d->logits_dtype), d->num_experts, d->top_k, d->renormalize ? " divided by their sum" : "",
           moe_dtype_name(d->topk_weight_dtype));
    printf("%-10s silu(gate x) * up x, then down\n", "expert");
    machine_print_paths(&s->machine, d);
}

static void json_layers(const struct inspect *s, cJSON *object)
{
    static const char *const names[LAYER_STATES] = {"whole", "dense", "incomplete"};
    for (int state = 0; state < LAYER_STATES; state++) {
        cJSON *list = cli_json_array(object, names[state]);
        for (int32_t i = 0; list && i < s->info.num_layers; i++) {
            if (s->states[i] == state)
                cJSON_AddItemToArray(list, cJSON_CreateNumber(i));
        }
    }
    if (s->why_broken[0])
        cli_json_string(object, "why_incomplete", s->why_broken);
}

static int print_json(const struct inspect *s)
{
    const moe_layer_desc *d = &s->desc;
    cJSON *root = cli_json_object(NULL, NULL);
    cli_json_string(root, "model", s->model);
    cli_json_string(root, "model_type", s->info.model_type);
    cli_json_number(root, "num_layers", s->info.num_layers);
    cli_json_number(root, "files", s->info.num_files);
    cli_json_number(root, "file_bytes", (double)s->info.file_bytes);
    json_layers(s, cli_json_object(root, "layers"));
    if (s->layer >= 0) {
        cJSON *layer = cli_json_object(root, "layer");
        cli_json_number(layer, "index", (double)s->layer);
        cli_json_desc(layer, d);
        cli_json_number(layer, "expert_bytes", (double)cli_expert_bytes(d));
        cli_json_number(layer, "bytes", (double)cli_layer_bytes(d));
        const char *device, *layout = machine_layout(&s->machine, d, &device);
        cli_json_string(layer, "layout", layout);
        cli_json_string(layer, "layout_device", device);
        cJSON *routing = cli_json_object(layer, "routing");
        cli_json_string(routing, "scoring", "softmax");
        cli_json_string(routing, "logits_dtype", moe_dtype_name(d->logits_dtype));
        cli_json_bool(routing, "renormalize", d->renormalize);
        cli_json_string(routing, "topk_weight_dtype", moe_dtype_name(d->topk_weight_dtype));
        cli_json_string(layer, "activation", "silu");
        machine_json_paths(&s->machine, d, cli_json_array(root, "paths"));
    }
    return cli_json_print(root);
}

static int inspect(struct inspect *s)
{
    int64_t asked = s->layer;
    int code = machine_open(&s->machine);
    if (code != CLI_GO)
        return code;
    moe_context *ctx = s->machine.cpu;
    if (asked >= 0) {
        code = cli_checkpoint(ctx, s->model, &s->layer, &s->checkpoint, &s->desc);
    } else {
        moe_status status = moe_checkpoint_open(ctx, s->model, &s->checkpoint);
        code = status == MOE_OK ? CLI_GO : cli_fail_status(ctx, status);
    }
    if (code != CLI_GO)
        return code;
    s->info = moe_checkpoint_info_init();
    moe_checkpoint_describe(s->checkpoint, &s->info);
    code = survey(s);
    if (code != CLI_GO)
        return code;
    code = CLI_EXIT_OK;
    if (s->json)
        code = print_json(s);
    else
        print_text(s);
    if (code == CLI_EXIT_OK && s->layer < 0)
        code = s->why_broken[0] ? cli_fail(CLI_EXIT_FILE, "%s", s->why_broken)
                                : cli_fail(CLI_EXIT_FILE, "%s/config.json: the model has no MoE layer", s->model);
    return code;
}

int moe_cmd_inspect(int argc, char **argv)
{
    struct inspect s = {.layer = -1};
    int code = parse(argc, argv, &s);
    if (code == CLI_GO)
        code = inspect(&s);
    free(s.states);
    moe_checkpoint_close(s.checkpoint);
    machine_close(&s.machine);
    return code;
}
