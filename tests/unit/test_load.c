/* SPDX-License-Identifier: Apache-2.0 */
/* The loader: every byte of every segment arrives at its place, from any number of threads, straight or through the
 * staging of a device (a stand-in for kernels/cuda/device.c, linked with --wrap). */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/cpu/pool.h"
#include "kernels/packed.h"
#include "runtime/load.h"
#include "tests/unit/files.h"
#include "tests/unit/packer.h"

#define MB ((uint64_t)1 << 20)

/* ---- A layer in two files ---- */

/* Of each part, in the order of the segments that hold it; odd sizes, and larger than any chunk of the loader. */
static const struct {
    int file;
    enum moe_part part;
    uint64_t bytes;
} layout[] = {
    {0, MOE_PART_W13, 9 * MB + 123},  {0, MOE_PART_GATE, 77},         {0, MOE_PART_W2, 1},
    {0, MOE_PART_W13, 33 * MB},       {1, MOE_PART_W2, 4 * MB},       {1, MOE_PART_W13, 4 * MB + 1},
    {1, MOE_PART_W2, 17 * MB + 4095}, {1, MOE_PART_GATE, 2 * MB - 1}, {1, MOE_PART_W2, 3},
};

enum { SEGMENTS = sizeof layout / sizeof *layout };

static char paths[2][128];
static int files[2];
static struct moe_segment segments[SEGMENTS];
static struct moe_layer_source source = {.segments = segments, .segment_count = SEGMENTS};
static void *parts[MOE_PART_COUNT];

/* What byte `i` of segment `s` is. */
static uint8_t pattern(size_t s, uint64_t i)
{
    return (uint8_t)((i * 2654435761u >> 13) ^ (s * 37));
}

static void write_bytes(int fd, uint64_t offset, size_t s, uint64_t bytes)
{
    uint8_t *data = malloc(bytes);
    assert_non_null(data);
    for (uint64_t i = 0; i < bytes; i++)
        data[i] = pattern(s, i);
    assert_int_equal(pwrite(fd, data, bytes, (off_t)offset), bytes);
    free(data);
}

/* Parts are filled from their ends: in file order, destinations go down. */
static int setup_all(void **state)
{
    uint64_t at[2] = {13, 8}, left[MOE_PART_COUNT] = {0};
    if (files_setup(state) != 0)
        return -1;
    for (int f = 0; f < 2; f++) {
        snprintf(paths[f], sizeof paths[f], "%s", files_path(f == 0 ? "shard-1" : "shard-2"));
        files[f] = open(paths[f], O_RDWR | O_CREAT | O_EXCL, 0600);
        if (files[f] < 0)
            return -1;
    }
    for (size_t s = 0; s < SEGMENTS; s++)
        source.part_bytes[layout[s].part] = left[layout[s].part] += layout[s].bytes;
    for (size_t s = 0; s < SEGMENTS; s++) {
        int f = layout[s].file;
        left[layout[s].part] -= layout[s].bytes;
        segments[s] = (struct moe_segment){.file = files[f],
                                           .path = paths[f],
                                           .file_offset = at[f],
                                           .bytes = layout[s].bytes,
                                           .part = layout[s].part,
                                           .part_offset = left[layout[s].part]};
        write_bytes(files[f], at[f], s, layout[s].bytes);
        at[f] += layout[s].bytes + s % 3 * 5; /* other tensors lie between */
    }
    for (int p = 0; p < MOE_PART_COUNT; p++)
        if (moe_host_alloc(source.part_bytes[p], &parts[p]) != MOE_OK)
            return -1;
    return 0;
}

static int teardown_all(void **state)
{
    for (int p = 0; p < MOE_PART_COUNT; p++)
        moe_host_free(parts[p], source.part_bytes[p]);
    for (int f = 0; f < 2; f++)
        close(files[f]);
    return files_teardown(state);
}

static void check_parts(void)
{
    for (size_t s = 0; s < SEGMENTS; s++) {
        const uint8_t *data = (const uint8_t *)parts[segments[s].part] + segments[s].part_offset;
        for (uint64_t i = 0; i < segments[s].bytes; i++)
            if (data[i] != pattern(s, i))
                fail_msg("segment %zu, byte %llu: %d, expected %d", s, (unsigned long long)i, data[i], pattern(s, i));
    }
}

static void clear_parts(void)
{
    for (int p = 0; p < MOE_PART_COUNT; p++)
        memset(parts[p], 0xA5, source.part_bytes[p]);
}

/* ---- Progress ---- */

struct watch {
    pthread_t thread;
    struct moe_pool *pool;
    int calls;
    uint64_t last, total;
};

static void nothing(void *argument, int32_t thread, int32_t threads)
{
    (void)argument;
    (void)thread;
    (void)threads;
}

static void on_progress(void *user, uint64_t done, uint64_t total)
{
    struct watch *watch = user;
    assert_true(pthread_equal(watch->thread, pthread_self()));
    assert_true(watch->calls == 0 ? done == 0 : done > watch->last);
    assert_true(done <= total);
    watch->calls++;
    watch->last = done;
    watch->total = total;
    if (watch->pool != NULL)
        moe_pool_run(watch->pool, nothing, NULL); /* a caller may use the library here: no run may be going on */
}

/* A context as far as the loader looks at it. */
static moe_context *make_context(moe_device device, int32_t threads)
{
    moe_context *ctx = calloc(1, sizeof *ctx);
    assert_non_null(ctx);
    ctx->info.device = ctx->exec.device = device;
    if (threads > 0)
        assert_int_equal(moe_pool_create(threads, &ctx->exec.pool), MOE_OK);
    return ctx;
}

static void free_context(moe_context *ctx)
{
    moe_pool_destroy(ctx->exec.pool);
    free(ctx);
}

static void load_and_check(moe_device device, int32_t threads)
{
    moe_context *ctx = make_context(device, threads);
    struct watch watch = {.thread = pthread_self(), .pool = ctx->exec.pool};
    moe_load_options options = moe_load_options_init();
    options.progress = on_progress;
    options.progress_user = &watch;
    clear_parts();
    assert_int_equal(moe_load_parts(ctx, &source, MOE_LAYOUT_ROW_MAJOR, parts, &options, NULL), MOE_OK);
    check_parts();
    assert_in_range(watch.calls, 2, 102);
    assert_int_equal(watch.last, watch.total);
    assert_int_equal(watch.total, source.part_bytes[0] + source.part_bytes[1] + source.part_bytes[2]);

    clear_parts();
    assert_int_equal(moe_load_parts(ctx, &source, MOE_LAYOUT_ROW_MAJOR, parts, NULL, NULL), MOE_OK);
    check_parts();
    free_context(ctx);
}

/* ---- A device made of host memory ---- */

/* As late as the contract allows: a copy happens when its buffer is asked for again, or at the end. */
struct moe_cuda_stage {
    struct {
        char *host;
        void *device;
        size_t bytes;
        struct moe_weights_view view; /* with rows > 0: packed into `device` */
        bool w13;
        int64_t first, rows;
    } buffers[2];
    size_t bytes;
    bool lands;
    int next;
};

static int stages, sends_left = 1 << 30; /* for failures */
static size_t stage_bytes;               /* of the last one */

moe_status __wrap_moe_cuda_stage_create(int32_t device, size_t bytes, bool lands, struct moe_cuda_stage **stage,
                                        struct moe_error *err);
moe_status __wrap_moe_cuda_stage_next(struct moe_cuda_stage *stage, void **host, struct moe_error *err);
moe_status __wrap_moe_cuda_stage_send(struct moe_cuda_stage *stage, void *device, size_t bytes, struct moe_error *err);
moe_status __wrap_moe_cuda_stage_pack(struct moe_cuda_stage *stage, const struct moe_weights_view *view, bool w13,
                                      int64_t first, int64_t rows, void *packed, struct moe_error *err);
moe_status __wrap_moe_cuda_stage_destroy(struct moe_cuda_stage *stage, struct moe_error *err);

moe_status __wrap_moe_cuda_stage_create(int32_t device, size_t bytes, bool lands, struct moe_cuda_stage **stage,
                                        struct moe_error *err)
{
    (void)device;
    (void)err;
    *stage = calloc(1, sizeof **stage);
    assert_non_null(*stage);
    for (int i = 0; i < 2; i++)
        assert_non_null((*stage)->buffers[i].host = malloc(bytes));
    (*stage)->bytes = stage_bytes = bytes;
    (*stage)->lands = lands;
    stages++;
    return MOE_OK;
}

/* What moe_pack_rows does, but for the padding. */
static void pack_rows(const struct moe_weights_view *view, bool w13, int64_t first, int64_t rows, const char *canonical,
                      char *packed)
{
    for (int64_t row = first; row < first + rows; row++) {
        const int64_t from = row % view->rows, to = w13 ? moe_packed_w13_row(view->rows, from) : from;
        char *expert = packed + (uint64_t)(row / view->rows) * moe_packed_expert_bytes(view->rows, view->cols);
        for (int64_t chunk = 0; chunk < view->cols / 8; chunk++)
            memcpy(expert + moe_packed_offset(view->rows, view->cols, to, chunk),
                   canonical + ((row - first) * view->cols + chunk * 8) * 2, 16);
    }
}

static void finish_copy(struct moe_cuda_stage *stage, int i)
{
    if (stage->buffers[i].rows > 0)
        pack_rows(&stage->buffers[i].view, stage->buffers[i].w13, stage->buffers[i].first, stage->buffers[i].rows,
                  stage->buffers[i].host, stage->buffers[i].device);
    else if (stage->buffers[i].device != NULL)
        memcpy(stage->buffers[i].device, stage->buffers[i].host, stage->buffers[i].bytes);
    stage->buffers[i].device = NULL;
    stage->buffers[i].rows = 0;
}

moe_status __wrap_moe_cuda_stage_next(struct moe_cuda_stage *stage, void **host, struct moe_error *err)
{
    (void)err;
    stage->next = !stage->next;
    finish_copy(stage, stage->next);
    *host = stage->buffers[stage->next].host;
    return MOE_OK;
}

moe_status __wrap_moe_cuda_stage_send(struct moe_cuda_stage *stage, void *device, size_t bytes, struct moe_error *err)
{
    if (sends_left-- == 0)
        return moe_fail(err, MOE_ERROR_DEVICE, "the copy failed");
    assert_in_range(bytes, 1, stage->bytes);
    stage->buffers[stage->next].device = device;
    stage->buffers[stage->next].bytes = bytes;
    return MOE_OK;
}

moe_status __wrap_moe_cuda_stage_pack(struct moe_cuda_stage *stage, const struct moe_weights_view *view, bool w13,
                                      int64_t first, int64_t rows, void *packed, struct moe_error *err)
{
    assert_true(stage->lands);
    assert_int_equal(first % 8, 0);
    assert_int_equal(rows % 8, 0);
    assert_true(first >= 0 && rows > 0 && first + rows <= view->experts * view->rows);
    stage->buffers[stage->next].view = *view;
    stage->buffers[stage->next].w13 = w13;
    stage->buffers[stage->next].first = first;
    stage->buffers[stage->next].rows = rows;
    return __wrap_moe_cuda_stage_send(stage, packed, (size_t)(rows * view->cols) * 2, err);
}

moe_status __wrap_moe_cuda_stage_destroy(struct moe_cuda_stage *stage, struct moe_error *err)
{
    (void)err;
    for (int i = 0; i < 2; i++) {
        finish_copy(stage, i);
        free(stage->buffers[i].host);
    }
    free(stage);
    stages--;
    return MOE_OK;
}

/* ---- Tests ---- */

static void test_host_memory(void **state)
{
    (void)state;
    const uint64_t sizes[] = {0, 1, 4096, 65537, 2 * MB - 1, 2 * MB, 2 * MB + 1, 5 * MB};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        void *pointer;
        assert_int_equal(moe_host_alloc(sizes[i], &pointer), MOE_OK);
        assert_int_equal((uintptr_t)pointer % (2 * MB), 0);
        const char *bytes = pointer;
        for (uint64_t k = 0; k < sizes[i]; k++)
            if (bytes[k] != 0)
                fail_msg("%llu bytes: byte %llu is not zero", (unsigned long long)sizes[i], (unsigned long long)k);
        memset(pointer, 1, sizes[i]);
        moe_host_free(pointer, sizes[i]);
    }
    void *pointer = parts;
    assert_int_equal(moe_host_alloc((uint64_t)1 << 62, &pointer), MOE_ERROR_OUT_OF_MEMORY);
    assert_null(pointer);
    assert_int_equal(moe_host_alloc(UINT64_MAX, &pointer), MOE_ERROR_OUT_OF_MEMORY);
    moe_host_free(NULL, 0);
}

static void test_threads(void **state)
{
    (void)state;
    for (int32_t threads = 0; threads <= 5; threads++) /* 0: no pool */
        load_and_check(MOE_DEVICE_CPU, threads);
}

static void test_stage(void **state)
{
    (void)state;
    for (int32_t threads = 0; threads <= 3; threads++)
        load_and_check(MOE_DEVICE_CUDA, threads);
    assert_int_equal(stages, 0);
}

/* Layers of many small experts: still few reports. */
static void test_small_segments(void **state)
{
    (void)state;
    enum { COUNT = 5000, BYTES = 64 };
    static struct moe_segment small[COUNT];
    static uint8_t expected[COUNT * BYTES], got[COUNT * BYTES];
    struct moe_layer_source many = {.segments = small, .segment_count = COUNT};
    void *places[MOE_PART_COUNT] = {NULL, got, NULL};
    many.part_bytes[MOE_PART_W13] = sizeof got;
    for (size_t s = 0; s < COUNT; s++)
        small[s] = (struct moe_segment){files[0], paths[0], 100 + s * BYTES, BYTES, MOE_PART_W13, s * BYTES};
    assert_int_equal(pread(files[0], expected, sizeof expected, 100), sizeof expected);

    for (int threads = 0; threads <= 2; threads++) {
        for (int device = MOE_DEVICE_CPU; device <= MOE_DEVICE_CUDA; device++) {
            moe_context *ctx = make_context((moe_device)device, threads);
            struct watch watch = {.thread = pthread_self()};
            moe_load_options options = moe_load_options_init();
            options.progress = on_progress;
            options.progress_user = &watch;
            memset(got, 0, sizeof got);
            assert_int_equal(moe_load_parts(ctx, &many, MOE_LAYOUT_ROW_MAJOR, places, &options, NULL), MOE_OK);
            assert_memory_equal(got, expected, sizeof got);
            assert_in_range(watch.calls, 2, 102);
            assert_int_equal(watch.last, sizeof got);
            free_context(ctx);
        }
    }
}

static void expect_failure(moe_device device, moe_status wanted, const char *text)
{
    for (int32_t threads = 0; threads <= 3; threads++) {
        moe_context *ctx = make_context(device, threads);
        struct moe_error err = {{0}};
        assert_int_equal(moe_load_parts(ctx, &source, MOE_LAYOUT_ROW_MAJOR, parts, NULL, &err), wanted);
        if (strstr(err.text, text) == NULL)
            fail_msg("message '%s' does not contain '%s'", err.text, text);
        free_context(ctx);
    }
    assert_int_equal(stages, 0);
}

static void test_failures(void **state)
{
    (void)state;
    /* The second file has lost its end since it was opened. */
    struct moe_segment *last = &segments[SEGMENTS - 1], whole = *last;
    last->file_offset += 1;
    expect_failure(MOE_DEVICE_CPU, MOE_ERROR_FILE, paths[1]);
    expect_failure(MOE_DEVICE_CUDA, MOE_ERROR_FILE, paths[1]);
    *last = whole;

    /* A descriptor that cannot be read. */
    int directory = open("/tmp", O_RDONLY | O_DIRECTORY);
    assert_true(directory >= 0);
    segments[3].file = directory;
    segments[3].path = "shard-7";
    expect_failure(MOE_DEVICE_CPU, MOE_ERROR_FILE, "shard-7");
    expect_failure(MOE_DEVICE_CUDA, MOE_ERROR_FILE, "shard-7");
    segments[3].file = files[0];
    segments[3].path = paths[0];
    close(directory);

    for (int k = 0; k < 4; k++) {
        moe_context *ctx = make_context(MOE_DEVICE_CUDA, k);
        struct moe_error err = {{0}};
        sends_left = k;
        assert_int_equal(moe_load_parts(ctx, &source, MOE_LAYOUT_ROW_MAJOR, parts, NULL, &err), MOE_ERROR_DEVICE);
        assert_string_equal(err.text, "the copy failed");
        assert_int_equal(stages, 0);
        free_context(ctx);
    }
    sends_left = 1 << 30;
    load_and_check(MOE_DEVICE_CPU, 2);
}

/* A layer's file: gate, w13, w2 as checkpoints have them, stacked or expert by expert with the last expert first. */
struct packed_case {
    int32_t experts;
    int64_t hidden, intermediate;
    bool stacked;
};

enum { MAX_EXPERTS = 3 };

static void load_packed(const struct packed_case *c, int fd, const char *path)
{
    const uint64_t half = (uint64_t)(c->intermediate * c->hidden) * 2, gate = (uint64_t)(c->experts * c->hidden) * 2;
    const uint64_t experts = (uint64_t)c->experts, total = gate + 3 * half * experts;
    struct moe_segment list[1 + 3 * MAX_EXPERTS];
    struct moe_layer_source from = {.desc = moe_layer_desc_init(MOE_BF16),
                                    .part_bytes = {gate, 2 * half * experts, half * experts},
                                    .segments = list};
    size_t count = 0;
    uint64_t at = 5; /* files are not aligned */
    from.desc.hidden_size = c->hidden;
    from.desc.intermediate_size = c->intermediate;
    from.desc.num_experts = c->experts;
#define ADD(size, to, offset)                                                                                          \
    do {                                                                                                               \
        list[count++] = (struct moe_segment){fd, path, at, size, to, offset};                                          \
        at += size;                                                                                                    \
    } while (0)
    ADD(gate, MOE_PART_GATE, 0);
    if (c->stacked) {
        ADD(2 * half * experts, MOE_PART_W13, 0);
        ADD(half * experts, MOE_PART_W2, 0);
    } else {
        for (uint64_t e = experts; e-- > 0;) {
            ADD(half, MOE_PART_W13, (2 * e + 1) * half);
            ADD(half, MOE_PART_W2, e * half);
            ADD(half, MOE_PART_W13, 2 * e * half);
        }
    }
#undef ADD
    from.segment_count = count;

    char *file = malloc(total), *canonical = malloc(total);
    assert_true(file != NULL && canonical != NULL);
    for (uint64_t i = 0; i < total; i++)
        file[i] = (char)pattern(1, i);
    assert_int_equal(pwrite(fd, file, total, 5), total);
    uint64_t start[MOE_PART_COUNT] = {0, gate, gate + 2 * half * experts};
    for (size_t i = 0; i < count; i++)
        memcpy(canonical + start[list[i].part] + list[i].part_offset, file + list[i].file_offset - 5, list[i].bytes);

    const uint16_t *w13 = (const uint16_t *)(canonical + start[1]), *w2 = (const uint16_t *)(canonical + start[2]);
    const size_t w13_count = packer_pack(w13, c->experts, 2 * c->intermediate, c->hidden, true, NULL);
    const size_t w2_count = packer_pack(w2, c->experts, c->hidden, c->intermediate, false, NULL);
    uint16_t *expected = malloc((w13_count + w2_count) * 2), *got = malloc((w13_count + w2_count) * 2);
    void *places[MOE_PART_COUNT] = {malloc(gate), got, got + w13_count};
    assert_true(expected != NULL && got != NULL && places[0] != NULL);
    packer_pack(w13, c->experts, 2 * c->intermediate, c->hidden, true, expected);
    packer_pack(w2, c->experts, c->hidden, c->intermediate, false, expected + w13_count);
    for (int32_t threads = 0; threads <= 2; threads++) {
        moe_context *ctx = make_context(MOE_DEVICE_CUDA, threads);
        memset(got, 0, (w13_count + w2_count) * 2);
        assert_int_equal(moe_load_parts(ctx, &from, MOE_LAYOUT_PACKED, places, NULL, NULL), MOE_OK);
        assert_memory_equal(places[0], canonical, gate);
        assert_int_equal(memcmp(got, expected, (w13_count + w2_count) * 2), 0);
        assert_in_range(stage_bytes, 1, 3 * half); /* never more than an expert twice */
        free_context(ctx);
    }
    assert_int_equal(stages, 0);
    free(file);
    free(canonical);
    free(expected);
    free(got);
    free(places[0]);
}

static void test_packed(void **state)
{
    (void)state;
    char path[128];
    snprintf(path, sizeof path, "%s", files_path("packed"));
    /* Stacks are cut within an expert; the last one's expert is larger than a pinned buffer. */
    const struct packed_case cases[] = {
        {3, 40, 24, false},  {3, 40, 24, true},    {3, 136, 72, false},   {3, 136, 72, true},
        {1, 65536, 8, true}, {1, 8, 65536, false}, {1, 2056, 2056, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
        assert_true(fd >= 0);
        load_packed(&cases[i], fd, path);
        close(fd);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_host_memory),    cmocka_unit_test(test_threads), cmocka_unit_test(test_stage),
        cmocka_unit_test(test_small_segments), cmocka_unit_test(test_packed),  cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests(tests, setup_all, teardown_all);
}
