/* SPDX-License-Identifier: Apache-2.0 */
/* The command line: options, help, and what a mistyped word was meant to be. */
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tools/cli.h"

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
