/* SPDX-License-Identifier: Apache-2.0 */
/* The layer and the token counts that a command line asks for. */
#include "tools/bench/source.h"

#include <stdio.h>
#include <stdlib.h>

enum { MAX_TOKENS = 1 << 20 };

static int by_count(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

int bench_counts_parse(struct bench_counts *counts, const char *command, const char *list)
{
    char word[32];
    counts->count = 0;
    while (bench_word(&list, word, sizeof word)) {
        if (counts->count == BENCH_MAX_POINTS)
            return cli_fail(CLI_EXIT_USAGE, "%s: --tokens has more than %d counts", command, BENCH_MAX_POINTS);
        if (!bench_count(word, MAX_TOKENS, &counts->tokens[counts->count]))
            return cli_fail(CLI_EXIT_USAGE, "%s: --tokens has '%s', expected an integer from 1 to %d", command, word,
                            MAX_TOKENS);
        counts->count++;
    }
    if (counts->count == 0)
        return cli_fail(CLI_EXIT_USAGE, "%s: --tokens is empty, expected a list like 1,16,256", command);
    /* Rising, because every estimate is made from a smaller count. */
    qsort(counts->tokens, (size_t)counts->count, sizeof *counts->tokens, by_count);
    return CLI_GO;
}

int bench_source_check(const struct bench_source *s)
{
    if ((s->model != NULL) + (s->like != NULL) + (s->shape != NULL) > 1)
        return cli_fail(CLI_EXIT_USAGE, "%s: --model, --like and --shape exclude each other", s->command);
    if (s->model && s->dtype != MOE_DTYPE_NONE)
        return cli_fail(CLI_EXIT_USAGE, "%s: --dtype is the checkpoint's own with --model", s->command);
    if (!s->model && s->layer >= 0)
        return cli_fail(CLI_EXIT_USAGE, "%s: --layer needs --model", s->command);
    return CLI_GO;
}

static int parse_shape(const struct bench_source *s, struct bench_shape *shape)
{
    int64_t values[4];
    static const int64_t high[4] = {1 << 20, 1 << 20, MOE_MAX_EXPERTS, MOE_MAX_TOP_K};
    char word[32];
    const char *list = s->shape;
    for (int i = 0; i < 4; i++) {
        if (!bench_word(&list, word, sizeof word) || !bench_count(word, high[i], &values[i]))
            return cli_fail(CLI_EXIT_USAGE, "%s: --shape is '%s', expected HIDDEN,INTERMEDIATE,EXPERTS,TOP_K",
                            s->command, s->shape);
    }
    if (*list || values[3] > values[2])
        return cli_fail(CLI_EXIT_USAGE, "%s: --shape is '%s', expected four numbers, top_k not above experts",
                        s->command, s->shape);
    *shape = (struct bench_shape){"layer", values[0], values[1], (int32_t)values[2], (int32_t)values[3]};
    return CLI_GO;
}

static int unknown_shape(const struct bench_source *s)
{
    const char *names[32];
    size_t count = 0;
    for (; bench_shape_at(count) && count < 31; count++)
        names[count] = bench_shape_at(count)->name;
    names[count] = NULL;
    char hint[128];
    return cli_fail(CLI_EXIT_USAGE, "%s: --like '%s' is no shape that bench knows%s", s->command, s->like,
                    cli_did_you_mean(s->like, "", names, hint, sizeof hint));
}

int bench_settle(const moe_context *ctx, moe_status status, const struct moe_error *err)
{
    if (status == MOE_OK)
        return CLI_GO;
    return err && err->text[0] ? cli_fail_error(status, err) : cli_fail_status(ctx, status);
}

int bench_source_model(struct bench_source *s, moe_context *ctx, moe_checkpoint **checkpoint, moe_layer_desc *desc)
{
    int code = cli_checkpoint(ctx, s->model, &s->layer, checkpoint, desc);
    snprintf(s->title, sizeof s->title, "%s layer %lld", s->model, (long long)s->layer);
    return code;
}

static int load_model(struct bench_source *s, moe_context *ctx, struct bench_workload *w)
{
    moe_checkpoint *checkpoint = NULL;
    moe_layer *layer = NULL;
    moe_layer_desc desc;
    double seconds;
    int code = bench_source_model(s, ctx, &checkpoint, &desc);
    if (code == CLI_GO) /* row-major, which is what `reference` reads */
        code = cli_load(ctx, checkpoint, s->layer, MOE_PATH_REFERENCE, &layer, &seconds);
    moe_checkpoint_close(checkpoint);
    if (code != CLI_GO)
        return code;
    return bench_settle(ctx, bench_workload_adopt(w, ctx, layer), NULL);
}

static int make_layer(struct bench_source *s, moe_context *ctx, struct bench_workload *w)
{
    struct bench_shape shape;
    int code = CLI_GO;
    if (!s->like)
        s->like = "mixtral-8x7b";
    if (s->shape)
        code = parse_shape(s, &shape);
    else if (!bench_shape_find(s->like))
        code = unknown_shape(s);
    else
        shape = *bench_shape_find(s->like);
    if (code != CLI_GO)
        return code;
    snprintf(s->title, sizeof s->title, "%s", shape.name);
    moe_dtype dtype = s->dtype == MOE_DTYPE_NONE ? MOE_BF16 : s->dtype;
    enum bench_routing routing = s->routing < 0 ? BENCH_UNIFORM : (enum bench_routing)s->routing;
    return bench_settle(ctx, bench_workload_create(w, ctx, &shape, dtype, routing), NULL);
}

int bench_source_open(struct bench_source *s, moe_context *ctx, struct bench_workload *w)
{
    return s->model ? load_model(s, ctx, w) : make_layer(s, ctx, w);
}

int bench_machine_open(moe_context *ctx, struct bench_machine **machine)
{
    struct moe_error err = {{0}};
    moe_device_info device = moe_device_info_init();
    moe_status status = moe_context_device(ctx, &device);
    if (status == MOE_OK)
        status = device.device == MOE_DEVICE_CUDA ? bench_cuda_open(device.device_index, machine, &err)
                                                  : bench_cpu_open(ctx, machine, &err);
    return bench_settle(ctx, status, &err);
}
