/* SPDX-License-Identifier: Apache-2.0 */
/* What the two files of the report share: report.c, and report_decode.c for `moe bench --decode`. */
#ifndef MOE_TOOLS_BENCH_REPORT_H
#define MOE_TOOLS_BENCH_REPORT_H

#include <cjson/cJSON.h>

#include "tools/bench/bench.h"

struct bench_report {
    enum bench_format format;
    const struct bench_machine *machine;
    bool decode;
    const char *routing; /* of a report on decode: of the points that come */
    cJSON *root, *points, *without;
    bool titles; /* the table's column titles are out */
};

/* "auto > prefill (row-major) wgmma-128, 64 SMs"; returns buffer. */
const char *report_name(const struct bench_result *result, char *buffer, size_t bytes);
/* The configuration's name, "" without one. */
const char *report_config(const struct bench_run *run);
/* A number, or blanks for one that does not apply; returns buffer. */
const char *report_show(double value, const char *format, char *buffer, size_t bytes);
/* A line of the table and what is noted of it; without a note it ends where its last figure does. */
void report_line(char *line, int length, const char *note);
/* The last field of a line of CSV, and the line's end. */
void report_csv_note(const char *note);
/* Adds a time that was measured. */
void report_time(cJSON *object, const char *name, const struct bench_time *time);
/* Appends a point with what was measured of it but its results, and returns it. */
cJSON *report_json_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                         const struct bench_time *dense, double floor);
/* Adds what says which run it is, but for its part. */
void report_json_run(cJSON *entry, const struct bench_run *run);

void report_decode_titles(void); /* of CSV */
void report_decode_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                         const struct bench_time *dense, const struct bench_result *results, int count);

#endif
