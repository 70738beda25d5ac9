/* SPDX-License-Identifier: Apache-2.0 */
/* The command line, the loop over cases and paths, and the counts that it ends with. */
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

enum { EXIT_SKIPPED = 77 };

static const char *const break_names[BREAK_COUNT] = {[BREAK_NONE] = "none",
#define BREAK_NAME(name, text) [name] = text,
                                                     BREAK_MAP(BREAK_NAME)
#undef BREAK_NAME
};

static const char usage[] =
    "usage: checkmoe [options]\n"
    "  checkmoe --device cpu --cases 2000         all CPU paths on 2000 random layers\n"
    "  checkmoe --device cuda --path simple       one path on the GPU\n"
    "  checkmoe --device cuda --path prefill --layout both --config all --small\n"
    "                                             one path in every way that it can run\n"
    "  checkmoe --case-seed 0x123 --path cpu      one case again\n"
    "  checkmoe --bench 64,2048,768,128,8         times of all paths: tokens,hidden,intermediate,experts,top_k\n"
    "\n"
    "  --device cpu|cuda[:i]  where to run (cpu)\n"
    "  --path NAME|all        one path only; 'auto' is one too\n"
    "  --layout NAME          row-major, packed or both, on paths that read it, instead of what the cases say\n"
    "  --config NAME|N|all    one configuration of a path (0: let it choose), instead of what the cases say\n"
    "  --op NAME              check only this step (entry, logits, topk, plan, gather, gemm1, activation, gemm2,\n"
    "                         ffn, combine)\n"
    "  --cases N              how many cases (400)\n"
    "  --seed S               the first of all cases' seeds (1)\n"
    "  --case-seed X          run only the case of this seed\n"
    "  --small                tiny shapes only (for compute-sanitizer and valgrind)\n"
    "  --cut                  only layers whose last items prefill may cut\n"
    "  --max-sms N            instead of what the cases say\n"
    "  --break NAME|all       plant a bug into each result and expect it to be found\n"
    "  --large                buffers of more than 2^31 elements (GPU)\n"
    "  --bench SHAPE          times instead of checks\n"
    "  --dtype NAME           of --bench (bf16)\n"
    "\n"
    "Exit status: 0 all well, 1 a check failed, 2 usage, 77 the device or the path is not on this machine.\n";

static bool parse_number(const char *text, uint64_t *number)
{
    char *end;

    *number = strtoull(text, &end, 0);
    return *text != '\0' && *end == '\0';
}

bool wants_path(const struct checker *checker, moe_path path)
{
    const struct moe_path_info *info = moe_path_info_get(path);

    if (checker->only_path != MOE_PATH_COUNT && checker->only_path != path)
        return false;
    return path == MOE_PATH_AUTO || (info->device == checker->ctx->info.device && info->steps != NULL);
}

static bool has_step(const struct checker *checker, const char *name)
{
    for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++)
        for (const struct moe_step *step = moe_path_info_get((moe_path)p)->steps;
             wants_path(checker, (moe_path)p) && step->run != NULL; step++)
            if (strcmp(step->name, name) == 0)
                return true;
    return false;
}

/* auto: whether a path that it could take reads weights of this shape in this layout. */
static bool reads_layout(const struct checker *checker, moe_path path, const moe_layer_desc *desc, moe_layout layout)
{
    if (path != MOE_PATH_AUTO)
        return (moe_path_info_get(path)->layouts & layout) != 0;
    for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++)
        if ((moe_path_info_get((moe_path)p)->layouts & layout) != 0 &&
            moe_path_available(checker->ctx, (moe_path)p, desc, NULL, 0) == MOE_OK)
            return true;
    return false;
}

bool wants_layout(const struct checker *checker, moe_path path, const moe_layer_desc *desc, moe_layout layout)
{
    const moe_layout drawn = checker->c != NULL ? checker->c->layout : MOE_LAYOUT_AUTO;
    const moe_layout wanted = checker->only_layout >= 0 ? (moe_layout)checker->only_layout : drawn;

    if (!reads_layout(checker, path, desc, layout))
        return false;
    if (wanted == MOE_LAYOUT_AUTO || wanted == layout)
        return true;
    return checker->only_layout < 0 && !reads_layout(checker, path, desc, wanted);
}

int32_t count_configs(moe_path path)
{
    int32_t count = 0;

    while (count + 1 < MAX_CONFIGS && moe_path_config_name(path, count + 1) != NULL)
        count++;
    return count;
}

bool wants_config(const struct checker *checker, moe_path path, int32_t config)
{
    const char *wanted = checker->only_config, *name = moe_path_config_name(path, config);
    const uint32_t drawn = checker->c != NULL ? checker->c->config : 0;
    uint64_t number;

    if (wanted == NULL)
        return config == (int32_t)(drawn % ((uint32_t)count_configs(path) + 1));
    if (parse_number(wanted, &number))
        return number == (uint64_t)config;
    return strcmp(wanted, "all") == 0 || (name != NULL && strcmp(wanted, name) == 0);
}

bool can_run(const struct checker *checker, moe_path path, const moe_layer_desc *desc, int32_t config)
{
    if (path == MOE_PATH_AUTO)
        return true;
    return moe_path_available(checker->ctx, path, desc, NULL, 0) == MOE_OK &&
           moe_choose_config(checker->ctx, moe_path_info_get(path), config, NULL) == MOE_OK;
}

/* The case on one path, in each layout and configuration that it is for. */
static void run_path(struct checker *checker, const struct test_case *c, moe_path path, struct expert_rows *rows)
{
    const moe_layer_desc desc = case_desc(c);
    const int64_t failures = checker->failures;

    for (int32_t config = 0; config <= count_configs(path); config++) {
        const bool runs = can_run(checker, path, &desc, config);

        for (int layout = MOE_LAYOUT_ROW_MAJOR; layout < LAYOUTS && checker->failures == failures; layout++) {
            if (!wants_config(checker, path, config) || !wants_layout(checker, path, &desc, (moe_layout)layout))
                continue;
            check_begin(checker, path, (moe_layout)layout, config);
            if (!runs) {
                check_totals(checker)->unsupported++;
                continue;
            }
            check_totals(checker)->cases++;
            if (c->level == LEVEL_STEPS)
                check_steps(checker, c);
            else
                check_layer(checker, c, rows);
            if (path == MOE_PATH_AUTO) { /* may take another path on the other layout */
                free(checker->other_layout);
                checker->other_layout = NULL;
            }
        }
        free(checker->other_layout);
        checker->other_layout = NULL;
    }
}

static void run_case(struct checker *checker, uint64_t seed)
{
    struct test_case c;
    struct expert_rows rows = {0};

    case_draw(&c, seed, checker->kind);
    if (checker->only_op != NULL)
        c.level = LEVEL_STEPS;
    case_fill(&c);
    checker->c = &c;
    for (int p = 0; p < MOE_PATH_COUNT; p++)
        if (wants_path(checker, (moe_path)p) && !(c.level == LEVEL_STEPS && p == MOE_PATH_AUTO))
            run_path(checker, &c, (moe_path)p, &rows);
    checker->c = NULL;
    expert_rows_free(&rows);
    case_free(&c);
}

/* Whether some path here has a configuration that --config asks for. */
static bool has_config(const struct checker *checker)
{
    for (int p = MOE_PATH_AUTO; p < MOE_PATH_COUNT; p++)
        for (int32_t config = 0; wants_path(checker, (moe_path)p) && config <= count_configs((moe_path)p); config++)
            if (wants_config(checker, (moe_path)p, config))
                return true;
    return false;
}

/* Seeds of the cases: far apart, so that --seed 1 and --seed 2 share none. */
static uint64_t case_seed(uint64_t seed, int64_t index)
{
    struct random random = {seed * UINT64_C(0xd1342543de82ef95) + (uint64_t)index};

    return random_u64(&random);
}

void print_totals(const struct checker *checker)
{
    printf("%-15s %-10s %6s %8s %12s %9s  %-7s  %s\n", "path", "layout", "config", "cases", "unsupported", "failures",
           "worst/%", "configuration");
    for (int p = 0; p < MOE_PATH_COUNT; p++)
        for (int layout = MOE_LAYOUT_ROW_MAJOR; layout < LAYOUTS; layout++)
            for (int32_t config = 0; config < MAX_CONFIGS; config++) {
                const struct totals *t = &checker->totals[p][layout][config];
                const char *name = moe_path_config_name((moe_path)p, config);

                if (t->cases + t->unsupported > 0)
                    printf("%-15s %-10s %6d %8" PRId64 " %12" PRId64 " %9" PRId64 "  %7.1f  %s\n",
                           moe_path_name((moe_path)p), layout_names[layout], config, t->cases, t->unsupported,
                           t->failures, 100 * t->worst, name != NULL ? name : "-");
            }
}

static int summary(const struct checker *checker)
{
    int64_t cases = 0;

    print_totals(checker);
    for (int p = 0; p < MOE_PATH_COUNT; p++)
        for (int layout = 0; layout < LAYOUTS; layout++)
            for (int32_t config = 0; config < MAX_CONFIGS; config++)
                cases += checker->totals[p][layout][config].cases;
    if (checker->failures > 0)
        printf("checkmoe: %" PRId64 " checks FAILED\n", checker->failures);
    else if (cases == 0)
        printf("checkmoe: no path that could run here\n");
    return checker->failures > 0 ? EXIT_FAILURE : cases == 0 ? EXIT_SKIPPED : EXIT_SUCCESS;
}

/* Plants one kind of bug into every case that it fits; each must be found, and nothing where none was planted. */
static bool run_broken(struct checker *checker, enum break_kind kind, uint64_t seed, int64_t cases)
{
    int64_t planted = 0, missed = 0, false_alarms = 0;
    moe_path only = checker->only_path;

    checker->broken = kind;
    for (int64_t i = 0; i < cases; i++)
        for (int p = 0; p < MOE_PATH_COUNT; p++) {
            int64_t before = checker->failures;

            checker->only_path = only;
            if (!wants_path(checker, (moe_path)p))
                continue;
            checker->only_path = (moe_path)p;
            checker->planted = false;
            run_case(checker, case_seed(seed, i));
            planted += checker->planted;
            missed += checker->planted && checker->failures == before;
            false_alarms += !checker->planted && checker->failures != before;
        }
    checker->only_path = only;
    printf("break %-10s found in %" PRId64 " of %" PRId64 " runs that it fitted", break_names[kind], planted - missed,
           planted);
    printf(false_alarms > 0 ? ", %" PRId64 " failures without it\n" : "\n", false_alarms);
    return planted > 0 && missed == 0 && false_alarms == 0;
}

static bool runs_packed(const struct checker *checker)
{
    for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++)
        if (wants_path(checker, (moe_path)p) && (moe_path_info_get((moe_path)p)->layouts & MOE_LAYOUT_PACKED))
            return true;
    return false;
}

static int run_all_broken(struct checker *checker, enum break_kind kind, uint64_t seed, int64_t cases)
{
    bool fine = true;

    for (int k = BREAK_NONE + 1; k < BREAK_COUNT; k++)
        if (kind == (enum break_kind)k ||
            (kind == BREAK_COUNT && (runs_packed(checker) || (k != BREAK_LAYOUT && k != BREAK_PACKED))))
            fine = run_broken(checker, (enum break_kind)k, seed, cases) && fine;
    return fine ? EXIT_SUCCESS : EXIT_FAILURE;
}

static bool parse_device(const char *text, moe_context_options *options)
{
    uint64_t index = 0;

    if (strcmp(text, "cpu") == 0) {
        options->device = MOE_DEVICE_CPU;
        return true;
    }
    options->device = MOE_DEVICE_CUDA;
    if (strncmp(text, "cuda", 4) != 0 || (text[4] != '\0' && (text[4] != ':' || !parse_number(text + 5, &index))))
        return false;
    options->device_index = (int32_t)index;
    return true;
}

static bool parse_break(const char *text, enum break_kind *kind)
{
    int k = BREAK_NONE + 1;

    while (k < BREAK_COUNT && strcmp(text, break_names[k]) != 0)
        k++;
    *kind = (enum break_kind)k; /* BREAK_COUNT: all */
    return k < BREAK_COUNT || strcmp(text, "all") == 0;
}

struct options {
    moe_context_options context;
    uint64_t seed, cases, one_case;
    bool has_one_case, large;
    enum break_kind broken;
    const char *bench;
    moe_dtype dtype;
};

static bool parse(int argc, char **argv, struct options *o, struct checker *checker)
{
    static const struct option names[] = {
        {"device", 1, NULL, 'd'}, {"path", 1, NULL, 'p'},      {"op", 1, NULL, 'o'},    {"cases", 1, NULL, 'n'},
        {"seed", 1, NULL, 's'},   {"case-seed", 1, NULL, 'x'}, {"small", 0, NULL, 'm'}, {"max-sms", 1, NULL, 'q'},
        {"break", 1, NULL, 'k'},  {"large", 0, NULL, 'l'},     {"bench", 1, NULL, 'b'}, {"dtype", 1, NULL, 't'},
        {"layout", 1, NULL, 'y'}, {"config", 1, NULL, 'c'},    {"cut", 0, NULL, 'u'},   {"help", 0, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    uint64_t number;
    bool fine = true;

    for (int option; fine && (option = getopt_long(argc, argv, "", names, NULL)) != -1;)
        switch (option) {
        case 'd':
            checker->device_name = optarg;
            fine = parse_device(optarg, &o->context);
            break;
        case 'p':
            fine = strcmp(optarg, "all") == 0 || moe_path_from_name(optarg, &checker->only_path) == MOE_OK;
            break;
        case 'o':
            checker->only_op = optarg;
            break;
        case 'n':
            fine = parse_number(optarg, &o->cases);
            break;
        case 's':
            fine = parse_number(optarg, &o->seed);
            break;
        case 'x':
            fine = o->has_one_case = parse_number(optarg, &o->one_case);
            break;
        case 'm':
            checker->kind.small = true;
            break;
        case 'u':
            checker->kind.cut = true;
            break;
        case 'y':
            for (int layout = 0; layout < LAYOUTS; layout++)
                if (strcmp(optarg, layout_names[layout]) == 0)
                    checker->only_layout = layout;
            fine = checker->only_layout >= 0 && strcmp(optarg, layout_names[checker->only_layout]) == 0;
            break;
        case 'c':
            checker->only_config = optarg;
            break;
        case 'q':
            fine = parse_number(optarg, &number) && number <= INT32_MAX;
            checker->max_sms = (int32_t)number;
            break;
        case 'k':
            fine = parse_break(optarg, &o->broken);
            break;
        case 'l':
            o->large = true;
            break;
        case 'b':
            o->bench = optarg;
            break;
        case 't':
            for (int d = MOE_BF16; d <= MOE_F32; d++)
                if (strcmp(optarg, moe_dtype_name((moe_dtype)d)) == 0)
                    o->dtype = (moe_dtype)d;
            fine = strcmp(optarg, moe_dtype_name(o->dtype)) == 0;
            break;
        case 'h':
            fputs(usage, stdout);
            exit(EXIT_SUCCESS);
        default:
            fine = false;
        }
    if (fine && optind == argc)
        return true;
    fprintf(stderr, "checkmoe: %s is not understood; --help tells more\n",
            optind < argc ? argv[optind] : argv[optind - 1]);
    return false;
}

static int run(struct checker *checker, const struct options *o)
{
    if (checker->only_op != NULL && !has_step(checker, checker->only_op)) {
        fprintf(stderr, "checkmoe: no path here has a step '%s'\n", checker->only_op);
        return 2;
    }
    for (int p = 0; p < MOE_PATH_COUNT; p++)
        if (moe_path_config_name((moe_path)p, MAX_CONFIGS) != NULL) {
            fprintf(stderr, "checkmoe: path %s has more than %d configurations\n", moe_path_name((moe_path)p),
                    MAX_CONFIGS - 1);
            return EXIT_FAILURE;
        }
    if (checker->only_config != NULL && !has_config(checker)) {
        fprintf(stderr, "checkmoe: no path here has a configuration '%s'\n", checker->only_config);
        return 2;
    }
    if (o->bench != NULL)
        return bench(checker, o->bench, o->dtype);
    if (o->large)
        return large(checker);
    if (o->broken != BREAK_NONE)
        return run_all_broken(checker, o->broken, o->seed, (int64_t)o->cases);
    if (o->has_one_case) {
        struct test_case c;

        case_draw(&c, o->one_case, checker->kind);
        case_print(&c, stdout);
        printf("\n");
        run_case(checker, o->one_case);
        return summary(checker);
    }
    const double begin = seconds_now();
    for (uint64_t i = 0; i < o->cases && checker->failures < 100; i++)
        run_case(checker, case_seed(o->seed, (int64_t)i));
    printf("checkmoe on %s, seed %" PRIu64 ", %.1f s\n", checker->ctx->info.name, o->seed, seconds_now() - begin);
    return summary(checker);
}

int main(int argc, char **argv)
{
    struct options o = {.seed = 1, .cases = 400, .dtype = MOE_BF16, .context = moe_context_options_init()};
    static struct checker checker = {
        .device_name = "cpu", .only_path = MOE_PATH_COUNT, .only_layout = -1, .max_sms = -1};
    char text[1024];
    int32_t previous;
    bool capturing;

    o.context.device = MOE_DEVICE_CPU;
    if (!parse(argc, argv, &o, &checker))
        return 2;
    checker.kind.gpu = o.context.device == MOE_DEVICE_CUDA;
    setvbuf(stdout, NULL, _IOLBF, 0);

    moe_status status = moe_context_create(&o.context, &checker.ctx);
    if (status != MOE_OK) {
        moe_last_error(NULL, text, sizeof text);
        fprintf(stderr, "checkmoe: %s: %s (%s)\n", checker.device_name, moe_status_string(status), text);
        return status == MOE_ERROR_NO_DEVICE ? EXIT_SKIPPED : EXIT_FAILURE;
    }
    checker.arena.ctx = checker.ctx;
    /* Single steps run without the runtime around them, which would make the device current. */
    if (checker.ctx->info.device == MOE_DEVICE_CUDA)
        moe_cuda_enter(checker.ctx->info.device_index, NULL, &previous, &capturing, NULL);
    int result = run(&checker, &o);
    arena_free(&checker.arena);
    moe_context_destroy(checker.ctx);
    return result;
}
