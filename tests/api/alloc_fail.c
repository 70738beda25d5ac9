/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory runs out, at every place where it can: a life of the library (context, tuned table, checkpoint, layer,
 * workspace, forward, capture, session) is run again and again, and in run n the n-th request for memory fails. Each
 * run must end with a status and a text, leave no block, mapping or descriptor behind, and leave a session that is as
 * before the append or one batch longer.
 *
 * The linker's --wrap sends the library's calls here, which works beside a sanitizer's own allocator as well.
 */
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cjson/cJSON.h>
#include <setjmp.h>

#include <cmocka.h>

#include "models/safetensors.h"

/* ---- What stands between the library and libc ---- */

static atomic_bool counting;      /* on while the library runs */
static atomic_long requests;      /* so far in this run */
static atomic_long first, last;   /* the requests that fail; 0: none */
static atomic_long blocks, bytes; /* held: blocks of memory, mapped bytes */

static bool refuse(void)
{
    if (!atomic_load(&counting))
        return false;
    long n = atomic_fetch_add(&requests, 1) + 1;
    if (n < atomic_load(&first) || n > atomic_load(&last))
        return false;
    errno = ENOMEM;
    return true;
}

static void *held(void *block)
{
    if (block != NULL && atomic_load(&counting))
        atomic_fetch_add(&blocks, 1);
    return block;
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *block, size_t size);
void __real_free(void *block);
int __real_posix_memalign(void **block, size_t alignment, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
cpu_set_t *__real___sched_cpualloc(size_t count);
FILE *__real_open_memstream(char **text, size_t *length);
DIR *__real_fdopendir(int descriptor);
DIR *__real_opendir(const char *path);
void *__real_mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset);
int __real_munmap(void *address, size_t length);
FILE *__real_fopen(const char *path, const char *mode);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *block, size_t size);
void __wrap_free(void *block);
int __wrap_posix_memalign(void **block, size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
char *__wrap_strdup(const char *text);
cpu_set_t *__wrap___sched_cpualloc(size_t count);
FILE *__wrap_open_memstream(char **text, size_t *length);
DIR *__wrap_fdopendir(int descriptor);
DIR *__wrap_opendir(const char *path);
void *__wrap_mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset);
void *__wrap_mmap64(void *address, size_t length, int protection, int flags, int descriptor, off_t offset);
int __wrap_munmap(void *address, size_t length);
FILE *__wrap_fopen(const char *path, const char *mode);
FILE *__wrap_fopen64(const char *path, const char *mode);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __wrap_fsync(int descriptor);
int __wrap_fdatasync(int descriptor);

void *__wrap_malloc(size_t size)
{
    return refuse() ? NULL : held(__real_malloc(size));
}

void *__wrap_calloc(size_t count, size_t size)
{
    return refuse() ? NULL : held(__real_calloc(count, size));
}

void *__wrap_realloc(void *block, size_t size)
{
    if (refuse())
        return NULL;
    void *moved = __real_realloc(block, size);
    return block == NULL ? held(moved) : moved;
}

void __wrap_free(void *block)
{
    if (block != NULL && atomic_load(&counting))
        atomic_fetch_sub(&blocks, 1);
    __real_free(block);
}

int __wrap_posix_memalign(void **block, size_t alignment, size_t size)
{
    if (refuse())
        return ENOMEM;
    int result = __real_posix_memalign(block, alignment, size);
    if (result == 0)
        held(*block);
    return result;
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return refuse() ? NULL : held(__real_aligned_alloc(alignment, size));
}

char *__wrap_strdup(const char *text)
{
    size_t size = strlen(text) + 1;
    char *copy = __wrap_malloc(size);
    return copy == NULL ? NULL : memcpy(copy, text, size);
}

/* What CPU_ALLOC calls; the C library frees it. */
cpu_set_t *__wrap___sched_cpualloc(size_t count)
{
    return refuse() ? NULL : __real___sched_cpualloc(count);
}

/* The text is the caller's to free. */
FILE *__wrap_open_memstream(char **text, size_t *length)
{
    return refuse() ? NULL : held(__real_open_memstream(text, length));
}

DIR *__wrap_fdopendir(int descriptor)
{
    return refuse() ? NULL : __real_fdopendir(descriptor);
}

DIR *__wrap_opendir(const char *path)
{
    return refuse() ? NULL : __real_opendir(path);
}

/* Whole pages, which is what munmap gives back. */
static long pages(size_t length)
{
    long page = sysconf(_SC_PAGESIZE);
    return ((long)length + page - 1) / page * page;
}

void *__wrap_mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset)
{
    if (refuse())
        return MAP_FAILED;
    void *mapping = __real_mmap(address, length, protection, flags, descriptor, offset);
    if (mapping != MAP_FAILED && atomic_load(&counting))
        atomic_fetch_add(&bytes, pages(length));
    return mapping;
}

/* The names of both with 64-bit offsets, which on 64-bit machines are the same functions. */
void *__wrap_mmap64(void *address, size_t length, int protection, int flags, int descriptor, off_t offset)
{
    return __wrap_mmap(address, length, protection, flags, descriptor, offset);
}

FILE *__wrap_fopen64(const char *path, const char *mode)
{
    return __wrap_fopen(path, mode);
}

int __wrap_munmap(void *address, size_t length)
{
    if (atomic_load(&counting))
        atomic_fetch_sub(&bytes, pages(length));
    return __real_munmap(address, length);
}

FILE *__wrap_fopen(const char *path, const char *mode)
{
    return refuse() ? NULL : __real_fopen(path, mode);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    return refuse() ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}

/* Thousands of runs need not reach the disk. */
int __wrap_fsync(int descriptor)
{
    (void)descriptor;
    return 0;
}

int __wrap_fdatasync(int descriptor)
{
    (void)descriptor;
    return 0;
}

/* ---- A checkpoint in two shards ---- */

enum { THREADS = 2, TOKENS = 3, HIDDEN = 16, INTERMEDIATE = 8, EXPERTS = 4, TOP_K = 2 };

static char directory[64]; /* of this test's files; the checkpoint's too */
static char session[96];
static char tuned[96];      /* a table for the layer; empty until it is there */
static off_t session_bytes; /* of session.jsonl with the one batch that is there before a run; 0: no session yet */
static _Alignas(16) float hidden_states[TOKENS * HIDDEN];
static float expected[TOKENS * HIDDEN]; /* output when nothing fails */

static void write_text(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void write_text(const char *name, const char *format, ...)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    va_list args;
    va_start(args, format);
    assert_true(vfprintf(file, format, args) > 0);
    va_end(args);
    assert_int_equal(fclose(file), 0);
}

static void fill(float *values, size_t count)
{
    static uint32_t state = 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = (float)(state >> 8) / (float)(1 << 24) - 0.5f;
    }
}

static void write_checkpoint(void)
{
    enum { GATE = EXPERTS * HIDDEN, MATRIX = INTERMEDIATE * HIDDEN, TENSORS = 3 * EXPERTS };
    static float gate[GATE], matrices[TENSORS][MATRIX];
    static char names[TENSORS][96];
    static const char *const kinds[3] = {"w1", "w2", "w3"};
    struct moe_st_write_tensor experts[TENSORS];
    memset(experts, 0, sizeof experts);
    fill(gate, GATE);
    fill(hidden_states, TOKENS * HIDDEN);
    for (int i = 0; i < TENSORS; i++) {
        bool down = i % 3 == 1;
        snprintf(names[i], sizeof names[i], "model.layers.0.block_sparse_moe.experts.%d.%s.weight", i / 3,
                 kinds[i % 3]);
        fill(matrices[i], MATRIX);
        experts[i] = (struct moe_st_write_tensor){.name = names[i], .dtype = MOE_F32, .rank = 2, .data = matrices[i]};
        experts[i].shape[0] = down ? HIDDEN : INTERMEDIATE;
        experts[i].shape[1] = down ? INTERMEDIATE : HIDDEN;
    }
    struct moe_st_write_tensor router = {.name = "model.layers.0.block_sparse_moe.gate.weight",
                                         .dtype = MOE_F32,
                                         .rank = 2,
                                         .shape = {EXPERTS, HIDDEN},
                                         .data = gate};

    char path[128];
    snprintf(path, sizeof path, "%s/model-00001-of-00002.safetensors", directory);
    assert_int_equal(moe_st_write(path, &router, 1, NULL), MOE_OK);
    snprintf(path, sizeof path, "%s/model-00002-of-00002.safetensors", directory);
    assert_int_equal(moe_st_write(path, experts, TENSORS, NULL), MOE_OK);

    char map[TENSORS * 160] = "";
    for (int i = 0; i < TENSORS; i++)
        snprintf(map + strlen(map), sizeof map - strlen(map), ", \"%s\": \"model-00002-of-00002.safetensors\"",
                 names[i]);
    write_text("model.safetensors.index.json",
               "{\"metadata\": {\"total_size\": %zu}, \"weight_map\": {\"%s\": \"%s\"%s}}",
               sizeof gate + sizeof matrices, router.name, "model-00001-of-00002.safetensors", map);
    write_text("config.json",
               "{\"model_type\": \"mixtral\", \"architectures\": [\"MixtralForCausalLM\"], \"hidden_size\": %d, "
               "\"intermediate_size\": %d, \"num_local_experts\": %d, \"num_experts_per_tok\": %d, "
               "\"num_hidden_layers\": 1, \"hidden_act\": \"silu\", \"torch_dtype\": \"float32\"}",
               HIDDEN, INTERMEDIATE, EXPERTS, TOP_K);
}

/* ---- One life of the library ---- */

struct life {
    moe_context *ctx;
    moe_checkpoint *checkpoint;
    moe_layer *layer;
    moe_capture *capture;
    moe_session *session;
    void *workspace;
    _Alignas(16) float output[TOKENS * HIDDEN];
    _Alignas(16) int32_t ids[TOKENS * TOP_K];
    _Alignas(16) float weights[TOKENS * TOP_K];
    long forward_requests; /* for memory, made by moe_forward */
    bool appended;         /* moe_capture_append said so */
    int64_t count;         /* of batches that moe_session_open found */
};

static moe_status forward(struct life *life)
{
    moe_limits limits = moe_limits_init();
    limits.max_tokens = TOKENS;
    size_t size = 0;
    moe_status status = moe_workspace_size(life->layer, &limits, &size);
    if (status == MOE_OK)
        status = moe_buffer_alloc(life->ctx, size, &life->workspace);
    if (status != MOE_OK)
        return status;
    moe_batch batch = moe_batch_init();
    batch.tokens = TOKENS;
    batch.dtype = MOE_F32;
    batch.hidden_states = hidden_states;
    batch.output = life->output;
    batch.topk_ids_out = life->ids;
    batch.topk_weights_out = life->weights;
    long before = atomic_load(&requests);
    status = moe_forward(life->layer, &batch, life->workspace, size, NULL);
    life->forward_requests = atomic_load(&requests) - before;
    return status;
}

static moe_status append(struct life *life)
{
    moe_record record = moe_record_init();
    record.tokens = TOKENS;
    record.hidden_size = HIDDEN;
    record.top_k = TOP_K;
    record.dtype = MOE_F32;
    record.hidden_states = hidden_states;
    record.topk_ids = life->ids;
    record.topk_weights = life->weights;
    record.output = life->output;
    moe_status status = moe_capture_open(life->ctx, session, &life->capture);
    if (status == MOE_OK)
        status = moe_capture_append(life->capture, &record);
    life->appended = status == MOE_OK;
    moe_capture_close(life->capture);
    return status;
}

static moe_status read_back(struct life *life)
{
    moe_status status = moe_session_open(life->ctx, session, &life->session);
    moe_record record = moe_record_init();
    life->count = status == MOE_OK ? moe_session_count(life->session) : 0;
    for (int64_t i = 0; status == MOE_OK && i < life->count; i++)
        status = moe_session_read(life->session, i, &record);
    return status;
}

/* Runs all of it up to the first failure, whose text goes to `text`, and takes everything down. */
static moe_status live(struct life *life, char *text, size_t size)
{
    memset(life, 0, sizeof *life);
    text[0] = 0;
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = THREADS;
    options.tuned = tuned;
    moe_status status = moe_context_create(&options, &life->ctx);
    if (status == MOE_OK)
        status = moe_checkpoint_open(life->ctx, directory, &life->checkpoint);
    if (status == MOE_OK)
        status = moe_layer_load(life->checkpoint, 0, NULL, &life->layer);
    if (status == MOE_OK)
        status = forward(life);
    if (status == MOE_OK)
        status = append(life);
    if (status == MOE_OK)
        status = read_back(life);
    if (status != MOE_OK)
        moe_last_error(life->ctx, text, size);
    moe_session_close(life->session);
    moe_buffer_free(life->ctx, life->workspace);
    moe_layer_destroy(life->layer);
    moe_checkpoint_close(life->checkpoint);
    moe_context_destroy(life->ctx);
    return status;
}

/* Of this CPU, and for the layer: what auto would choose in any case. */
static void write_table(void)
{
    moe_context *ctx;
    moe_device_info device = moe_device_info_init();
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = THREADS;
    assert_int_equal(moe_context_create(&options, &ctx), MOE_OK);
    assert_int_equal(moe_context_device(ctx, &device), MOE_OK);
    moe_context_destroy(ctx);
    write_text("tuned.json",
               "{\"device\": {\"name\": \"%s\", \"compute_capability\": 0, \"cores\": %d}, \"entries\": [{"
               "\"hidden_size\": %d, \"intermediate_size\": %d, \"num_experts\": %d, \"top_k\": %d, \"dtype\": "
               "\"f32\", \"layout\": \"row-major\", \"points\": [{\"tokens\": 1, \"path\": \"cpu\"}]}]}",
               device.name, device.cores, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K);
    snprintf(tuned, sizeof tuned, "%s/tuned.json", directory);
}

/* ---- What must hold after a run ---- */

static int count_files(const char *path)
{
    DIR *dir = opendir(path);
    if (dir == NULL)
        return 0;
    int count = 0;
    for (struct dirent *entry = readdir(dir); entry != NULL; entry = readdir(dir))
        count += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
    closedir(dir);
    return count;
}

static void remove_files(const char *path)
{
    char name[512];
    DIR *dir = opendir(path);
    if (dir == NULL)
        return;
    for (struct dirent *entry = readdir(dir); entry != NULL; entry = readdir(dir)) {
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        unlink(name);
    }
    closedir(dir);
    rmdir(path);
}

static void session_file(const char *name, char path[128])
{
    snprintf(path, 128, "%s/%s", session, name);
}

/* The session holds `count` whole batches, and no other file lies about. */
static void check_session(int count)
{
    char path[128];
    session_file("session.jsonl", path);
    int files = count_files(session);
    if (count == 0 && access(path, F_OK) != 0) {
        assert_int_equal(files, 0);
        return;
    }
    assert_int_equal(files, count + 1);
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    moe_context *ctx;
    moe_session *read;
    moe_record record = moe_record_init();
    assert_int_equal(moe_context_create(&options, &ctx), MOE_OK);
    assert_int_equal(moe_session_open(ctx, session, &read), MOE_OK);
    assert_int_equal(moe_session_count(read), count);
    for (int i = 0; i < count; i++) {
        assert_int_equal(moe_session_read(read, i, &record), MOE_OK);
        assert_int_equal(record.tokens, TOKENS);
        assert_memory_equal(record.hidden_states, hidden_states, sizeof hidden_states);
        assert_memory_equal(record.output, expected, sizeof expected);
    }
    moe_session_close(read);
    moe_context_destroy(ctx);
}

/* Back to what it was before the run. */
static void restore_session(void)
{
    char path[128];
    if (session_bytes == 0) {
        remove_files(session);
        return;
    }
    session_file("batch-000001.safetensors", path);
    unlink(path);
    session_file("session.jsonl", path);
    assert_int_equal(truncate(path, session_bytes), 0);
}

/* One run in which requests [from, to] fail; returns how many requests it made. */
static long run(long from, long to)
{
    static struct life life;
    char text[1024];
    restore_session();
    int descriptors = count_files("/proc/self/fd");
    atomic_store(&first, from);
    atomic_store(&last, to);
    atomic_store(&requests, 0);
    atomic_store(&blocks, 0);
    atomic_store(&bytes, 0);
    atomic_store(&counting, true);
    moe_status status = live(&life, text, sizeof text);
    atomic_store(&counting, false);

    long made = atomic_load(&requests);
    if (status == MOE_OK) {
        assert_memory_equal(life.output, expected, sizeof expected);
    } else if (from == 0 || text[0] == 0 ||
               (status != MOE_ERROR_OUT_OF_MEMORY && strstr(text, strerror(ENOMEM)) == NULL)) {
        fail_msg("requests %ld to %ld failed: status %d (%s), text '%s'", from, to, (int)status,
                 moe_status_string(status), text);
    }
    if (atomic_load(&blocks) != 0 || atomic_load(&bytes) != 0)
        fail_msg("requests %ld to %ld failed: %ld blocks and %ld mapped bytes are left", from, to, atomic_load(&blocks),
                 atomic_load(&bytes));
    assert_int_equal(count_files("/proc/self/fd"), descriptors);
    assert_int_equal(life.forward_requests, 0);
    int before = session_bytes > 0;
    check_session(before + life.appended);
    if (status == MOE_OK)
        assert_int_equal(life.count, before + 1);
    return made;
}

/* ---- Tests ---- */

static void nothing_fails(void **state)
{
    (void)state;
    assert_true(run(0, 0) > 50);
}

static void one_request_fails(void **state)
{
    (void)state;
    for (long n = 1; run(n, n) >= n; n++)
        ;
}

static void all_requests_fail_from_one_on(void **state)
{
    (void)state;
    for (long n = 1; run(n, LONG_MAX) >= n; n++)
        ;
}

/* The same where the shards themselves say what they hold. */
static void without_an_index(void **state)
{
    char path[128];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
    assert_int_equal(unlink(path), 0);
    one_request_fails(state);
    all_requests_fail_from_one_on(state);
}

/* The same on a session that holds a batch, which must survive. */
static void an_older_batch_survives(void **state)
{
    static struct life life;
    char text[1024], path[128];
    struct stat st;
    restore_session();
    assert_int_equal(live(&life, text, sizeof text), MOE_OK);
    session_file("session.jsonl", path);
    assert_int_equal(stat(path, &st), 0);
    session_bytes = st.st_size;
    one_request_fails(state);
    all_requests_fail_from_one_on(state);
}

static int set_up(void **state)
{
    (void)state;
    static struct life life;
    char text[1024];
    const char *temporary = getenv("TMPDIR");
    cJSON_Hooks hooks = {.malloc_fn = __wrap_malloc, .free_fn = __wrap_free}; /* cJSON is a shared library */
    cJSON_InitHooks(&hooks);
    snprintf(directory, sizeof directory, "%s/moe-alloc-XXXXXX", temporary != NULL ? temporary : "/tmp");
    if (mkdtemp(directory) == NULL)
        return -1;
    snprintf(session, sizeof session, "%s/session", directory);
    write_checkpoint();
    write_table();
    moe_status status = live(&life, text, sizeof text);
    remove_files(session);
    if (status != MOE_OK) {
        fprintf(stderr, "without any failure: %s\n", text);
        return -1;
    }
    memcpy(expected, life.output, sizeof expected);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    remove_files(session);
    remove_files(directory);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_fails),
        cmocka_unit_test(one_request_fails),
        cmocka_unit_test(all_requests_fail_from_one_on),
        cmocka_unit_test(without_an_index),
        cmocka_unit_test(an_older_batch_survives),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
