/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loader: a layer's segments, in file order, are cut into chunks; a round is a run of chunks that the context's
 * threads read together. On the CPU a chunk goes from the file straight to its place. On CUDA a round fills one pinned
 * buffer, whose copy to the device runs while the next round is read; if the layer is packed the copy lands beside the
 * weights, and a kernel on the copies' stream puts it into place. What was read stays in the page cache, which is
 * the system's to manage; the process holds one copy of the layer.
 *
 * Rounds are short so that progress is reported, and other calls get the threads, between them.
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "kernels/cpu/pool.h"
#include "runtime/load.h"

#define MB        ((uint64_t)1 << 20)
#define HUGE_PAGE (2 * MB)

/* Whole huge pages from a segment's start on: seldom do two threads clear the same fresh page. */
#define CPU_CHUNK (4 * MB)
/* A pinned buffer, and the piece of it that one thread reads at a time. */
#define STAGE_BYTES (16 * MB)
#define STAGE_CHUNK MB

/* What moe_host_alloc maps: whole huge pages, or small ones where a huge one would be mostly empty. */
static uint64_t mapped_bytes(uint64_t bytes)
{
    uint64_t page = bytes < HUGE_PAGE ? 64 * 1024 : HUGE_PAGE;
    return bytes == 0 ? page : (bytes + page - 1) / page * page;
}

moe_status moe_host_alloc(uint64_t bytes, void **pointer)
{
    *pointer = NULL;
    if (bytes > INT64_MAX)
        return MOE_ERROR_OUT_OF_MEMORY;
    uint64_t length = mapped_bytes(bytes);
    char *base = mmap(NULL, length + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return MOE_ERROR_OUT_OF_MEMORY;
    /* Alignment: more was mapped than needed, both ends go back. */
    uint64_t before = (HUGE_PAGE - (uintptr_t)base % HUGE_PAGE) % HUGE_PAGE;
    if (before > 0)
        munmap(base, before);
    if (before < HUGE_PAGE)
        munmap(base + before + length, HUGE_PAGE - before);
    if (length >= HUGE_PAGE)
        madvise(base + before, length, MADV_HUGEPAGE); /* a wish: small pages work too */
    *pointer = base + before;
    return MOE_OK;
}

void moe_host_free(void *pointer, uint64_t bytes)
{
    if (pointer != NULL)
        munmap(pointer, mapped_bytes(bytes));
}

/* A place in the layer's bytes, in file order. */
struct position {
    const struct moe_segment *segment;
    uint64_t offset; /* in the segment */
};

struct round {
    struct position start;
    uint64_t chunk; /* bytes; the last chunk of a segment may be shorter */
    int64_t chunks;
    void *const *parts; /* where chunks go, */
    char *stage;        /* unless this is set: start goes to stage[0], */
    uint64_t bytes;     /* and the round ends after as many bytes, within one segment */

    atomic_llong next;  /* the first chunk that no thread has taken */
    atomic_bool failed; /* the thread that sets it writes status and error */
    moe_status status;
    struct moe_error error;
};

static uint64_t chunk_bytes(const struct position *at, uint64_t chunk)
{
    uint64_t left = at->segment->bytes - at->offset;
    return left < chunk ? left : chunk;
}

static void step(struct position *at, uint64_t chunk)
{
    at->offset += chunk_bytes(at, chunk);
    if (at->offset == at->segment->bytes) {
        at->segment++;
        at->offset = 0;
    }
}

/* What each thread of a round runs. */
static void read_chunks(void *argument, int32_t thread, int32_t threads)
{
    (void)thread;
    (void)threads;
    struct round *round = argument;
    struct position at = round->start;
    int64_t index = 0; /* of the chunk at `at` */
    for (;;) {
        int64_t mine = atomic_fetch_add(&round->next, 1);
        if (mine >= round->chunks || atomic_load(&round->failed))
            return;
        for (; index < mine; index++)
            step(&at, round->chunk);
        char *to = round->stage != NULL ? round->stage + (at.offset - round->start.offset)
                                        : (char *)round->parts[at.segment->part] + at.segment->part_offset + at.offset;
        uint64_t bytes = chunk_bytes(&at, round->chunk), end = round->start.offset + round->bytes;
        if (round->stage != NULL && bytes > end - at.offset)
            bytes = end - at.offset;
        struct moe_error error = {{0}};
        moe_status status = moe_segment_read(at.segment, at.offset, to, bytes, &error);
        if (status != MOE_OK && !atomic_exchange(&round->failed, true)) {
            round->status = status;
            round->error = error;
        }
    }
}

static moe_status run_round(moe_context *ctx, struct round *round, struct moe_error *err)
{
    atomic_init(&round->next, 0);
    atomic_init(&round->failed, false);
    round->status = MOE_OK;
    if (ctx->exec.pool != NULL && round->chunks > 1)
        moe_pool_run(ctx->exec.pool, read_chunks, round);
    else
        read_chunks(round, 0, 1);
    if (round->status != MOE_OK && err != NULL)
        *err = round->error;
    return round->status;
}

struct progress {
    const moe_load_options *options;
    uint64_t done, total;
};

/* Tells the caller, at most about a hundred times a layer and at its end. */
static void report(struct progress *progress, uint64_t bytes)
{
    uint64_t percent = progress->total / 100 + 1, before = progress->done;
    progress->done += bytes;
    if (progress->options == NULL || progress->options->progress == NULL)
        return;
    if (progress->done / percent != before / percent || progress->done == progress->total)
        progress->options->progress(progress->options->progress_user, progress->done, progress->total);
}

/* Bytes of a round on the CPU: several chunks a thread, so that none idles long at its end. More than 8 threads share
 * the chunks of 8, to report often enough on a large machine. */
static uint64_t cpu_round_bytes(const moe_context *ctx, uint64_t total)
{
    uint64_t threads = ctx->exec.pool != NULL ? (uint64_t)moe_pool_threads(ctx->exec.pool) : 1;
    uint64_t bytes = (threads < 8 ? threads : 8) * 8 * CPU_CHUNK;
    return bytes < total / 100 ? total / 100 : bytes;
}

static moe_status load_cpu(moe_context *ctx, const struct moe_layer_source *source, void *const *parts,
                           struct progress *progress, struct moe_error *err)
{
    uint64_t round_bytes = cpu_round_bytes(ctx, progress->total);
    const struct moe_segment *end = source->segments + source->segment_count;
    struct position at = {source->segments, 0};
    while (at.segment < end) {
        struct round round = {.start = at, .chunk = CPU_CHUNK, .parts = parts};
        uint64_t bytes = 0;
        do {
            bytes += chunk_bytes(&at, CPU_CHUNK);
            round.chunks++;
            step(&at, CPU_CHUNK);
        } while (at.segment < end && bytes < round_bytes);
        moe_status status = run_round(ctx, &round, err);
        if (status != MOE_OK)
            return status;
        report(progress, bytes);
    }
    return MOE_OK;
}

/* Where the bytes of a part go on the device. */
struct target {
    char *data;
    bool packed;
    struct moe_weights_view view; /* if packed */
    uint64_t row_bytes;           /* canonical; if packed */
};

/* A run of bytes of one segment that a pinned buffer holds. Packed: rows in groups of eight, as tensors have them, so
 * that a run never ends within one. */
static uint64_t stage_bytes(const struct target *target, uint64_t buffer)
{
    uint64_t group = 8 * target->row_bytes;
    return target->packed ? buffer / group * group : buffer;
}

static moe_status send_run(struct moe_cuda_stage *stage, const struct target *target, const struct position *at,
                           uint64_t bytes, struct moe_error *err)
{
    const uint64_t offset = at->segment->part_offset + at->offset;
    if (!target->packed)
        return moe_cuda_stage_send(stage, target->data + offset, bytes, err);
    return moe_cuda_stage_pack(stage, &target->view, at->segment->part == MOE_PART_W13,
                               (int64_t)(offset / target->row_bytes), (int64_t)(bytes / target->row_bytes),
                               target->data, err);
}

static moe_status stage_segment(moe_context *ctx, struct moe_cuda_stage *stage, uint64_t buffer,
                                const struct moe_segment *segment, const struct target *target,
                                struct progress *progress, struct moe_error *err)
{
    const uint64_t most = stage_bytes(target, buffer);
    for (struct position at = {segment, 0}; at.segment == segment; step(&at, most)) {
        void *host;
        moe_status status = moe_cuda_stage_next(stage, &host, err);
        if (status != MOE_OK)
            return status;
        uint64_t bytes = chunk_bytes(&at, most);
        struct round round = {.start = at,
                              .chunk = STAGE_CHUNK,
                              .chunks = (int64_t)((bytes + STAGE_CHUNK - 1) / STAGE_CHUNK),
                              .stage = host,
                              .bytes = bytes};
        status = run_round(ctx, &round, err);
        if (status == MOE_OK)
            status = send_run(stage, target, &at, bytes, err);
        if (status != MOE_OK)
            return status;
        report(progress, bytes);
    }
    return MOE_OK;
}

static moe_status load_cuda(moe_context *ctx, const struct moe_layer_source *source, moe_layout layout,
                            void *const *parts, struct progress *progress, struct moe_error *err)
{
    const bool packed = layout == MOE_LAYOUT_PACKED;
    struct target targets[MOE_PART_COUNT];
    uint64_t expert_bytes = 0;
    for (int part = 0; part < MOE_PART_COUNT; part++) {
        struct target *target = &targets[part];
        *target = (struct target){.data = parts[part], .packed = packed && part != MOE_PART_GATE};
        if (!target->packed)
            continue;
        target->view = moe_part_view(&source->desc, (enum moe_part)part, layout, parts[part]);
        target->row_bytes = (uint64_t)target->view.cols * moe_dtype_size(target->view.dtype);
        expert_bytes += (uint64_t)target->view.rows * target->row_bytes;
    }
    /* What has landed and is not in its place yet is held twice: never more than one expert. Either size holds eight
     * rows. */
    const uint64_t buffer = packed && expert_bytes < STAGE_BYTES ? expert_bytes : STAGE_BYTES;
    struct moe_cuda_stage *stage;
    moe_status status = moe_cuda_stage_create(ctx->info.device_index, buffer, packed, &stage, err);
    if (status != MOE_OK)
        return status;
    for (size_t i = 0; i < source->segment_count && status == MOE_OK; i++) {
        const struct moe_segment *segment = &source->segments[i];
        status = stage_segment(ctx, stage, buffer, segment, &targets[segment->part], progress, err);
    }
    /* The first failure is the one to tell. */
    moe_status last = moe_cuda_stage_destroy(stage, status == MOE_OK ? err : NULL);
    return status == MOE_OK ? last : status;
}

moe_status moe_load_parts(moe_context *ctx, const struct moe_layer_source *source, moe_layout layout,
                          void *const parts[MOE_PART_COUNT], const moe_load_options *options, struct moe_error *err)
{
    struct progress progress = {.options = options};
    int file = -1;
    for (size_t i = 0; i < source->segment_count; i++) {
        const struct moe_segment *segment = &source->segments[i];
        progress.total += segment->bytes;
        if (segment->file != file)
            posix_fadvise(segment->file, 0, 0, POSIX_FADV_SEQUENTIAL); /* a longer read-ahead, for cold files */
        file = segment->file;
    }
    if (options != NULL && options->progress != NULL)
        options->progress(options->progress_user, 0, progress.total);
    return ctx->info.device == MOE_DEVICE_CUDA ? load_cuda(ctx, source, layout, parts, &progress, err)
                                               : load_cpu(ctx, source, parts, &progress, err);
}
