/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every command shares: options, failures and exit codes, the progress bar, JSON output, sizes for people.
 *
 * Data goes to stdout, messages to stderr. A command that fails writes one line, "moe: what is wrong and where", and
 * returns its exit code through cli_fail or cli_fail_status: `return cli_fail(CLI_EXIT_FILE, "...", ...)`.
 */
#ifndef MOE_TOOLS_CLI_H
#define MOE_TOOLS_CLI_H

#include <cjson/cJSON.h>
#include <stdbool.h>

#include "config/error.h"

/* Scripts depend on these numbers. */
enum cli_exit {
    CLI_EXIT_OK = 0,
    CLI_EXIT_MISMATCH = 1, /* a check failed */
    CLI_EXIT_USAGE = 2,    /* the command line is wrong */
    CLI_EXIT_CANNOT = 3,   /* this machine or this build cannot */
    CLI_EXIT_FILE = 4,     /* something in an input file is wrong or unknown */
    CLI_EXIT_DEVICE = 5,   /* the device failed */
};

/* ---- Failures ---- */

enum cli_exit cli_exit_of(moe_status status);
/* Writes the line and returns `code`. Bytes that are not printable are shown as '?'. */
__attribute__((format(printf, 2, 3))) int cli_fail(enum cli_exit code, const char *format, ...);
/* The same with the library's text: of the context's last failure (NULL: of this thread's) or of `err`. */
int cli_fail_status(const moe_context *ctx, moe_status status);
int cli_fail_error(moe_status status, const struct moe_error *err);
int cli_fail_memory(void);

/* ---- Options ---- */

enum cli_kind {
    CLI_FLAG,    /* bool *: set when given */
    CLI_STRING,  /* const char **: points into argv */
    CLI_INTEGER, /* int64_t *, in [low, high] */
    CLI_NUMBER,  /* double *, finite and above 0 */
    CLI_BYTES,   /* int64_t *, in [low, high]: 4096, 500MB, 5GB, 1GiB */
    CLI_CHOICE,  /* int *: the index in `choices` */
    CLI_DEVICE,  /* struct cli_device *: auto, cpu, cuda, cuda:1 */
    CLI_PATH,    /* moe_path *: a path's name */
    CLI_DTYPE,   /* moe_dtype *: bf16, f16 or f32 */
};

struct cli_device {
    moe_device device;
    int32_t index;
};

/* A list of options ends with name == NULL. */
struct cli_option {
    const char *name; /* without the dashes */
    char letter;      /* short form, or 0 */
    enum cli_kind kind;
    void *value;                /* holds the default before the parse */
    const char *argument;       /* what help calls the argument */
    const char *help;           /* one line */
    int64_t low, high;          /* CLI_INTEGER, CLI_BYTES */
    const char *const *choices; /* CLI_CHOICE; ends with NULL */
};

struct cli_usage {
    const char *command;
    const char *summary;  /* one line */
    const char *examples; /* lines, each indented by two spaces */
    const char *notes;    /* after the options, or NULL */
};

#define CLI_GO (-1)
/* Parses argv (argv[0] is the command). CLI_GO, or the exit code to return at once: of a wrong option, or 0 after
 * --help. Options are spelled out in full: an abbreviation would change its meaning when an option is added. */
int cli_parse(const struct cli_usage *usage, const struct cli_option *options, int argc, char **argv);

/* The candidate that `word` was probably meant to be, or NULL. */
const char *cli_nearest(const char *word, const char *const *candidates);
/* ", did you mean 'X'?", or "" if nothing is near; returns buffer. */
const char *cli_did_you_mean(const char *word, const char *prefix, const char *const *candidates, char *buffer,
                             size_t bytes);

/* ---- Context and layer ---- */

/* The options by which forward, replay and bench say where to run. */
struct cli_target {
    struct cli_device device;
    moe_path path;
    int64_t threads;
    const char *tuned; /* as in moe_context_options */
};
/* The options that fill it. */
#define CLI_DEVICE_OPTION(target)                                                                                      \
    {                                                                                                                  \
        .name = "device", .kind = CLI_DEVICE, .value = &(target).device, .argument = "D",                              \
        .help = "auto, cpu, cuda or cuda:INDEX (default auto)"                                                         \
    }
#define CLI_PATH_OPTION(target)                                                                                        \
    {                                                                                                                  \
        .name = "path", .kind = CLI_PATH, .value = &(target).path, .argument = "NAME",                                 \
        .help = "force a path; 'moe doctor' lists them (default auto)"                                                 \
    }
#define CLI_THREADS_OPTION(target)                                                                                     \
    {                                                                                                                  \
        .name = "threads", .kind = CLI_INTEGER, .value = &(target).threads, .argument = "N",                           \
        .help = "CPU threads (default: as many as the process may use)", .low = 1, .high = 4096                        \
    }
#define CLI_TARGET_OPTIONS(target) CLI_DEVICE_OPTION(target), CLI_PATH_OPTION(target), CLI_THREADS_OPTION(target)

/* Each returns CLI_GO or, the line written, an exit code. */
int cli_context(const struct cli_target *target, bool verbose, moe_context **ctx);
/* Opens `directory` and settles on a layer: *layer < 0 asks for the first MoE layer. A layer that the model does not
 * have is a usage error, one that is dense or incomplete an error in the file. */
int cli_checkpoint(moe_context *ctx, const char *directory, int64_t *layer, moe_checkpoint **checkpoint,
                   moe_layer_desc *desc);
/* moe_layer_load with a progress bar, in the fastest layout that `path` reads; the time it took goes to *seconds. */
int cli_load(moe_context *ctx, moe_checkpoint *checkpoint, int64_t index, moe_path path, moe_layer **layer,
             double *seconds);

uint64_t cli_expert_bytes(const moe_layer_desc *desc);
uint64_t cli_gate_bytes(const moe_layer_desc *desc);
uint64_t cli_layer_bytes(const moe_layer_desc *desc);
/* "8 experts, top 2, hidden 4096, intermediate 14336, bf16" */
const char *cli_show_desc(const moe_layer_desc *desc, char *buffer, size_t bytes);
/* "cpu, 2 threads, avx512" or "cuda:0, NVIDIA H200, 132 SMs" */
const char *cli_show_device(const moe_context *ctx, char *buffer, size_t bytes);

/* ---- Progress: a bar on stderr if that is a terminal, erased when done ---- */

struct cli_progress {
    const char *what;
    double last; /* when it was last drawn, at first when it began: what takes a moment shows no bar */
    bool shown;
};
/* A moe_progress_fn; user is a struct cli_progress. */
void cli_progress_update(void *progress, uint64_t done, uint64_t total);
void cli_progress_end(struct cli_progress *progress);

/* ---- Output ---- */

double cli_now(void); /* seconds on a clock that only goes forward */
/* Sorts the values, count >= 1, and returns their median. */
double cli_median(double *values, size_t count);
/* "2.82 GB", decimal units; returns buffer */
const char *cli_show_bytes(double bytes, char *buffer, size_t size);
/* "61.2 ms"; returns buffer */
const char *cli_show_seconds(double seconds, char *buffer, size_t size);

/* JSON objects that are built without looking at each result: a failed allocation is remembered, and cli_json_print,
 * which frees the root, reports it. With `object` NULL they do nothing. */
cJSON *cli_json_object(cJSON *object, const char *name); /* object NULL: a root */
cJSON *cli_json_array(cJSON *object, const char *name);
cJSON *cli_json_element(cJSON *array); /* appends an object */
void cli_json_number(cJSON *object, const char *name, double value);
void cli_json_string(cJSON *object, const char *name, const char *value);
void cli_json_bool(cJSON *object, const char *name, bool value);
void cli_json_desc(cJSON *object, const moe_layer_desc *desc);
void cli_json_device(cJSON *object, const moe_context *ctx);
int cli_json_print(cJSON *root);

/* ---- Commands: argv[0] is the command's name; each returns an exit code ---- */

int moe_cmd_forward(int argc, char **argv);
int moe_cmd_inspect(int argc, char **argv);
int moe_cmd_synth(int argc, char **argv);
int moe_cmd_bench(int argc, char **argv);
int moe_cmd_tune(int argc, char **argv);
int moe_cmd_replay(int argc, char **argv);
int moe_cmd_doctor(int argc, char **argv);

#endif
