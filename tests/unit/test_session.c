/* SPDX-License-Identifier: Apache-2.0 */
/* Captured batches: what is appended is read back bit for bit, and whatever happens to a writer or to the disk, a
 * session holds exactly the batches that were whole. */
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "runtime/session.h"
#include "tests/unit/files.h"

enum { HIDDEN = 24, EXPERTS = 8, TOP_K = 2, MAX_TOKENS = 64 };

static moe_context *ctx;
static char session_path[128]; /* in a directory of its own for each test */

/* ---- Helpers ---- */

static const char *in_session(const char *file)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", session_path, file);
    return path;
}

static int count_files(void)
{
    int count = 0;
    DIR *d = opendir(session_path);
    assert_non_null(d);
    for (const struct dirent *e; (e = readdir(d)) != NULL;)
        count += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(d);
    return count;
}

static long file_size(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? (long)st.st_size : -1;
}

static const char *last_error(void)
{
    static char text[1024];
    moe_last_error(ctx, text, sizeof text);
    return text;
}

static void expect(moe_status got, moe_status wanted, const char *text)
{
    if (got != wanted)
        fail_msg("status %d (%s), expected %d", got, last_error(), wanted);
    if (text != NULL && strstr(last_error(), text) == NULL)
        fail_msg("message '%s' does not contain '%s'", last_error(), text);
}

#define EXPECT_OK(call) expect((call), MOE_OK, NULL)

/* Data that any process can make again from the seed. */
static struct batch {
    uint32_t hidden[MAX_TOKENS * HIDDEN], output[MAX_TOKENS * HIDDEN], logits[MAX_TOKENS * EXPERTS];
    int32_t ids[MAX_TOKENS * TOP_K];
    uint32_t weights[MAX_TOKENS * TOP_K];
} made;

static moe_record make_record(int64_t seed)
{
    static const moe_dtype dtypes[] = {MOE_BF16, MOE_F16, MOE_F32};
    uint32_t word = (uint32_t)seed * 2654435761u + 1;
    uint32_t *words = (uint32_t *)&made;
    for (size_t i = 0; i < sizeof made / sizeof *words; i++)
        words[i] = word = word * 1664525u + 1013904223u;
    moe_record r = moe_record_init();
    r.layer = (int32_t)(seed % 32);
    r.tokens = seed % 4 == 0 ? 1 : seed * 7 % MAX_TOKENS;
    r.hidden_size = HIDDEN;
    r.top_k = TOP_K;
    r.dtype = dtypes[seed % 3];
    r.time = 1763759000.25 + (double)seed;
    r.hidden_states = made.hidden;
    r.topk_ids = made.ids;
    r.topk_weights = (const float *)made.weights;
    if (seed % 2 == 0) {
        r.router_logits = (const float *)made.logits;
        r.num_experts = EXPERTS;
    }
    if (seed % 5 != 0)
        r.output = made.output;
    return r;
}

static bool same_bytes(const void *a, const void *b, int64_t rows, int64_t columns, size_t element)
{
    return (a == NULL) == (b == NULL) && (a == NULL || memcmp(a, b, (size_t)rows * (size_t)columns * element) == 0);
}

/* Compares without cmocka, so that it can run anywhere. */
static bool same_record(const moe_record *a, const moe_record *b)
{
    return a->layer == b->layer && a->tokens == b->tokens && a->hidden_size == b->hidden_size &&
           a->num_experts == b->num_experts && a->top_k == b->top_k && a->dtype == b->dtype && a->time == b->time &&
           same_bytes(a->hidden_states, b->hidden_states, a->tokens, a->hidden_size, moe_dtype_size(a->dtype)) &&
           same_bytes(a->topk_ids, b->topk_ids, a->tokens, a->top_k, 4) &&
           same_bytes(a->topk_weights, b->topk_weights, a->tokens, a->top_k, 4) &&
           same_bytes(a->router_logits, b->router_logits, a->tokens, a->num_experts, 4) &&
           same_bytes(a->output, b->output, a->tokens, a->hidden_size, moe_dtype_size(a->dtype));
}

static void append_seeds(int64_t first, int64_t count)
{
    moe_capture *capture;
    EXPECT_OK(moe_capture_open(ctx, session_path, &capture));
    for (int64_t seed = first; seed < first + count; seed++) {
        moe_record r = make_record(seed);
        EXPECT_OK(moe_capture_append(capture, &r));
    }
    moe_capture_close(capture);
}

/* The session holds `count` batches, batch i made from seed i. */
static void check_session(int64_t count)
{
    moe_session *session;
    EXPECT_OK(moe_session_open(ctx, session_path, &session));
    assert_int_equal(moe_session_count(session), count);
    for (int64_t i = 0; i < count; i++) {
        moe_record expected = make_record(i), got = moe_record_init();
        EXPECT_OK(moe_session_read(session, i, &got));
        assert_true(same_record(&got, &expected));
        assert_string_equal(got.phase, expected.tokens == 1 ? "decode" : "prefill");
        assert_int_equal((uintptr_t)got.hidden_states % 64, 0);
        assert_int_equal((uintptr_t)got.topk_weights % 64, 0);
    }
    moe_session_close(session);
}

/* ---- Tests ---- */

static void test_round_trip(void **state)
{
    (void)state;
    append_seeds(0, 7);
    check_session(7);
    append_seeds(7, 15); /* a second writer goes on where the first one stopped */
    check_session(22);
    assert_int_equal(count_files(), 23);

    moe_session *session;
    moe_record r = moe_record_init();
    EXPECT_OK(moe_session_open(ctx, session_path, &session));
    EXPECT_OK(moe_session_read(session, 21, &r)); /* any order */
    EXPECT_OK(moe_session_read(session, 3, &r));
    expect(moe_session_read(session, 22, &r), MOE_ERROR_INVALID_ARGUMENT, "record 22");
    expect(moe_session_read(session, -1, &r), MOE_ERROR_INVALID_ARGUMENT, "record -1");
    expect(moe_session_read(session, 0, NULL), MOE_ERROR_INVALID_ARGUMENT, "moe_record");
    moe_session_close(session);
    moe_session_close(NULL);
    assert_int_equal(moe_session_count(NULL), 0);
}

static void test_no_tokens_and_own_words(void **state)
{
    (void)state;
    moe_capture *capture;
    EXPECT_OK(moe_capture_open(ctx, session_path, &capture));
    moe_record r = moe_record_init();
    r.hidden_size = HIDDEN;
    r.top_k = 1;
    r.dtype = MOE_BF16;
    r.phase = "warm-up_2";
    EXPECT_OK(moe_capture_append(capture, &r)); /* no tokens: no pointers needed; no time: now */
    moe_capture_close(capture);

    moe_session *session;
    moe_record got = moe_record_init();
    EXPECT_OK(moe_session_open(ctx, session_path, &session));
    EXPECT_OK(moe_session_read(session, 0, &got));
    assert_int_equal(got.tokens, 0);
    assert_int_equal(got.hidden_size, HIDDEN);
    assert_null(got.router_logits);
    assert_null(got.output);
    assert_string_equal(got.phase, "warm-up_2");
    assert_true(got.time > 1.7e9);
    moe_session_close(session);
}

static void test_invalid_records(void **state)
{
    (void)state;
    append_seeds(0, 1);
    long before = file_size(in_session("session.jsonl"));
    moe_capture *capture;
    EXPECT_OK(moe_capture_open(ctx, session_path, &capture));
#define REJECT(field, value, text)                                                                                     \
    do {                                                                                                               \
        moe_record r = make_record(2);                                                                                 \
        r.field = (value);                                                                                             \
        expect(moe_capture_append(capture, &r), MOE_ERROR_INVALID_ARGUMENT, text);                                     \
    } while (0)
    REJECT(size, 8, "moe_record.size");
    REJECT(layer, -1, "layer");
    REJECT(phase, "", "phase");
    REJECT(phase, "Prefill", "phase");
    REJECT(phase, "two words", "phase");
    REJECT(phase, "a\"b", "phase");
    REJECT(phase, "abcdefghijklmnopqrstuvwxyz0123456", "phase");
    REJECT(tokens, -1, "tokens");
    REJECT(tokens, INT64_MAX, "tokens");
    REJECT(tokens, (int64_t)1 << 53, "too large"); /* times 24 columns of 4 bytes: more than 2^63 */
    REJECT(hidden_size, 0, "hidden_size");
    REJECT(top_k, 0, "top_k");
    REJECT(top_k, MOE_MAX_TOP_K + 1, "top_k");
    REJECT(num_experts, 0, "num_experts");
    REJECT(num_experts, MOE_MAX_EXPERTS + 1, "num_experts");
    REJECT(dtype, MOE_I32, "dtype");
    REJECT(dtype, MOE_DTYPE_NONE, "dtype");
    REJECT(time, -1.0, "time");
    REJECT(time, (double)INFINITY, "time");
    REJECT(time, (double)NAN, "time");
    REJECT(hidden_states, NULL, "hidden_states");
    REJECT(topk_ids, NULL, "topk_ids");
    REJECT(topk_weights, NULL, "topk_weights");
    expect(moe_capture_append(capture, NULL), MOE_ERROR_INVALID_ARGUMENT, "moe_record");
    assert_int_equal(moe_capture_append(NULL, NULL), MOE_ERROR_INVALID_ARGUMENT);
    moe_capture_close(capture);
    moe_capture_close(NULL);
    assert_int_equal(file_size(in_session("session.jsonl")), before);
    assert_int_equal(count_files(), 2);
    check_session(1);
}

static void test_bad_places(void **state)
{
    (void)state;
    moe_capture *capture = (moe_capture *)&made;
    moe_session *session = (moe_session *)&made;
    expect(moe_capture_open(ctx, "/nowhere/at/all", &capture), MOE_ERROR_WRITE, "/nowhere/at/all");
    assert_null(capture);
    expect(moe_capture_open(ctx, "/dev/null", &capture), MOE_ERROR_WRITE, "/dev/null");
    expect(moe_session_open(ctx, session_path, &session), MOE_ERROR_FILE, "session.jsonl");
    assert_null(session);
    assert_int_equal(moe_capture_open(NULL, session_path, &capture), MOE_ERROR_INVALID_ARGUMENT);
    assert_int_equal(moe_capture_open(ctx, NULL, &capture), MOE_ERROR_INVALID_ARGUMENT);
    assert_int_equal(moe_session_open(ctx, NULL, &session), MOE_ERROR_INVALID_ARGUMENT);
    assert_int_equal(moe_session_open(ctx, session_path, NULL), MOE_ERROR_INVALID_ARGUMENT);

    assert_int_equal(mkdir(session_path, 0777), 0);
    assert_int_equal(mkfifo(in_session("session.jsonl"), 0666), 0);
    expect(moe_capture_open(ctx, session_path, &capture), MOE_ERROR_WRITE, "not a regular file");
    expect(moe_session_open(ctx, session_path, &session), MOE_ERROR_FILE, "not a regular file");
}

static void test_one_writer(void **state)
{
    (void)state;
    moe_capture *first, *second;
    EXPECT_OK(moe_capture_open(ctx, session_path, &first));
    pid_t child = fork();
    if (child == 0)
        _exit(moe_capture_open(ctx, session_path, &second) == MOE_ERROR_WRITE ? 0 : 1);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    expect(moe_capture_open(ctx, session_path, &second), MOE_ERROR_WRITE, "is being written by another process");
    moe_record r = make_record(0);
    EXPECT_OK(moe_capture_append(first, &r)); /* readers are welcome meanwhile */
    check_session(1);
    moe_capture_close(first);
    append_seeds(1, 1);
    check_session(2);
}

/* session.jsonl cut at every length: whole lines are there, the rest is not, and a writer goes on from there. */
static void test_truncation(void **state)
{
    (void)state;
    enum { LINES = 3 };
    append_seeds(0, LINES);
    char text[1024], path[512];
    snprintf(path, sizeof path, "%s", in_session("session.jsonl"));
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t length = fread(text, 1, sizeof text, f);
    fclose(f);
    assert_in_range(length, LINES * 60, sizeof text - 1);

    for (size_t cut = 0; cut <= length; cut++) {
        int64_t whole = 0;
        long end = 0;
        for (size_t i = 0; i < cut; i++)
            if (text[i] == '\n') {
                whole++;
                end = (long)i + 1;
            }
        files_write_at(path, text, cut);
        check_session(whole);
        moe_capture *capture;
        EXPECT_OK(moe_capture_open(ctx, session_path, &capture));
        assert_int_equal(file_size(path), end);
        if (cut % 16 == 0) {
            moe_record r = make_record(whole);
            EXPECT_OK(moe_capture_append(capture, &r));
            check_session(whole + 1);
        }
        moe_capture_close(capture);
    }
}

#define LINE(index, rest) "{\"index\":" index ",\"layer\":3,\"phase\":\"decode\",\"tokens\":1,\"time\":5.5" rest "}\n"
#define FILE_A            ",\"file\":\"a\""

static void test_parse(void **state)
{
    (void)state;
    const struct {
        const char *text, *message; /* message NULL: legal */
        int64_t count;
    } cases[] = {
        {"", NULL, 0},
        {LINE("0", FILE_A), NULL, 1},
        {LINE("0", FILE_A ",\"note\":[1,2]"), NULL, 1}, /* unknown fields are other people's */
        {LINE("0", FILE_A) LINE("1", FILE_A), NULL, 2},
        /* What a crash leaves of the last line. */
        {LINE("0", FILE_A) "{\"index\":1,\"lay", NULL, 1},
        {LINE("0", FILE_A) "{\"index\":1,\"lay\n", NULL, 1},
        {LINE("0", FILE_A) "\n", NULL, 1},
        {"{}", NULL, 0},
        /* The same in the middle is no crash. */
        {"{\"index\":0,\"lay\n" LINE("1", FILE_A), "s.jsonl:1: ", 0},
        {LINE("0", FILE_A) "\n" LINE("1", FILE_A), "s.jsonl:2: ", 0},
        {LINE("0", FILE_A) "[1]\n" LINE("2", FILE_A), "s.jsonl:2: ", 0},
        /* Nor is JSON that says something else. */
        {"{}\n", "s.jsonl:1: 'index' is missing, expected 0", 0},
        {LINE("1", FILE_A), "s.jsonl:1: 'index' is 1, expected 0", 0},
        {LINE("0", FILE_A) LINE("0", FILE_A), "s.jsonl:2: 'index' is 0, expected 1", 0},
        {LINE("\"0\"", FILE_A), "'index' is \"0\"", 0},
        {LINE("0", ""), "'file' is missing", 0},
        {LINE("0", ",\"file\":7"), "'file' is 7", 0},
        {LINE("0", ",\"file\":\"\""), "'file'", 0},
        {LINE("0", ",\"file\":\"..\""), "'file'", 0},
        {LINE("0", ",\"file\":\".\""), "'file'", 0},
        {LINE("0", ",\"file\":\"/etc/passwd\""), "'file'", 0},
        {LINE("0", ",\"file\":\"../a\""), "'file'", 0},
        {LINE("0", ",\"file\":\"a\\u0000b\"") "{}\n", "s.jsonl:1: ", 0},
        {"{\"index\":0,\"layer\":-1,\"phase\":\"x\",\"tokens\":1,\"time\":1,\"file\":\"a\"}\n", "'layer' is -1", 0},
        {"{\"index\":0,\"layer\":2147483648,\"phase\":\"x\",\"tokens\":1,\"time\":1,\"file\":\"a\"}\n", "'layer'", 0},
        {"{\"index\":0,\"layer\":1,\"phase\":\"A b\",\"tokens\":1,\"time\":1,\"file\":\"a\"}\n", "'phase' is \"A b\"",
         0},
        {"{\"index\":0,\"layer\":1,\"phase\":\"x\",\"tokens\":-1,\"time\":1,\"file\":\"a\"}\n", "'tokens' is -1", 0},
        {"{\"index\":0,\"layer\":1,\"phase\":\"x\",\"tokens\":1.5,\"time\":1,\"file\":\"a\"}\n", "'tokens' is 1.5", 0},
        {"{\"index\":0,\"layer\":1,\"phase\":\"x\",\"tokens\":1,\"time\":-1,\"file\":\"a\"}\n", "'time' is -1", 0},
        {"{\"index\":0,\"layer\":1,\"phase\":\"x\",\"tokens\":1,\"time\":1e999,\"file\":\"a\"}\n", "'time'", 0},
        {"{\"index\":0,\"layer\":1,\"phase\":\"x\",\"tokens\":1,\"time\":\"now\",\"file\":\"a\"}\n", "'time'", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_session_index index;
        struct moe_error err = {{0}};
        moe_status status = moe_session_parse(cases[i].text, strlen(cases[i].text), "s.jsonl", &index, &err);
        if (cases[i].message == NULL) {
            assert_int_equal(status, MOE_OK);
            assert_int_equal(index.count, cases[i].count);
            moe_session_index_free(&index);
        } else {
            if (status != MOE_ERROR_FILE || strstr(err.text, cases[i].message) == NULL)
                fail_msg("case %zu: status %d, message '%s'", i, status, err.text);
        }
    }

    /* A line may have 65536 bytes and no more, also if it is the last. */
    static char big[MOE_SESSION_MAX_LINE + 2];
    size_t length = sizeof LINE("0", FILE_A) - 2; /* without the newline */
    struct moe_session_index index;
    struct moe_error err;
    memset(big, ' ', sizeof big);
    memcpy(big, LINE("0", FILE_A), length);
    big[MOE_SESSION_MAX_LINE] = '\n';
    assert_int_equal(moe_session_parse(big, MOE_SESSION_MAX_LINE + 1, "s.jsonl", &index, &err), MOE_OK);
    assert_int_equal(index.count, 1);
    moe_session_index_free(&index);
    big[MOE_SESSION_MAX_LINE] = ' ';
    big[MOE_SESSION_MAX_LINE + 1] = '\n';
    assert_int_equal(moe_session_parse(big, sizeof big, "s.jsonl", &index, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "65537"));
}

/* A batch file made by hand: what tensors are asked to be, and who is told otherwise. */
static void test_batch_files(void **state)
{
    (void)state;
    static const int64_t wide[] = {0, 7, -1, INT64_MAX, (int64_t)1 << 32, 3};
    static const float floats[3 * 8];
    const struct moe_st_write_tensor hidden = {"hidden_states", MOE_F32, 2, {3, 8}, floats},
                                     ids = {"topk_ids", MOE_I64, 2, {3, 2}, wide},
                                     weights = {"topk_weights", MOE_F32, 2, {3, 2}, floats},
                                     logits = {"router_logits", MOE_F32, 2, {3, 4}, floats},
                                     output = {"output", MOE_F32, 2, {3, 8}, floats},
                                     other = {"another tool's", MOE_I32, 1, {3}, floats};
    const char line[] = "{\"index\":0,\"layer\":0,\"phase\":\"prefill\",\"tokens\":3,\"time\":1,\"file\":\"b.st\"}\n";
    const struct moe_st_write_tensor whole[6] = {hidden, ids, weights, logits, output, other};
    char path[512];

    assert_int_equal(mkdir(session_path, 0777), 0);
    files_write_at(in_session("session.jsonl"), line, sizeof line - 1);
    snprintf(path, sizeof path, "%s", in_session("b.st"));
    moe_session *session;
    moe_record r = moe_record_init();
    EXPECT_OK(moe_session_open(ctx, session_path, &session));
    expect(moe_session_read(session, 0, &r), MOE_ERROR_FILE, "b.st");

    assert_int_equal(moe_st_write(path, whole, 6, NULL), MOE_OK);
    EXPECT_OK(moe_session_read(session, 0, &r));
    const int32_t narrow[] = {0, 7, -1, -1, -1, 3};
    assert_memory_equal(r.topk_ids, narrow, sizeof narrow);
    assert_int_equal(r.num_experts, 4);
    assert_int_equal(r.hidden_size, 8);

#define REPLACED(i, member, value, text)                                                                               \
    do {                                                                                                               \
        struct moe_st_write_tensor tensors[6];                                                                         \
        memcpy(tensors, whole, sizeof tensors);                                                                        \
        tensors[i].member = (value);                                                                                   \
        assert_int_equal(moe_st_write(path, tensors, 6, NULL), MOE_OK);                                                \
        expect(moe_session_read(session, 0, &r), MOE_ERROR_FILE, text);                                                \
    } while (0)
    REPLACED(0, name, "hidden", "b.st: tensor 'hidden_states' is missing");
    REPLACED(1, name, "ids", "b.st: tensor 'topk_ids' is missing");
    REPLACED(2, name, "w", "b.st: tensor 'topk_weights' is missing");
    REPLACED(0, dtype, MOE_I32, "'hidden_states' is I32, expected BF16, F16 or F32");
    REPLACED(1, dtype, MOE_F32, "'topk_ids' is F32, expected I32 or I64");
    REPLACED(2, dtype, MOE_BF16, "'topk_weights' is BF16, expected F32");
    REPLACED(3, dtype, MOE_F16, "'router_logits' is F16");
    REPLACED(4, dtype, MOE_F16, "'output' is F16, expected F32");
    REPLACED(0, shape[0], 2, "'hidden_states' has shape [2, 8], expected [3, 1 or more]");
    REPLACED(0, shape[1], 0, "'hidden_states' has shape [3, 0]");
    REPLACED(0, rank, 1, "'hidden_states' has shape [3]");
    REPLACED(1, shape[1], 0, "'topk_ids' has shape [3, 0], expected [3, 1 to 64]");
    REPLACED(2, shape[1], 1, "'topk_weights' has shape [3, 1], expected [3, 2]");
    REPLACED(3, shape[0], 1, "'router_logits' has shape [1, 4]");
    REPLACED(4, shape[1], 4, "'output' has shape [3, 4], expected [3, 8]");

    /* The file shrinks under an open session. */
    assert_int_equal(moe_st_write(path, whole, 6, NULL), MOE_OK);
    assert_int_equal(truncate(path, file_size(path) - 1), 0);
    expect(moe_session_read(session, 0, &r), MOE_ERROR_FILE, "b.st");
    assert_int_equal(moe_st_write(path, whole, 6, NULL), MOE_OK);
    EXPECT_OK(moe_session_read(session, 0, &r));
    moe_session_close(session);
}

/* Another program began the session and numbers its files from 1: none of them may be replaced. */
static void test_other_numbers(void **state)
{
    (void)state;
    static const float floats[3 * 8];
    static const int32_t ids[3 * 2];
    const struct moe_st_write_tensor theirs[] = {{"hidden_states", MOE_F32, 2, {3, 8}, floats},
                                                 {"topk_ids", MOE_I32, 2, {3, 2}, ids},
                                                 {"topk_weights", MOE_F32, 2, {3, 2}, floats}};
    const char line[] = "{\"index\":0,\"layer\":0,\"phase\":\"prefill\",\"tokens\":3,\"time\":1,"
                        "\"file\":\"batch-000001.safetensors\"}\n";
    assert_int_equal(mkdir(session_path, 0777), 0);
    assert_int_equal(moe_st_write(in_session("batch-000001.safetensors"), theirs, 3, NULL), MOE_OK);
    files_write_at(in_session("session.jsonl"), line, sizeof line - 1);
    append_seeds(1, 2);

    moe_session *session;
    moe_record r = moe_record_init();
    EXPECT_OK(moe_session_open(ctx, session_path, &session));
    assert_int_equal(moe_session_count(session), 3);
    EXPECT_OK(moe_session_read(session, 0, &r));
    assert_int_equal(r.hidden_size, 8);
    for (int64_t i = 1; i < 3; i++) {
        moe_record expected = make_record(i);
        EXPECT_OK(moe_session_read(session, i, &r));
        assert_true(same_record(&r, &expected));
    }
    moe_session_close(session);
}

/* A writer that is killed at any moment leaves whole batches only, and the next one goes on. */
static void test_killed_writer(void **state)
{
    (void)state;
    int64_t count = 0;
    unsigned random = 12345;
    for (int round = 0; round < 30; round++) {
        pid_t child = fork();
        if (child == 0) {
            moe_capture *capture;
            if (moe_capture_open(ctx, session_path, &capture) != MOE_OK)
                _exit(1);
            for (int64_t seed = count;; seed++) {
                moe_record r = make_record(seed);
                if (moe_capture_append(capture, &r) != MOE_OK)
                    _exit(2);
            }
        }
        random = random * 1664525u + 1013904223u;
        usleep(1000 + (random >> 8) % 30000);
        assert_int_equal(kill(child, SIGKILL), 0);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status)); /* it had not failed before */

        struct moe_session *session;
        if (moe_session_open(ctx, session_path, &session) != MOE_OK) {
            assert_int_equal(count, 0); /* killed before it made the session */
            continue;
        }
        assert_true(moe_session_count(session) >= count);
        count = moe_session_count(session);
        moe_session_close(session);
        check_session(count);
    }
    assert_true(count > 0);
    append_seeds(count, 1);
    check_session(count + 1);
    assert_int_equal(count_files(), count + 2); /* nothing is left of the killed ones */
}

static void limit_file_size(rlim_t bytes)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

/* A disk that fills up, in the batch file and then in the middle of the line: the session stays as it was. */
static void test_full_disk(void **state)
{
    (void)state;
    enum { LINES = 16 };
    char path[512];
    snprintf(path, sizeof path, "%s", in_session("session.jsonl"));
    moe_capture *capture;
    EXPECT_OK(moe_capture_open(ctx, session_path, &capture));
    for (int64_t seed = 0; seed < LINES; seed++) {
        moe_record r = make_record(seed);
        EXPECT_OK(moe_capture_append(capture, &r));
    }
    long before = file_size(path);
    moe_record r = make_record(LINES); /* one token: its file is smaller than session.jsonl */
    assert_int_equal(r.tokens, 1);

    signal(SIGXFSZ, SIG_IGN);
    limit_file_size(300);
    moe_status in_batch = moe_capture_append(capture, &r);
    limit_file_size((rlim_t)before + 40);
    moe_status in_line = moe_capture_append(capture, &r);
    long after_line = file_size(path);
    limit_file_size((rlim_t)before);
    moe_status no_line = moe_capture_append(capture, &r);
    limit_file_size(RLIM_INFINITY);
    assert_int_equal(in_batch, MOE_ERROR_WRITE);
    assert_int_equal(in_line, MOE_ERROR_WRITE);
    expect(no_line, MOE_ERROR_WRITE, "session.jsonl");
    assert_int_equal(after_line, before);
    assert_int_equal(file_size(path), before);
    assert_int_equal(count_files(), LINES + 1);
    check_session(LINES);

    r = make_record(LINES);
    EXPECT_OK(moe_capture_append(capture, &r)); /* once there is room */
    moe_capture_close(capture);
    check_session(LINES + 1);
}

/* ---- */

static int setup(void **state)
{
    int failed = files_setup(state);
    snprintf(session_path, sizeof session_path, "%s", files_path("session"));
    return failed;
}

static int setup_all(void **state)
{
    (void)state;
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = 1; /* no other threads: tests fork */
    return moe_context_create(&options, &ctx) != MOE_OK;
}

static int teardown_all(void **state)
{
    (void)state;
    moe_context_destroy(ctx);
    return 0;
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, files_teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_round_trip),      TEST(test_no_tokens_and_own_words),
        TEST(test_invalid_records), TEST(test_bad_places),
        TEST(test_one_writer),      TEST(test_truncation),
        TEST(test_parse),           TEST(test_batch_files),
        TEST(test_other_numbers),   TEST(test_killed_writer),
        TEST(test_full_disk),
    };
    return cmocka_run_group_tests(tests, setup_all, teardown_all);
}
