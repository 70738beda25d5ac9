/* SPDX-License-Identifier: Apache-2.0 */
/* The report of `moe bench --decode`: in one row the time of a layer that runs alone, and of one in a chain. */
#include <stdio.h>

#include "runtime/internal.h"
#include "tools/bench/report.h"
#include "tools/cli.h"

/* A row: the results of a layer, and of the chain next to it. */
struct row {
    const struct bench_result *alone, *chain;
    double alone_share, chain_share; /* of the floor: floor / time */
    double ratio;                    /* of the times, chain / alone */
    const char *note;
}; /* 0: not measured */

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

/* `floor` is that of the layer that runs alone, `chained` the one of a layer in the chain. */
static struct row row_of(const struct bench_result *results, int index, double floor, double chained)
{
    const struct bench_result *alone = &results[index], *chain = alone + 1;
    struct row row = {.alone = alone, .chain = chain, .note = alone->note};
    row.alone_share = ratio(floor, alone->time.median);
    row.chain_share = ratio(chained, chain->time.median);
    row.ratio = ratio(chain->time.median, alone->time.median);
    if (alone->time.samples && !chain->time.samples)
        row.note = chain->note;
    else if (alone->time.samples && !row.note[0] && moe_path_info_get(alone->ran)->synchronises)
        row.note = "no graph: waits for the host";
    return row;
}

void bench_report_chain(struct bench_report *r, const struct bench_workload *w)
{
    const int32_t copies = bench_chain_copies(w->chain);
    if (r->format == BENCH_TABLE)
        printf("alone: one layer; chain: one of %d layers that run one after the other, on %d copies of the weights\n",
               BENCH_CHAIN_LAYERS, copies);
    cJSON *chain = r->root ? cli_json_object(r->root, "chain") : NULL;
    cli_json_number(chain, "layers", BENCH_CHAIN_LAYERS);
    cli_json_number(chain, "copies", copies);
}

void bench_report_routing(struct bench_report *r, const char *routing)
{
    r->routing = routing;
    if (r->format == BENCH_TABLE)
        printf("\n%s routing, microseconds and %% of the floor\n"
               "%6s  %-28s %7s %9s %9s %9s %6s %9s %9s %6s %11s\n",
               routing, "tokens", "path", "experts", "floor", "alone p50", "p99", "%", "chain p50", "p99", "%",
               "chain/alone");
}

static const char *micro(double seconds, char *buffer)
{
    return report_show(1e6 * seconds, "%.1f", buffer, 32);
}

static void table_row(const struct bench_point *p, const struct row *row, double floor)
{
    char name[128], text[8][32], line[512];
    const struct bench_time *alone = &row->alone->time, *chain = &row->chain->time;
    int length = snprintf(line, sizeof line, "%6lld  %-28s %7d %9s %9s %9s %6s %9s %9s %6s %11s", (long long)p->tokens,
                          report_name(row->alone, name, sizeof name), p->touched, micro(floor, text[0]),
                          micro(alone->median, text[1]), micro(alone->p99, text[2]),
                          report_show(100 * row->alone_share, "%.1f", text[3], 32), micro(chain->median, text[4]),
                          micro(chain->p99, text[5]), report_show(100 * row->chain_share, "%.1f", text[6], 32),
                          report_show(row->ratio, "%.4f", text[7], 32));
    report_line(line, length, row->note);
}

void report_decode_titles(void)
{
    puts("routing,tokens,path,layout,config,max_sms,ran,graph,experts,chain_experts,bytes,floor_seconds,read_seconds,"
         "dense_seconds,alone_seconds,alone_p99_seconds,alone_samples,alone_share,chain_seconds,chain_p99_seconds,"
         "chain_samples,chain_share,chain_over_alone,note");
}

static void csv_time(const struct bench_time *time, double share)
{
    char text[3][32];
    printf("%s,%s,%d,%s,", report_show(time->median, "%.9g", text[0], 32), report_show(time->p99, "%.9g", text[1], 32),
           time->samples, report_show(share, "%.4f", text[2], 32));
}

static void csv_row(const struct bench_report *r, const struct bench_point *p, const struct row *row, double floor,
                    double read, double dense)
{
    const struct bench_run *run = &row->alone->run;
    char text[32];
    printf("%s,%lld,%s,%s,%s,%d,%s,%d,%d,%.4f,%.0f,%.9g,%.9g,%s,", r->routing, (long long)p->tokens,
           moe_path_name(run->path), moe_layouts_name(run->layout), report_config(run), run->max_sms,
           moe_path_name(row->alone->ran), row->alone->graph && row->chain->graph, p->touched, p->chain_touched,
           p->weight_bytes + p->activation_bytes, floor, read, report_show(dense, "%.9g", text, 32));
    csv_time(&row->alone->time, row->alone_share);
    csv_time(&row->chain->time, row->chain_share);
    printf("%s,", report_show(row->ratio, "%.4f", text, 32));
    report_csv_note(row->note);
}

static void json_row(cJSON *results, const struct row *row)
{
    cJSON *entry = cli_json_element(results);
    report_json_run(entry, &row->alone->run);
    cli_json_string(entry, "ran", moe_path_name(row->alone->ran));
    if (row->note[0])
        cli_json_string(entry, "note", row->note);
    cli_json_bool(entry, "graph", row->alone->graph && row->chain->graph);
    report_time(entry, "alone", &row->alone->time);
    report_time(entry, "chain", &row->chain->time);
    if (row->alone_share > 0)
        cli_json_number(entry, "alone_share_of_floor", row->alone_share);
    if (row->chain_share > 0)
        cli_json_number(entry, "chain_share_of_floor", row->chain_share);
    if (row->ratio > 0)
        cli_json_number(entry, "chain_over_alone", row->ratio);
}

/* The floor of a layer in the chain is that of one alone, as much longer as it has more experts to read. */
void report_decode_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                         const struct bench_time *dense, const struct bench_result *results, int count)
{
    const double chained_read = read->median * p->chain_touched / p->touched;
    const double floor = read->median > dense->median ? read->median : dense->median;
    const double chained = chained_read > dense->median ? chained_read : dense->median;
    cJSON *list = NULL;
    if (r->format == BENCH_JSON) {
        cJSON *point = report_json_point(r, p, read, dense, floor);
        cli_json_string(point, "routing", r->routing);
        cli_json_number(point, "chain_experts_touched", p->chain_touched);
        cli_json_number(point, "chain_floor_seconds", chained);
        list = cli_json_array(point, "results");
    }
    for (int i = 0; i < count; i += 2) {
        const struct row row = row_of(results, i, floor, chained);
        if (r->format == BENCH_TABLE)
            table_row(p, &row, floor);
        else if (r->format == BENCH_CSV)
            csv_row(r, p, &row, floor, read->median, dense->median);
        else
            json_row(list, &row);
    }
    fflush(stdout); /* a point can take a minute */
}
