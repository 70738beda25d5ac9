/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A run has two phases with a barrier between. First the threads pack the rows of x, in pieces of at most two vectors
 * of tokens. Then they compute jobs, taken one by one: some weight rows of a group by up to TOKENS of its rows.
 *
 * A piece with many tokens is a panel, with few it is rows for dot(). Which one it is depends on the plan alone and
 * every sum is of one thread, so that results depend neither on the number of threads nor on timing.
 *
 * Scratch: per group tables │ packed rows of x, a slot each │ for each thread: block of weights, tile of sums
 */
#include "kernels/cpu/gemm.h"

enum {
    ALIGNMENT = 64,
    TOKENS = 256,  /* of a job: packed, a MOE_CPU_DEPTH of them fits in half a MiB of L2 */
    JOB_ROWS = 48, /* of a job, gate and up together: how often a panel in L2 is used */
    TILE_COLUMNS = TOKENS + MOE_CPU_LANES,
    TILE_ROWS = JOB_ROWS + MOE_CPU_LANES, /* write() reads whole squares */
    BLOCK_FLOATS = MOE_CPU_BLOCK_ROWS * MOE_CPU_STRIDE,
    TILE_FLOATS = TILE_ROWS * TILE_COLUMNS,
};

/* Where the jobs, pieces and slots of a group begin. */
struct start {
    int64_t job, piece, slot;
};

struct run {
    const struct moe_cpu_gemm *gemm;
    const struct moe_cpu_ops *ops;
    const struct moe_cpu_product *product;
    struct moe_pool *pool;
    int64_t units; /* of the depth, padded: the size of a slot */
    size_t weight_row_bytes;
    int32_t parts;        /* 2: gate and up */
    int64_t job_width;    /* columns of the output that a job computes */
    struct start *starts; /* [G + 1] */
    float *packed;        /* [slots][units] */
    float *private;       /* [threads][BLOCK_FLOATS + TILE_FLOATS] */
};

/* A job: columns [column, column + width) of the output for rows [row, row + tokens) of x, all of one group. */
struct job {
    int64_t row, tokens, column, width;
    const char *weights; /* row `column` of the group's first part */
    const float *packed;
};

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t align(int64_t bytes)
{
    return divide_up(bytes, ALIGNMENT) * ALIGNMENT;
}

/* Whether a piece of `count` tokens is a panel. If not, it is rows for dot(), which cost more than idle lanes where
 * these are less than a quarter. */
static bool is_panel(const struct moe_cpu_ops *ops, int64_t count)
{
    return 2 * count > 3 * ops->lanes;
}

/* Slots of `count` rows of a group. */
static int64_t slots_of(const struct moe_cpu_ops *ops, int64_t count)
{
    const int64_t piece = 2 * ops->lanes, rest = count % piece;

    return count - rest + (is_panel(ops, rest) ? piece : rest);
}

size_t moe_cpu_gemm_scratch(int32_t threads, int64_t rows, int32_t groups, int64_t depth)
{
    /* Only the last panel of a group has idle lanes, and less than half a vector of them. */
    int64_t with_rows = rows < groups ? rows : groups;
    int64_t slots = rows + with_rows * (MOE_CPU_LANES / 2);

    return (size_t)(align((groups + 1) * (int64_t)sizeof(struct start)) +
                    slots * divide_up(depth, MOE_CPU_PAD) * MOE_CPU_PAD * (int64_t)sizeof(float) +
                    threads * (int64_t)(BLOCK_FLOATS + TILE_FLOATS) * (int64_t)sizeof(float));
}

static int64_t column_jobs(const struct run *run)
{
    return divide_up(run->gemm->width, run->job_width);
}

static void fill_starts(struct run *run)
{
    const int32_t *offsets = run->gemm->offsets;
    struct start at = {0, 0, 0};

    for (int32_t g = 0; g < run->gemm->groups; g++) {
        int64_t count = offsets[g + 1] - offsets[g];
        run->starts[g] = at;
        at.job += divide_up(count, TOKENS) * column_jobs(run);
        at.piece += divide_up(count, 2 * run->ops->lanes);
        at.slot += slots_of(run->ops, count);
    }
    run->starts[run->gemm->groups] = at;
}

static void pack_piece(const struct run *run, int32_t group, int64_t piece)
{
    const struct moe_cpu_gemm *gemm = run->gemm;
    const size_t row_bytes = (size_t)gemm->depth * moe_dtype_size(gemm->x_dtype);
    const int64_t first = gemm->offsets[group] + piece * 2 * run->ops->lanes, end = gemm->offsets[group + 1];
    const int32_t count = end - first < 2 * run->ops->lanes ? (int32_t)(end - first) : 2 * run->ops->lanes;
    const void *rows[2 * MOE_CPU_LANES];
    float *to = run->packed + (run->starts[group].slot + piece * 2 * run->ops->lanes) * run->units;

    for (int32_t i = 0; i < count; i++)
        rows[i] =
            (const char *)gemm->x + (size_t)(gemm->x_rows != NULL ? gemm->x_rows[first + i] : first + i) * row_bytes;
    if (is_panel(run->ops, count))
        run->product->pack_panel(to, rows, count, gemm->x_dtype, gemm->depth);
    else
        run->product->pack_rows(to, rows, count, gemm->x_dtype, gemm->w.dtype, gemm->depth);
}

static void pack_all(const struct run *run)
{
    const int64_t pieces = run->starts[run->gemm->groups].piece;
    int32_t group = 0;

    for (int64_t p = moe_pool_next(run->pool, 1); p < pieces; p = moe_pool_next(run->pool, 1)) {
        while (p >= run->starts[group + 1].piece)
            group++;
        pack_piece(run, group, p - run->starts[group].piece);
    }
}

/* Jobs of a group go through the tokens of one set of weight rows before the next. *group only ever grows. */
static struct job job_at(const struct run *run, int32_t *group, int64_t number)
{
    const struct moe_cpu_gemm *gemm = run->gemm;

    while (number >= run->starts[*group + 1].job)
        ++*group;
    const struct start *start = &run->starts[*group];
    int64_t count = gemm->offsets[*group + 1] - gemm->offsets[*group];
    int64_t token_jobs = divide_up(count, TOKENS);
    int64_t first = (number - start->job) % token_jobs * TOKENS;
    int64_t column = (number - start->job) / token_jobs * run->job_width;

    return (struct job){
        .row = gemm->offsets[*group] + first,
        .tokens = count - first < TOKENS ? count - first : TOKENS,
        .column = column,
        .width = gemm->width - column < run->job_width ? gemm->width - column : run->job_width,
        .weights = (const char *)gemm->w.data + (size_t)(*group * gemm->w.rows + column) * run->weight_row_bytes,
        .packed = run->packed + (start->slot + first) * run->units,
    };
}

/* The blocks of a job, numbered in the order of work: depth by depth, in each part by part, in each rows by rows. */
struct block {
    int32_t part;
    int64_t row, rows;   /* of the part */
    int64_t depth_block; /* of MOE_CPU_DEPTH units */
    struct moe_cpu_weights weights;
};

static int64_t blocks_of(const struct run *run, const struct job *job)
{
    return divide_up(run->units, MOE_CPU_DEPTH) * run->parts * divide_up(job->width, run->ops->block_rows);
}

static struct block block_at(const struct run *run, const struct job *job, int64_t number)
{
    const struct moe_cpu_gemm *gemm = run->gemm;
    const int64_t row_blocks = divide_up(job->width, run->ops->block_rows);
    struct block b;

    b.row = number % row_blocks * run->ops->block_rows;
    b.rows = job->width - b.row < run->ops->block_rows ? job->width - b.row : run->ops->block_rows;
    b.part = (int32_t)(number / row_blocks % run->parts);
    b.depth_block = number / row_blocks / run->parts;
    b.weights.dtype = gemm->w.dtype;
    b.weights.row_bytes = run->weight_row_bytes;
    b.weights.data = job->weights + (size_t)(b.part * gemm->width + b.row) * run->weight_row_bytes +
                     (size_t)(b.depth_block * MOE_CPU_DEPTH * run->product->per_unit) * moe_dtype_size(gemm->w.dtype);
    return b;
}

/* The panels of a job: each block of weights is brought into a padded buffer and multiplied with all panels, during the
 * first of which the block that comes next is fetched. */
static void run_panels(const struct run *run, const struct job *job, const struct job *next, float *block, float *tile,
                       int64_t ldc)
{
    const struct moe_cpu_product *product = run->product;
    const int32_t piece = 2 * run->ops->lanes;
    const int64_t blocks = blocks_of(run, job);

    for (int64_t number = 0; number < blocks; number++) {
        struct block b = block_at(run, job, number);
        struct block after = {0};
        if (number + 1 < blocks)
            after = block_at(run, job, number + 1);
        else if (next != NULL)
            after = block_at(run, next, 0);
        struct moe_cpu_ahead ahead = {after.weights.data, run->weight_row_bytes,
                                      moe_dtype_size(run->gemm->w.dtype) * (size_t)product->per_unit};

        const int64_t from = b.depth_block * MOE_CPU_DEPTH;
        const int64_t units = run->units - from < MOE_CPU_DEPTH ? run->units - from : MOE_CPU_DEPTH;
        const int64_t elements = run->gemm->depth - from * product->per_unit;
        product->load(block, &b.weights, (int32_t)b.rows,
                      elements < units * product->per_unit ? elements : units * product->per_unit);

        float *c = tile + (b.part * run->job_width + b.row) * ldc;
        for (int64_t t = 0; t < job->tokens && is_panel(run->ops, job->tokens - t); t += piece) {
            product->tile(c + t, ldc, block, job->packed + t * run->units + from * piece, units, from > 0, &ahead);
            ahead.data = NULL;
        }
    }
}

/* The last piece of a job, if it is not a panel. After the last weights of a job come those of `next`. */
static void run_dots(const struct run *run, const struct job *job, const struct job *next, float *tile, int64_t ldc)
{
    const int64_t piece = 2 * run->ops->lanes, whole = job->tokens / piece * piece;
    const int32_t rest = (int32_t)(job->tokens - whole);

    if (rest == 0 || is_panel(run->ops, rest))
        return;
    for (int32_t part = 0; part < run->parts; part++) {
        struct moe_cpu_weights w = {job->weights + (size_t)(part * run->gemm->width) * run->weight_row_bytes,
                                    run->weight_row_bytes, run->gemm->w.dtype};
        const char *after = next != NULL ? next->weights : w.data;
        if (part + 1 < run->parts)
            after = w.data + (size_t)run->gemm->width * run->weight_row_bytes;
        run->product->dot(tile + part * run->job_width * ldc + whole, ldc, &w, job->width,
                          job->packed + whole * run->units, rest, run->gemm->depth, after);
    }
}

static void run_job(const struct run *run, const struct job *job, const struct job *next, float *block, float *tile)
{
    const struct moe_cpu_gemm *gemm = run->gemm;
    const int64_t ldc = divide_up(job->tokens, 2 * run->ops->lanes) * 2 * run->ops->lanes + MOE_CPU_LANES;
    char *out = (char *)gemm->out + (size_t)(job->row * gemm->width + job->column) * moe_dtype_size(gemm->out_dtype);

    if (is_panel(run->ops, job->tokens))
        run_panels(run, job, next, block, tile, ldc);
    run_dots(run, job, next, tile, ldc);
    if (gemm->gated)
        run->ops->silu(out, gemm->out_dtype, gemm->width, tile, tile + run->job_width * ldc, ldc, job->width,
                       job->tokens);
    else
        run->ops->write((float *)out, gemm->width, tile, ldc, job->width, job->tokens);
}

static void run_thread(void *argument, int32_t thread, int32_t threads)
{
    const struct run *run = argument;
    const int64_t jobs = run->starts[run->gemm->groups].job;
    float *block = run->private + (int64_t)thread * (BLOCK_FLOATS + TILE_FLOATS), *tile = block + BLOCK_FLOATS;
    int32_t group = 0;
    (void)threads;

    pack_all(run);
    moe_pool_barrier(run->pool);

    /* One job is taken ahead, so that its weights can be fetched. */
    int64_t number = moe_pool_next(run->pool, 1);
    struct job job = {0}, next = {0};
    if (number < jobs)
        job = job_at(run, &group, number);
    while (number < jobs) {
        int64_t next_number = moe_pool_next(run->pool, 1);
        if (next_number < jobs)
            next = job_at(run, &group, next_number);
        run_job(run, &job, next_number < jobs ? &next : NULL, block, tile);
        number = next_number;
        job = next;
    }
}

void moe_cpu_gemm_run(const struct moe_cpu_gemm *gemm, struct moe_pool *pool)
{
    const struct moe_cpu_ops *ops = moe_cpu_ops();
    const bool pairs = ops->bf16.tile != NULL && gemm->x_dtype == MOE_BF16 && gemm->w.dtype == MOE_BF16;
    struct run run = {
        .gemm = gemm,
        .ops = ops,
        .product = pairs ? &ops->bf16 : &ops->f32,
        .pool = pool,
        .weight_row_bytes = (size_t)gemm->depth * moe_dtype_size(gemm->w.dtype),
        .parts = gemm->gated ? 2 : 1,
        .job_width = gemm->gated ? JOB_ROWS / 2 : JOB_ROWS,
    };
    const int64_t units = divide_up(gemm->depth, run.product->per_unit);
    char *at = gemm->scratch;

    run.units = divide_up(units, MOE_CPU_PAD) * MOE_CPU_PAD;
    run.starts = (struct start *)at;
    fill_starts(&run);
    at += align((gemm->groups + 1) * (int64_t)sizeof(struct start));
    run.packed = (float *)at;
    at += run.starts[gemm->groups].slot * run.units * (int64_t)sizeof(float);
    run.private = (float *)at;
    if (run.starts[gemm->groups].job > 0)
        moe_pool_run(pool, run_thread, &run);
}
