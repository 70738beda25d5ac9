/* SPDX-License-Identifier: Apache-2.0 */
/* What the bench times: the paths asked for, on the weights that each reads, with variations of those that have any. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

#include "runtime/internal.h"
#include "tools/bench/bench.h"
#include "tools/cli.h"

enum { MAX_SMS = 4096 };

/* ---- The command line ---- */

bool bench_word(const char **list, char *word, size_t bytes)
{
    if (**list == 0)
        return false;
    size_t length = strcspn(*list, ",");
    snprintf(word, bytes, "%.*s", (int)length, *list);
    *list += length + ((*list)[length] == ',');
    return true;
}

bool bench_count(const char *text, int64_t high, int64_t *value)
{
    char *end;
    if (!isdigit((unsigned char)text[0]))
        return false;
    *value = strtoll(text, &end, 10); /* out of range gives a number above any `high` */
    return *end == 0 && *value >= 1 && *value <= high;
}

static int parse_paths(struct bench_plan *plan, const char *list)
{
    const char *names[MOE_PATH_COUNT + 1] = {NULL};
    char word[64], hint[128];
    /* `auto` is one of the others: it is timed only on request. */
    bool all = strcmp(list, "all") == 0;
    for (int p = 0; p < MOE_PATH_COUNT; p++) {
        names[p] = moe_path_name((moe_path)p);
        plan->paths[p] = all && p != MOE_PATH_AUTO;
    }
    for (moe_path path; !all && bench_word(&list, word, sizeof word); plan->paths[path] = true) {
        if (moe_path_from_name(word, &path) != MOE_OK)
            return cli_fail(CLI_EXIT_USAGE, "bench: --paths has '%s', which is no path%s", word,
                            cli_did_you_mean(word, "", names, hint, sizeof hint));
    }
    return CLI_GO;
}

static int parse_layouts(struct bench_plan *plan, const char *list)
{
    char word[64];
    while (bench_word(&list, word, sizeof word)) {
        int layout = MOE_LAYOUT_ROW_MAJOR;
        while (layout < BENCH_LAYOUTS && strcmp(word, moe_layouts_name((unsigned)layout)) != 0)
            layout++;
        if (layout == BENCH_LAYOUTS)
            return cli_fail(CLI_EXIT_USAGE, "bench: --layouts has '%s', expected packed or row-major", word);
        plan->layouts[layout] = true;
    }
    return CLI_GO;
}

/* Marks configuration `word`, a name or a number, of every path asked for that has it. */
static bool mark_config(struct bench_plan *plan, const char *word)
{
    bool all = strcmp(word, "all") == 0, any = false;
    int64_t number = 0;
    bench_count(word, BENCH_MAX_CONFIGS, &number);
    for (int p = 0; p < MOE_PATH_COUNT; p++) {
        const char *name;
        for (int c = 1; plan->paths[p] && c <= BENCH_MAX_CONFIGS && (name = moe_path_config_name(p, c)); c++) {
            if (all || number == c || strcmp(word, name) == 0)
                any = plan->configs[p][c] = true;
        }
    }
    return any;
}

static int parse_configs(struct bench_plan *plan, const char *list)
{
    char word[64];
    while (bench_word(&list, word, sizeof word)) {
        if (!mark_config(plan, word))
            return cli_fail(CLI_EXIT_USAGE, "bench: --configs has '%s', which no path of --paths has in this build",
                            word);
    }
    return CLI_GO;
}

static int parse_bounds(struct bench_plan *plan, const char *list)
{
    char word[32];
    while (bench_word(&list, word, sizeof word)) {
        int64_t sms;
        if (plan->bounds == BENCH_MAX_BOUNDS)
            return cli_fail(CLI_EXIT_USAGE, "bench: --max-sms has more than %d bounds", BENCH_MAX_BOUNDS);
        if (!bench_count(word, MAX_SMS, &sms))
            return cli_fail(CLI_EXIT_USAGE, "bench: --max-sms has '%s', expected an integer from 1 to %d", word,
                            MAX_SMS);
        plan->max_sms[plan->bounds++] = (int32_t)sms;
    }
    return CLI_GO;
}

int bench_plan_parse(struct bench_plan *plan, const char *paths, const char *layouts, const char *configs,
                     const char *max_sms)
{
    int code = parse_paths(plan, paths);
    if (code == CLI_GO && layouts)
        code = parse_layouts(plan, layouts);
    if (code == CLI_GO && configs)
        code = parse_configs(plan, configs);
    if (code == CLI_GO && max_sms)
        code = parse_bounds(plan, max_sms);
    return code;
}

/* ---- Adding ---- */

bool bench_plan_packs(const struct bench_plan *plan)
{
    bool packs = plan->paths[MOE_PATH_AUTO];
    for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++)
        packs |= plan->paths[p] && moe_path_info_get((moe_path)p)->layouts & MOE_LAYOUT_PACKED;
    return packs;
}

/* A whole layer and, if asked for, the chain. False: no memory. */
static bool add_layer(const struct bench_plan *plan, struct bench_meter *meter, struct bench_run run)
{
    bool fine = bench_meter_add(meter, &run);
    run.part = BENCH_CHAIN;
    return fine && (!plan->chain || bench_meter_add(meter, &run));
}

/* On one layout: the path as it is, its stages, its configurations, its bounds. False: no memory. */
static bool add_layout(const struct bench_plan *plan, struct bench_meter *meter, struct bench_run run)
{
    bool varied = moe_path_config_name(run.path, 1) != NULL, fine = add_layer(plan, meter, run);
    for (int part = BENCH_ROUTE; fine && plan->stages && part <= BENCH_EXPERTS; part++) {
        run.part = (enum bench_part)part;
        fine = bench_meter_add(meter, &run);
    }
    run.part = BENCH_LAYER;
    for (int c = 1; fine && c <= BENCH_MAX_CONFIGS; c++) {
        run.config = c;
        if (plan->configs[run.path][c])
            fine = add_layer(plan, meter, run);
    }
    run.config = 0;
    for (int i = 0; fine && i < plan->bounds && (varied || run.path == MOE_PATH_AUTO); i++) {
        run.max_sms = plan->max_sms[i];
        fine = add_layer(plan, meter, run);
    }
    return fine;
}

/* Adds a path on the layouts asked for, or on the one that it reads. *runs: whether there is any. */
static bool add_path(const struct bench_plan *plan, const struct bench_workload *w, struct bench_meter *meter,
                     struct bench_report *report, moe_path path, bool *runs)
{
    char why[512] = "", note[512];
    bool reads[BENCH_LAYOUTS] = {false}, fine = true;
    for (int layout = MOE_LAYOUT_ROW_MAJOR; layout < BENCH_LAYOUTS; layout++) {
        moe_path ran;
        if (!w->layers[layout])
            continue;
        reads[layout] = moe_path_choose(w->layers[layout], path, 1, &ran, note, sizeof note) == MOE_OK;
        if (!reads[layout] && !why[0]) /* the row-major layer comes first, which every path reads */
            snprintf(why, sizeof why, "%s", note);
    }
    const int usual = reads[MOE_LAYOUT_PACKED] ? MOE_LAYOUT_PACKED : MOE_LAYOUT_ROW_MAJOR;
    *runs = reads[usual];
    if (!*runs) {
        bench_report_without(report, path, why);
        return true;
    }
    bool any = false; /* of the layouts asked for */
    for (int layout = MOE_LAYOUT_ROW_MAJOR; layout < BENCH_LAYOUTS; layout++)
        any |= reads[layout] && plan->layouts[layout];
    for (int layout = BENCH_LAYOUTS; fine && layout-- > MOE_LAYOUT_ROW_MAJOR;) {
        struct bench_run run = {.path = path, .layout = (moe_layout)layout, .other_layout = layout != usual};
        if (reads[layout] && (any ? plan->layouts[layout] : layout == usual))
            fine = add_layout(plan, meter, run);
    }
    return fine;
}

int bench_plan_add(const struct bench_plan *plan, const struct bench_workload *w, struct bench_meter *meter,
                   struct bench_report *report)
{
    bool any = false;
    for (int p = 0; p < MOE_PATH_COUNT; p++) {
        bool runs = false;
        if (plan->paths[p] && !add_path(plan, w, meter, report, (moe_path)p, &runs))
            return cli_fail_memory();
        any |= runs;
    }
    return any ? CLI_GO : cli_fail(CLI_EXIT_CANNOT, "bench: none of the paths asked for can run here");
}
