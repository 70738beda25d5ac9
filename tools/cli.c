/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/cli.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* ---- Failures ---- */

enum cli_exit cli_exit_of(moe_status status)
{
    switch (status) {
    case MOE_OK:
        return CLI_EXIT_OK;
    case MOE_ERROR_MISMATCH:
        return CLI_EXIT_MISMATCH;
    case MOE_ERROR_INVALID_ARGUMENT:
    case MOE_ERROR_WORKSPACE:
        return CLI_EXIT_USAGE;
    case MOE_ERROR_FILE:
        return CLI_EXIT_FILE;
    case MOE_ERROR_DEVICE:
    case MOE_ERROR_DEVICE_MEMORY:
        return CLI_EXIT_DEVICE;
    case MOE_ERROR_UNSUPPORTED:
    case MOE_ERROR_NO_DEVICE:
    case MOE_ERROR_CAPTURE:
    case MOE_ERROR_OUT_OF_MEMORY:
    case MOE_ERROR_WRITE:
        break;
    }
    return CLI_EXIT_CANNOT;
}

/* `text` may hold anything that a command line can; moe_fail knows what is safe to print. */
static void print_line(const char *text)
{
    struct moe_error line;
    moe_fail(&line, MOE_OK, "%s", text);
    fprintf(stderr, "moe: %s\n", line.text);
}

int cli_fail(enum cli_exit code, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    print_line(text);
    return code;
}

int cli_fail_status(const moe_context *ctx, moe_status status)
{
    struct moe_error err;
    moe_last_error(ctx, err.text, sizeof err.text);
    return cli_fail_error(status, &err);
}

int cli_fail_error(moe_status status, const struct moe_error *err)
{
    print_line(err->text[0] ? err->text : moe_status_string(status));
    return cli_exit_of(status);
}

int cli_fail_memory(void)
{
    return cli_fail(CLI_EXIT_CANNOT, "%s", moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
}

/* ---- Did you mean ---- */

enum { MAX_WORD = 40 };

static int minimum(int a, int b)
{
    return a < b ? a : b;
}

/* Insertions, deletions, substitutions and swaps of neighbours that turn a into b; MAX_WORD if either is too long. */
static int distance(const char *a, const char *b)
{
    int n = (int)strnlen(a, MAX_WORD), m = (int)strnlen(b, MAX_WORD);
    if (n == MAX_WORD || m == MAX_WORD)
        return MAX_WORD;
    int d[MAX_WORD][MAX_WORD];
    for (int i = 0; i <= n; i++)
        d[i][0] = i;
    for (int j = 0; j <= m; j++)
        d[0][j] = j;
    for (int i = 1; i <= n; i++) {
        for (int j = 1; j <= m; j++) {
            int same = a[i - 1] == b[j - 1];
            d[i][j] = minimum(minimum(d[i - 1][j], d[i][j - 1]) + 1, d[i - 1][j - 1] + !same);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                d[i][j] = minimum(d[i][j], d[i - 2][j - 2] + 1);
        }
    }
    return d[n][m];
}

const char *cli_nearest(const char *word, const char *const *candidates)
{
    const char *best = NULL;
    int best_distance = minimum(3, (int)strnlen(word, MAX_WORD) / 2) + 1;
    for (; *candidates; candidates++) {
        int d = distance(word, *candidates);
        if (d < best_distance) {
            best_distance = d;
            best = *candidates;
        }
    }
    return best;
}

const char *cli_did_you_mean(const char *word, const char *prefix, const char *const *candidates, char *buffer,
                             size_t bytes)
{
    const char *best = cli_nearest(word, candidates);
    buffer[0] = 0;
    if (best)
        snprintf(buffer, bytes, ", did you mean '%s%s'?", prefix, best);
    return buffer;
}

/* ---- Options ---- */

enum { MAX_OPTIONS = 40 };

static void print_help(const struct cli_usage *usage, const struct cli_option *options)
{
    printf("moe %s: %s\n\nExamples:\n%s\nOptions:\n", usage->command, usage->summary, usage->examples);
    for (; options->name; options++) {
        char left[64], letter[8] = "";
        if (options->letter)
            snprintf(letter, sizeof letter, "-%c, ", options->letter);
        snprintf(left, sizeof left, "%s--%s%s%s", letter, options->name, options->argument ? " " : "",
                 options->argument ? options->argument : "");
        printf("  %-26s %s\n", left, options->help);
    }
    printf("  %-26s %s\n", "-h, --help", "show this text");
    if (usage->notes)
        printf("\n%s", usage->notes);
}

/* The whole of `text` as a decimal integer. */
static bool parse_integer(const char *text, int64_t *value)
{
    if (!isdigit((unsigned char)text[text[0] == '-']))
        return false;
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    *value = v;
    return errno == 0 && *end == 0;
}

static bool parse_bytes(const char *text, int64_t *value)
{
    static const struct {
        const char *name;
        int64_t factor;
    } units[] = {{"", 1},
                 {"B", 1},
                 {"KB", 1000},
                 {"MB", 1000000},
                 {"GB", 1000000000},
                 {"TB", 1000000000000},
                 {"KiB", 1 << 10},
                 {"MiB", 1 << 20},
                 {"GiB", 1 << 30},
                 {"TiB", (int64_t)1 << 40}};
    if (!isdigit((unsigned char)text[0]))
        return false;
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (errno != 0)
        return false;
    for (size_t i = 0; i < sizeof units / sizeof units[0]; i++) {
        if (strcmp(end, units[i].name) == 0)
            return !__builtin_mul_overflow(v, units[i].factor, value);
    }
    return false;
}

static bool parse_device(const char *text, struct cli_device *device)
{
    int64_t index = 0;
    if (strncmp(text, "cuda:", 5) == 0) {
        if (!isdigit((unsigned char)text[5]) || !parse_integer(text + 5, &index) || index > 1023)
            return false;
        text = "cuda";
    }
    static const char *const names[] = {"auto", "cpu", "cuda"};
    static const moe_device devices[] = {MOE_DEVICE_AUTO, MOE_DEVICE_CPU, MOE_DEVICE_CUDA};
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, names[i]) == 0) {
            device->device = devices[i];
            device->index = (int32_t)index;
            return true;
        }
    }
    return false;
}

/* Joins words as "a, b or c". */
static const char *join_words(const char *const *words, char *buffer, size_t bytes)
{
    size_t used = 0;
    buffer[0] = 0;
    for (int i = 0; words[i] && used < bytes; i++) {
        const char *between = i == 0 ? "" : words[i + 1] ? ", " : " or ";
        used += (size_t)snprintf(buffer + used, bytes - used, "%s%s", between, words[i]);
    }
    return buffer;
}

static int find_word(const char *text, const char *const *words)
{
    for (int i = 0; words[i]; i++) {
        if (strcmp(text, words[i]) == 0)
            return i;
    }
    return -1;
}

static int bad_word(const struct cli_usage *usage, const struct cli_option *option, const char *text,
                    const char *const *words)
{
    char list[256], hint[128];
    return cli_fail(CLI_EXIT_USAGE, "%s: --%s is '%s', expected %s%s", usage->command, option->name, text,
                    join_words(words, list, sizeof list), cli_did_you_mean(text, "", words, hint, sizeof hint));
}

/* Stores the value of one option. CLI_GO or an exit code. */
static int set_option(const struct cli_usage *usage, const struct cli_option *option, const char *text)
{
    static const char *const dtype_names[] = {"bf16", "f16", "f32", NULL};
    static const moe_dtype dtypes[] = {MOE_BF16, MOE_F16, MOE_F32};
    const char *path_names[MOE_PATH_COUNT + 1] = {NULL};
    const char *expected = NULL;
    int64_t integer;
    int word;
    char range[128], low[32], high[32], *end;

    switch (option->kind) {
    case CLI_FLAG:
        *(bool *)option->value = true;
        return CLI_GO;
    case CLI_STRING:
        if (text[0] == 0)
            return cli_fail(CLI_EXIT_USAGE, "%s: --%s is empty", usage->command, option->name);
        *(const char **)option->value = text;
        return CLI_GO;
    case CLI_INTEGER:
        if (parse_integer(text, &integer) && integer >= option->low && integer <= option->high) {
            *(int64_t *)option->value = integer;
            return CLI_GO;
        }
        snprintf(range, sizeof range, "an integer from %lld to %lld", (long long)option->low, (long long)option->high);
        expected = range;
        break;
    case CLI_BYTES:
        if (parse_bytes(text, &integer) && integer >= option->low && integer <= option->high) {
            *(int64_t *)option->value = integer;
            return CLI_GO;
        }
        snprintf(range, sizeof range, "a size from %s to %s, such as 500MB or 2GiB",
                 cli_show_bytes((double)option->low, low, sizeof low),
                 cli_show_bytes((double)option->high, high, sizeof high));
        expected = range;
        break;
    case CLI_NUMBER: {
        errno = 0;
        double number = strtod(text, &end);
        if (end != text && *end == 0 && !isspace((unsigned char)text[0]) && errno == 0 && isfinite(number) &&
            number > 0) {
            *(double *)option->value = number;
            return CLI_GO;
        }
        expected = "a number above 0";
        break;
    }
    case CLI_CHOICE:
        word = find_word(text, option->choices);
        if (word < 0)
            return bad_word(usage, option, text, option->choices);
        *(int *)option->value = word;
        return CLI_GO;
    case CLI_DEVICE:
        if (parse_device(text, option->value))
            return CLI_GO;
        expected = "auto, cpu, cuda or cuda:INDEX";
        break;
    case CLI_PATH:
        if (moe_path_from_name(text, option->value) == MOE_OK)
            return CLI_GO;
        for (int i = 0; i < MOE_PATH_COUNT; i++)
            path_names[i] = moe_path_name((moe_path)i);
        return bad_word(usage, option, text, path_names);
    case CLI_DTYPE:
        word = find_word(text, dtype_names);
        if (word < 0)
            return bad_word(usage, option, text, dtype_names);
        *(moe_dtype *)option->value = dtypes[word];
        return CLI_GO;
    }
    return cli_fail(CLI_EXIT_USAGE, "%s: --%s is '%s', expected %s", usage->command, option->name, text, expected);
}

static int unknown_option(const struct cli_usage *usage, const struct cli_option *options, const char *word)
{
    const char *names[MAX_OPTIONS + 2];
    int count = 0;
    for (; options[count].name; count++)
        names[count] = options[count].name;
    names[count] = "help";
    names[count + 1] = NULL;
    char bare[MAX_WORD + 1], hint[128];
    snprintf(bare, sizeof bare, "%.*s", (int)strcspn(word + 2, "="), word + 2);
    return cli_fail(CLI_EXIT_USAGE, "%s: unknown option '%s'%s", usage->command, word,
                    cli_did_you_mean(bare, "--", names, hint, sizeof hint));
}

/* Whether `word` is "--name" or "--name=value" and not an abbreviation. */
static bool is_whole(const char *word, const char *name)
{
    size_t length = strlen(name);
    return strncmp(word + 2, name, length) == 0 && (word[2 + length] == 0 || word[2 + length] == '=');
}

int cli_parse(const struct cli_usage *usage, const struct cli_option *options, int argc, char **argv)
{
    enum { LONG = 256 }; /* what getopt_long returns for options[0] */
    struct option long_options[MAX_OPTIONS + 2] = {{0}};
    char letters[2 * MAX_OPTIONS + 3] = ":h", *next = letters + 2;
    int count = 0;
    for (; options[count].name; count++) {
        bool takes_value = options[count].kind != CLI_FLAG;
        long_options[count] = (struct option){options[count].name, takes_value, NULL, LONG + count};
        if (options[count].letter) {
            *next++ = options[count].letter;
            if (takes_value)
                *next++ = ':';
        }
    }
    long_options[count] = (struct option){"help", no_argument, NULL, 'h'};

    opterr = 0;
    optind = 1;
    for (int c; (c = getopt_long(argc, argv, letters, long_options, NULL)) >= 0;) {
        /* The word that holds the option: the last one read, or with a value of its own the one before. */
        const char *word = argv[optind - 1];
        if (c >= LONG && optarg == word)
            word = argv[optind - 2];
        if (c == ':')
            return cli_fail(CLI_EXIT_USAGE, "%s: option '%s' needs a value", usage->command, word);
        if (c == '?' && optopt >= LONG)
            return cli_fail(CLI_EXIT_USAGE, "%s: option '--%s' takes no value", usage->command,
                            options[optopt - LONG].name);
        if (c == '?' && optopt != 0 && strncmp(word, "--", 2) != 0)
            return cli_fail(CLI_EXIT_USAGE, "%s: unknown option '-%c'", usage->command, optopt);
        if (c == '?')
            return unknown_option(usage, options, word);
        if (c >= LONG && !is_whole(word, options[c - LONG].name))
            return unknown_option(usage, options, word);
        if (c == 'h') {
            print_help(usage, options);
            return CLI_EXIT_OK;
        }
        int index = c - LONG;
        for (int i = 0; i < count; i++) {
            if (c < LONG && options[i].letter == c)
                index = i;
        }
        int code = set_option(usage, &options[index], optarg);
        if (code != CLI_GO)
            return code;
    }
    if (optind < argc)
        return cli_fail(CLI_EXIT_USAGE, "%s: unexpected argument '%s'", usage->command, argv[optind]);
    return CLI_GO;
}

/* ---- Context and layer ---- */

static void print_log(void *verbose, moe_log_level level, const char *text)
{
    if (level == MOE_LOG_WARNING || *(const bool *)verbose)
        print_line(text);
}

int cli_context(const struct cli_target *target, bool verbose, moe_context **ctx)
{
    static bool show_all; /* the context keeps the address */
    show_all = verbose;
    moe_context_options options = moe_context_options_init();
    options.device = target->device.device;
    options.device_index = target->device.index;
    options.threads = (int32_t)target->threads;
    options.log = print_log;
    options.log_user = &show_all;
    moe_status status = moe_context_create(&options, ctx);
    return status == MOE_OK ? CLI_GO : cli_fail_status(NULL, status);
}

int cli_checkpoint(moe_context *ctx, const char *directory, int64_t *layer, moe_checkpoint **checkpoint,
                   moe_layer_desc *desc)
{
    *checkpoint = NULL;
    moe_status status = moe_checkpoint_open(ctx, directory, checkpoint);
    if (status != MOE_OK)
        return cli_fail_status(ctx, status);
    moe_checkpoint_info info = moe_checkpoint_info_init();
    status = moe_checkpoint_describe(*checkpoint, &info);
    if (status != MOE_OK)
        return cli_fail_status(ctx, status);
    if (*layer >= info.num_layers)
        return cli_fail(CLI_EXIT_USAGE, "--layer is %lld, but %s has layers 0 to %d", (long long)*layer, directory,
                        info.num_layers - 1);
    if (*layer < 0)
        *layer = info.first_moe_layer;
    if (*layer < 0)
        return cli_fail(CLI_EXIT_FILE, "%s/config.json: the model has no MoE layer", directory);
    *desc = moe_layer_desc_init(MOE_DTYPE_NONE);
    status = moe_checkpoint_layer(*checkpoint, (int32_t)*layer, desc);
    return status == MOE_OK ? CLI_GO : cli_fail_status(ctx, status);
}

int cli_load(moe_context *ctx, moe_checkpoint *checkpoint, int64_t index, moe_layer **layer, double *seconds)
{
    char what[64];
    snprintf(what, sizeof what, "loading layer %lld", (long long)index);
    struct cli_progress progress = {.what = what};
    moe_load_options options = moe_load_options_init();
    options.progress = cli_progress_update;
    options.progress_user = &progress;
    double start = cli_now();
    moe_status status = moe_layer_load(checkpoint, (int32_t)index, &options, layer);
    *seconds = cli_now() - start;
    cli_progress_end(&progress);
    return status == MOE_OK ? CLI_GO : cli_fail_status(ctx, status);
}

uint64_t cli_expert_bytes(const moe_layer_desc *desc)
{
    return 3 * (uint64_t)desc->hidden_size * (uint64_t)desc->intermediate_size * moe_dtype_size(desc->dtype);
}

uint64_t cli_gate_bytes(const moe_layer_desc *desc)
{
    return (uint64_t)desc->num_experts * (uint64_t)desc->hidden_size * moe_dtype_size(desc->gate_dtype);
}

uint64_t cli_layer_bytes(const moe_layer_desc *desc)
{
    return (uint64_t)desc->num_experts * cli_expert_bytes(desc) + cli_gate_bytes(desc);
}

const char *cli_show_desc(const moe_layer_desc *desc, char *buffer, size_t bytes)
{
    snprintf(buffer, bytes, "%d experts, top %d, hidden %lld, intermediate %lld, %s", desc->num_experts, desc->top_k,
             (long long)desc->hidden_size, (long long)desc->intermediate_size, moe_dtype_name(desc->dtype));
    return buffer;
}

const char *cli_show_device(const moe_context *ctx, char *buffer, size_t bytes)
{
    moe_device_info info = moe_device_info_init();
    moe_context_device(ctx, &info);
    if (info.device == MOE_DEVICE_CUDA)
        snprintf(buffer, bytes, "cuda:%d, %s, %d SMs", info.device_index, info.name, info.cores);
    else
        snprintf(buffer, bytes, "cpu, %d thread%s, %s", info.cores, info.cores == 1 ? "" : "s", info.features);
    return buffer;
}

/* ---- Progress ---- */

static bool stderr_is_terminal(void)
{
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) && !(term && strcmp(term, "dumb") == 0);
}

void cli_progress_update(void *user, uint64_t done, uint64_t total)
{
    struct cli_progress *progress = user;
    double now = cli_now();
    if (progress->last == 0)
        progress->last = now;
    if (now - progress->last < 0.1 || !stderr_is_terminal())
        return;
    progress->last = now;
    progress->shown = true;
    enum { WIDTH = 30 };
    double part = total ? (double)done / (double)total : 1;
    int filled = (int)(part * WIDTH);
    char bar[WIDTH + 1], done_text[32], total_text[32];
    memset(bar, '.', WIDTH);
    memset(bar, '#', (size_t)(filled < WIDTH ? filled : WIDTH));
    bar[WIDTH] = 0;
    fprintf(stderr, "\r%s [%s] %3.0f %%, %s of %s\033[K", progress->what, bar, 100 * part,
            cli_show_bytes((double)done, done_text, sizeof done_text),
            cli_show_bytes((double)total, total_text, sizeof total_text));
    fflush(stderr);
}

void cli_progress_end(struct cli_progress *progress)
{
    if (progress->shown)
        fputs("\r\033[K", stderr);
    progress->last = 0;
    progress->shown = false;
}

/* ---- Output ---- */

double cli_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

const char *cli_show_bytes(double bytes, char *buffer, size_t size)
{
    static const char *const units[] = {"bytes", "KB", "MB", "GB", "TB", "PB", "EB"};
    int unit = 0;
    while (bytes >= 999.5 && unit < 6) {
        bytes /= 1000;
        unit++;
    }
    int digits = unit == 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2;
    snprintf(buffer, size, "%.*f %s", digits, bytes, units[unit]);
    return buffer;
}

const char *cli_show_seconds(double seconds, char *buffer, size_t size)
{
    if (seconds >= 1)
        snprintf(buffer, size, "%.2f s", seconds);
    else if (seconds >= 1e-3)
        snprintf(buffer, size, "%.2f ms", 1e3 * seconds);
    else
        snprintf(buffer, size, "%.1f us", 1e6 * seconds);
    return buffer;
}

static bool json_failed;

cJSON *cli_json_object(cJSON *object, const char *name)
{
    cJSON *made = object ? cJSON_AddObjectToObject(object, name) : cJSON_CreateObject();
    json_failed |= !made;
    return made;
}

cJSON *cli_json_array(cJSON *object, const char *name)
{
    cJSON *made = object ? cJSON_AddArrayToObject(object, name) : NULL;
    json_failed |= object && !made;
    return made;
}

cJSON *cli_json_element(cJSON *array)
{
    cJSON *made = array ? cJSON_CreateObject() : NULL;
    if (made && !cJSON_AddItemToArray(array, made)) {
        cJSON_Delete(made);
        made = NULL;
    }
    json_failed |= array && !made;
    return made;
}

void cli_json_number(cJSON *object, const char *name, double value)
{
    json_failed |= object && !cJSON_AddNumberToObject(object, name, value);
}

void cli_json_string(cJSON *object, const char *name, const char *value)
{
    json_failed |= object && !cJSON_AddStringToObject(object, name, value);
}

void cli_json_bool(cJSON *object, const char *name, bool value)
{
    json_failed |= object && !cJSON_AddBoolToObject(object, name, value);
}

void cli_json_desc(cJSON *object, const moe_layer_desc *desc)
{
    cli_json_number(object, "num_experts", desc->num_experts);
    cli_json_number(object, "top_k", desc->top_k);
    cli_json_number(object, "hidden_size", (double)desc->hidden_size);
    cli_json_number(object, "intermediate_size", (double)desc->intermediate_size);
    cli_json_string(object, "dtype", moe_dtype_name(desc->dtype));
    cli_json_string(object, "gate_dtype", moe_dtype_name(desc->gate_dtype));
}

void cli_json_device(cJSON *object, const moe_context *ctx)
{
    moe_device_info info = moe_device_info_init();
    moe_context_device(ctx, &info);
    bool cuda = info.device == MOE_DEVICE_CUDA;
    cli_json_string(object, "kind", cuda ? "cuda" : "cpu");
    cli_json_number(object, "index", info.device_index);
    cli_json_string(object, "name", info.name);
    cli_json_number(object, cuda ? "sms" : "threads", info.cores);
    if (cuda)
        cli_json_number(object, "compute_capability", info.compute_capability);
    else
        cli_json_string(object, "features", info.features);
    cli_json_number(object, "memory_bytes", (double)info.memory_bytes);
    cli_json_number(object, "cache_bytes", (double)info.l2_bytes);
}

int cli_json_print(cJSON *root)
{
    char *text = root && !json_failed ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    if (!text)
        return cli_fail_memory();
    puts(text);
    cJSON_free(text);
    return CLI_EXIT_OK;
}
