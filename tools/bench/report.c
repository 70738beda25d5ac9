/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>

#include "runtime/internal.h"
#include "tools/bench/report.h"
#include "tools/cli.h"

static const char *const part_names[BENCH_PARTS] = {"layer", "route", "experts", "chain"};

struct bench_time bench_time_of(double *samples, int32_t count)
{
    struct bench_time time = {.samples = count};
    if (count == 0)
        return time;
    time.median = cli_median(samples, (size_t)count); /* sorts them */
    time.p99 = samples[(int32_t)(((int64_t)count * 99 + 99) / 100) - 1];
    return time;
}

struct bench_report *bench_report_open(enum bench_format format, const struct bench_workload *w, const char *title,
                                       const char *routing, const struct bench_machine *machine)
{
    struct bench_report *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->format = format;
    r->machine = machine;
    r->decode = !routing;
    char desc[256], device[512], size[32];
    cli_show_desc(&w->desc, desc, sizeof desc);
    cli_show_device(w->ctx, device, sizeof device);
    const char *dense = machine->dense_how ? machine->dense_how : "none, ";
    const char *dense_why = machine->dense_how ? "" : machine->dense_why;
    if (format == BENCH_TABLE) {
        printf("%s: %s, %s of weights%s%s%s\n%s\n", title, desc,
               cli_show_bytes((double)cli_layer_bytes(&w->desc), size, sizeof size), routing ? "; " : "",
               routing ? routing : "", routing ? " routing" : "", device);
        printf("floor: the longer of read (%s) and dense (%s%s), medians of the same run\n", machine->read_how, dense,
               dense_why);
    } else if (format == BENCH_CSV && !routing) {
        report_decode_titles();
    } else if (format == BENCH_CSV) {
        puts("tokens,path,part,layout,config,max_sms,ran,seconds,p99_seconds,samples,graph,bytes,gb_per_s,tflop_per_s,"
             "share,over_floor,of_all_sms,read_seconds,dense_seconds,experts,note");
    } else {
        r->root = cli_json_object(NULL, NULL);
        cli_json_string(r->root, "workload", title);
        if (routing)
            cli_json_string(r->root, "routing", routing);
        cli_json_desc(cli_json_object(r->root, "layer"), &w->desc);
        cli_json_device(cli_json_object(r->root, "device"), w->ctx);
        cli_json_string(r->root, "read", machine->read_how);
        cli_json_string(r->root, machine->dense_how ? "dense" : "no_dense",
                        machine->dense_how ? dense : machine->dense_why);
        r->without = cli_json_array(r->root, "unavailable");
        r->points = cli_json_array(r->root, "points");
    }
    return r;
}

void bench_report_without(struct bench_report *r, moe_path path, const char *why)
{
    if (r->format != BENCH_JSON)
        fprintf(r->format == BENCH_TABLE ? stdout : stderr, "not here: %s\n", why);
    cJSON *entry = cli_json_element(r->without);
    cli_json_string(entry, "path", moe_path_name(path));
    cli_json_string(entry, "why", why);
}

/* What the three formats say about one result. */
struct figures {
    double bytes, gb, tflop;
    double over; /* how many times the floor its time is */
    double sms;  /* of a run on a bounded number of SMs: its speed as a share of that on all */
};               /* 0: does not apply */

/* The same run without a bound; NULL: there is none, or it was not measured. */
static const struct bench_result *unbounded(const struct bench_result *results, int count, const struct bench_run *run)
{
    for (int i = 0; run->max_sms && i < count; i++) {
        const struct bench_run *other = &results[i].run;
        if (other->path == run->path && other->part == run->part && other->layout == run->layout &&
            other->config == run->config && !other->max_sms && results[i].time.samples)
            return &results[i];
    }
    return NULL;
}

static struct figures figures_of(const struct bench_point *p, const struct bench_result *results, int count, int which,
                                 double floor)
{
    const struct bench_result *result = &results[which], *all = unbounded(results, count, &result->run);
    struct figures f = {0};
    if (result->time.samples == 0 || result->run.part == BENCH_ROUTE)
        return f;
    f.bytes = p->weight_bytes + p->activation_bytes;
    f.gb = 1e-9 * f.bytes / result->time.median;
    f.tflop = 1e-12 * p->flops / result->time.median;
    f.over = result->time.median / floor;
    f.sms = all ? all->time.median / result->time.median : 0;
    return f;
}

const char *report_config(const struct bench_run *run)
{
    return run->config ? moe_path_config_name(run->path, run->config) : "";
}

const char *report_show(double value, const char *format, char *buffer, size_t bytes)
{
    buffer[0] = 0;
    if (value > 0)
        snprintf(buffer, bytes, format, value);
    return buffer;
}

void report_line(char *line, int length, const char *note)
{
    while (!note[0] && length > 0 && line[length - 1] == ' ')
        line[--length] = 0;
    printf("%s%s%s\n", line, note[0] ? "  " : "", note);
}

static void table_row(int64_t tokens, const char *name, double seconds, const struct figures *f, const char *note)
{
    char time[32] = "", moved[32] = "", gb[32], tflop[32], over[32];
    if (seconds > 0)
        cli_show_seconds(seconds, time, sizeof time);
    if (f->bytes > 0)
        cli_show_bytes(f->bytes, moved, sizeof moved);
    char line[256];
    int length = snprintf(line, sizeof line, "%6lld  %-28s %10s %10s %8s %9s %9s", (long long)tokens, name, time, moved,
                          report_show(f->gb, "%.1f", gb, sizeof gb),
                          report_show(f->tflop, f->tflop < 10 ? "%.3f" : "%.1f", tflop, sizeof tflop),
                          report_show(f->over, "%.3f", over, sizeof over));
    report_line(line, length, note);
}

static void append(char *buffer, size_t bytes, const char *format, const char *text)
{
    size_t length = strlen(buffer);
    snprintf(buffer + length, bytes - length, format, text);
}

const char *report_name(const struct bench_result *result, char *buffer, size_t bytes)
{
    const struct bench_run *run = &result->run;
    char sms[16];
    snprintf(buffer, bytes, "%s", moe_path_name(run->path));
    if (result->ran != run->path)
        append(buffer, bytes, " > %s", moe_path_name(result->ran));
    if (run->other_layout)
        append(buffer, bytes, " (%s)", moe_layouts_name(run->layout));
    if (run->config)
        append(buffer, bytes, " %s", report_config(run));
    if (run->part != BENCH_LAYER)
        append(buffer, bytes, " %s", part_names[run->part]);
    snprintf(sms, sizeof sms, "%d", run->max_sms);
    if (run->max_sms)
        append(buffer, bytes, ", %s SMs", sms);
    return buffer;
}

static void table_point(struct bench_report *r, const struct bench_point *p, double read, double dense,
                        const struct bench_result *results, int count, double floor)
{
    if (!r->titles)
        printf("\n%6s  %-28s %10s %10s %8s %9s %9s\n", "tokens", "path", "time", "moved", "GB/s", "TFLOP/s", "x floor");
    r->titles = true;
    double bytes = r->machine->read_bytes;
    char note[64], name[128];
    snprintf(note, sizeof note, "%d expert%s", p->touched, p->touched == 1 ? "" : "s");
    table_row(p->tokens, "(read)", read, &(struct figures){.bytes = bytes, .gb = 1e-9 * bytes / read}, note);
    if (dense > 0)
        table_row(p->tokens, "(dense)", dense, &(struct figures){.tflop = 1e-12 * p->flops / dense}, "");
    else if (r->machine->dense_how)
        table_row(p->tokens, "(dense)", 0, &(struct figures){0}, r->machine->dense_why);
    for (int i = 0; i < count; i++) {
        const struct bench_result *result = &results[i];
        struct figures f = figures_of(p, results, count, i, floor);
        snprintf(note, sizeof note, "%.1f %% of the speed on all SMs", 100 * f.sms);
        table_row(p->tokens, report_name(result, name, sizeof name), result->time.median, &f,
                  f.sms > 0 ? note : result->note);
    }
    fflush(stdout); /* a point can take a minute */
}

void report_csv_note(const char *note)
{
    putchar('"');
    for (const char *c = note; *c; c++) {
        putchar(*c);
        if (*c == '"')
            putchar('"');
    }
    puts("\"");
}

static void csv_point(const struct bench_point *p, double read, double dense, const struct bench_result *results,
                      int count, double floor)
{
    for (int i = 0; i < count; i++) {
        const struct bench_result *result = &results[i];
        const struct bench_run *run = &result->run;
        struct figures f = figures_of(p, results, count, i, floor);
        char buffers[9][32];
        printf("%lld,%s,%s,%s,%s,%d,%s,", (long long)p->tokens, moe_path_name(run->path), part_names[run->part],
               moe_layouts_name(run->layout), report_config(run), run->max_sms, moe_path_name(result->ran));
        printf("%s,%s,%d,%d,%s,%s,%s,%s,%s,%s,%.9g,%s,%d,", report_show(result->time.median, "%.9g", buffers[0], 32),
               report_show(result->time.p99, "%.9g", buffers[1], 32), result->time.samples, result->graph,
               report_show(f.bytes, "%.0f", buffers[2], 32), report_show(f.gb, "%.6g", buffers[3], 32),
               report_show(f.tflop, "%.6g", buffers[4], 32),
               report_show(f.over > 0 ? 1 / f.over : 0, "%.4f", buffers[5], 32),
               report_show(f.over, "%.4f", buffers[6], 32), report_show(f.sms, "%.4f", buffers[7], 32), read,
               report_show(dense, "%.9g", buffers[8], 32), p->touched);
        report_csv_note(result->note);
    }
    fflush(stdout);
}

void report_time(cJSON *object, const char *name, const struct bench_time *time)
{
    if (time->samples == 0)
        return;
    cJSON *entry = cli_json_object(object, name);
    cli_json_number(entry, "median_seconds", time->median);
    cli_json_number(entry, "p99_seconds", time->p99);
    cli_json_number(entry, "samples", time->samples);
}

cJSON *report_json_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                         const struct bench_time *dense, double floor)
{
    cJSON *point = cli_json_element(r->points);
    cli_json_number(point, "tokens", (double)p->tokens);
    cli_json_number(point, "experts_touched", p->touched);
    cli_json_number(point, "weight_bytes", p->weight_bytes);
    cli_json_number(point, "activation_bytes", p->activation_bytes);
    cli_json_number(point, "flops", p->flops);
    cli_json_number(point, "read_bytes", r->machine->read_bytes);
    report_time(point, "read", read);
    report_time(point, "dense", dense);
    cli_json_number(point, "floor_seconds", floor);
    return point;
}

void report_json_run(cJSON *entry, const struct bench_run *run)
{
    cli_json_string(entry, "path", moe_path_name(run->path));
    cli_json_string(entry, "layout", moe_layouts_name(run->layout));
    if (run->config)
        cli_json_string(entry, "config", report_config(run));
    if (run->max_sms)
        cli_json_number(entry, "max_sms", run->max_sms);
}

static void json_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                       const struct bench_time *dense, const struct bench_result *results, int count, double floor)
{
    cJSON *list = cli_json_array(report_json_point(r, p, read, dense, floor), "results");
    for (int i = 0; i < count; i++) {
        const struct bench_result *result = &results[i];
        struct figures f = figures_of(p, results, count, i, floor);
        cJSON *entry = cli_json_element(list);
        report_json_run(entry, &result->run);
        cli_json_string(entry, "part", part_names[result->run.part]);
        if (result->time.samples == 0) {
            cli_json_string(entry, "skipped", result->note);
            continue;
        }
        cli_json_string(entry, "ran", moe_path_name(result->ran));
        if (result->note[0])
            cli_json_string(entry, "why", result->note);
        cli_json_bool(entry, "graph", result->graph);
        report_time(entry, "time", &result->time);
        if (f.bytes > 0) {
            cli_json_number(entry, "gb_per_s", f.gb);
            cli_json_number(entry, "tflop_per_s", f.tflop);
            cli_json_number(entry, "share_of_floor", 1 / f.over);
            cli_json_number(entry, "time_over_floor", f.over);
        }
        if (f.sms > 0)
            cli_json_number(entry, "share_of_all_sms", f.sms);
    }
}

void bench_report_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                        const struct bench_time *dense, const struct bench_result *results, int count)
{
    double floor = read->median > dense->median ? read->median : dense->median;
    if (r->decode)
        report_decode_point(r, p, read, dense, results, count);
    else if (r->format == BENCH_TABLE)
        table_point(r, p, read->median, dense->median, results, count, floor);
    else if (r->format == BENCH_CSV)
        csv_point(p, read->median, dense->median, results, count, floor);
    else
        json_point(r, p, read, dense, results, count, floor);
}

int bench_report_load(enum bench_format format, const struct bench_load *result, const moe_context *ctx,
                      const char *title, const moe_layer_desc *desc)
{
    double gb = 1e-9 * (double)result->bytes, plain = result->plain.median, load = result->load.median;
    if (format == BENCH_JSON) {
        cJSON *root = cli_json_object(NULL, NULL);
        cli_json_string(root, "workload", title);
        cli_json_desc(cli_json_object(root, "layer"), desc);
        cli_json_device(cli_json_object(root, "device"), ctx);
        cli_json_number(root, "bytes", (double)result->bytes);
        report_time(root, "plain_read", &result->plain);
        report_time(root, "load", &result->load);
        cli_json_number(root, "plain_read_gb_per_s", gb / plain);
        cli_json_number(root, "load_gb_per_s", gb / load);
        cli_json_number(root, "share_of_plain_read", plain / load);
        return cli_json_print(root);
    }
    char text[256], device[512], size[32], time[2][32];
    cli_show_desc(desc, text, sizeof text);
    cli_show_device(ctx, device, sizeof device);
    printf("%s: %s, %s of weights\n%s\n\n", title, text, cli_show_bytes((double)result->bytes, size, sizeof size),
           device);
    printf("%-12s %10s %8s\n", "", "time", "GB/s");
    printf("%-12s %10s %8.2f\n", "plain read", cli_show_seconds(plain, time[0], sizeof time[0]), gb / plain);
    printf("%-12s %10s %8.2f   %.1f %% of a plain read\n", "load", cli_show_seconds(load, time[1], sizeof time[1]),
           gb / load, 100 * plain / load);
    return CLI_EXIT_OK;
}

int bench_report_close(struct bench_report *r, bool whole)
{
    int code = CLI_EXIT_OK;
    if (whole && r->format == BENCH_JSON)
        code = cli_json_print(r->root);
    else
        cJSON_Delete(r->root);
    free(r);
    return code;
}
