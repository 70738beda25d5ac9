// SPDX-License-Identifier: Apache-2.0
// A grouped GEMM on mma.sync, c[r] = a[row of r] . b[group of r]^T, once for each GEMM of the FFN. Four warps of a
// block find the tiles and fetch: they gather tokens through the plan and read weights, packed or row-major, with
// cp.async into a ring of stages of 64 columns. The other warps multiply, and when a tile is complete they apply the
// activation and store from their registers. Barriers in shared memory count what is there and what has been read:
// nothing stops the whole block, so while one warp stores, the others multiply, and the next tile's operands are on
// their way.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/tiles.h"
#include "kernels/cuda/common/walk.cuh"
#include "kernels/cuda/prefill/mma.cuh"
#include "kernels/cuda/prefill/mma_tile.cuh"

namespace
{

constexpr int COLS = MOE_PACKED_COLS; // of a stage
constexpr int ROW_BYTES = MOE_PACKED_ROW_BYTES;
constexpr int STEPS = COLS / 16; // of 16 columns in a stage
constexpr int FETCHERS = 4 * 32; // threads, a warp on each of the SM's schedulers
constexpr int TILES = 8;         // of which notes are kept: no warp gets more than a ring ahead of another
constexpr int EMPTY = 64, NOTES = 2 * EMPTY, RING = NOTES + TILES * 16; // in shared memory

struct gemm {
    const void *a;          // [..., k]
    const int32_t *a_row;   // [R]: the row of `a` for row r of the plan; NULL: r itself
    const void *b;          // [groups][n][k], GATED: [groups][2n][k]
    void *c;                // [R][n]
    const int32_t *offsets; // [groups + 1]
    int32_t groups, n, k;
    int32_t stages; // that k makes
    bool packed;
};

// What the first fetching thread tells the others at a tile's first stage.
struct alignas(16) note {
    int64_t row;    // of the plan, the tile's first
    int32_t rows;   // of the tile that there are; 0: no more tiles
    int32_t column; // of c, the tile's first
};

// TOKENS x WEIGHTS: the tile, shared out among warps of PART tokens x 64 weights. With those that fetch, eight of them
// make three on each of the SM's schedulers, which leaves 168 registers to a thread: 128 sums of a part of 64 x 64, 24
// of operands, and not much else.
template <typename Type, int TOKENS_, int WEIGHTS_, int PART_, int STAGES_> struct shape {
    typedef Type T;
    typedef mma_part<T, PART_> Part;
    static constexpr int TOKENS = TOKENS_, WEIGHTS = WEIGHTS_, PART = PART_, STAGES = STAGES_;
    static constexpr int ACROSS = WEIGHTS / Part::WEIGHTS;
    static constexpr int WARPS = TOKENS / PART * ACROSS; // that multiply
    static constexpr int THREADS = WARPS * 32 + FETCHERS;
    // Shared memory: a barrier `full` and one `empty` for each stage, notes, stages.
    static constexpr int STAGE_BYTES = (TOKENS + WEIGHTS) * ROW_BYTES;
    static constexpr int SHARED_BYTES = RING + STAGES * STAGE_BYTES;
    static_assert(WARPS * 32 % FETCHERS == 0, "a fetching thread's number is threadIdx.x % FETCHERS");
    static_assert(WEIGHTS % MOE_PACKED_ROWS == 0, "a tile is whole bands");
    static_assert(STAGES * 8 < EMPTY, "barriers must fit");
    static_assert(STAGES + 1 < TILES, "a note lives until the last warp has stored its tile");
};

// A stage: its barriers, and the parity of the ring's round in which it is.
template <class Shape> struct place {
    uint32_t full; // a multiple of EMPTY for the first stage
    uint32_t parity = 0;

    __device__ uint32_t empty() const
    {
        return full + EMPTY;
    }

    // To the next stage; returns by how many bytes that is further on.
    __device__ int next()
    {
        full += 8;
        if (full % EMPTY != Shape::STAGES * 8)
            return Shape::STAGE_BYTES;
        full -= Shape::STAGES * 8;
        parity ^= 1;
        return (1 - Shape::STAGES) * Shape::STAGE_BYTES;
    }
};

// Has v in registers from here on. The compiler would rather work out such values again at each use.
__device__ inline void keep(uint32_t &v)
{
    asm("" : "+r"(v));
}

__device__ inline void keep(const char *&v)
{
    asm("" : "+l"(v));
}

// ---- Fetching ----
//
// Copy i of a thread writes 16 bytes at 2048 i + 16 thread: to row 16 i + thread / 8, place thread % 8. Chunks are
// placed by chunk ^ (row % 8), so a thread fetches the same chunk of all its rows. These warps share the schedulers
// with those that multiply, so the address of a copy is one 32-bit product added to 64 bits, or a constant.

template <class Shape, bool GATED> class fetcher
{
    typedef typename Shape::T T;
    static constexpr int LINES = FETCHERS / 8, COPY_BYTES = LINES * ROW_BYTES; // of copy i of all threads
    static constexpr int A_COPIES = Shape::TOKENS / LINES, B_COPIES = Shape::WEIGHTS / LINES;
    static constexpr uint32_t NO_ROW = UINT32_MAX;

    const gemm &g;
    const int thread = threadIdx.x % FETCHERS, line = thread / 8, chunk = (thread % 8) ^ (line % 8);
    uint32_t row_bytes; // of a, and of row-major b

    uint32_t a_row[A_COPIES]; // NO_ROW: none of this tile
    const char *b;            // copy 0 of the first stage
    int b_rows;               // row-major: from `line` on; packed: from the tile's first on

    __device__ void tokens(uint32_t to, int64_t along, int bytes) const
    {
        const char *a = (const char *)g.a + along + chunk * 16;
        keep(a);
#pragma unroll
        for (int i = 0; i < A_COPIES; i++)
            if (a_row[i] != NO_ROW)
                moe_cp_async_to(to + i * COPY_BYTES, a + (uint64_t)a_row[i] * row_bytes, bytes);
    }

    __device__ void weights_rows(uint32_t to, int64_t along, int bytes) const
    {
        const uint32_t step = row_bytes * (GATED ? LINES / 2 : LINES);
        const char *from = b + along;
        keep(from);
#pragma unroll
        for (int i = 0; i < B_COPIES; i++)
            if (i * LINES < b_rows)
                moe_cp_async_to(to + i * COPY_BYTES, from + (uint64_t)step * i, bytes);
    }

    // Tiles of 128 rows, or of 64 at an expert's end, lie in memory as in the ring.
    __device__ void weights_packed(uint32_t to, int stage) const
    {
        constexpr int HALF = MOE_PACKED_LAST_ROWS / LINES; // copies
        const int64_t band_bytes = moe_packed_blocks(g.k) * MOE_PACKED_TILE_BYTES;
#pragma unroll
        for (int band = 0; band < Shape::WEIGHTS / MOE_PACKED_ROWS; band++) {
            const int left = b_rows - band * MOE_PACKED_ROWS, rows = left < MOE_PACKED_ROWS ? left : MOE_PACKED_ROWS;
            const char *from = b + band * band_bytes + (int64_t)stage * rows * ROW_BYTES;
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (half * MOE_PACKED_LAST_ROWS < rows)
#pragma unroll
                    for (int i = half * HALF; i < half * HALF + HALF; i++)
                        moe_cp_async_to(to + band * MOE_PACKED_TILE_BYTES + i * COPY_BYTES, from + i * COPY_BYTES, 16);
        }
    }

  public:
    __device__ explicit fetcher(const gemm &product) : g(product), row_bytes(product.k * sizeof(T))
    {
        keep(row_bytes);
    }

    // Turns to the tile of `group` that the note describes.
    __device__ void tile(int32_t group, const note &n)
    {
        const int64_t rows = (int64_t)g.n * (GATED ? 2 : 1), first = n.column * (GATED ? 2 : 1);
        if (g.packed) {
            b_rows = (int)(moe_packed_rows(rows) - first);
            b = (const char *)g.b + group * moe_packed_expert_bytes(rows, g.k) +
                first * moe_packed_blocks(g.k) * ROW_BYTES + thread * 16;
        } else {
            // In the packed order, eight gate rows and eight up rows.
            const int64_t row = GATED ? n.column + line % 8 + (int64_t)(line / 8) * g.n : n.column + line;
            b_rows = (int)(rows - first) - line;
            b = (const char *)g.b + (group * rows + row) * row_bytes + chunk * 16;
        }
#pragma unroll
        for (int i = 0; i < A_COPIES; i++) {
            const int r = i * LINES + line;
            a_row[i] = r >= n.rows ? NO_ROW : g.a_row ? g.a_row[n.row + r] : (uint32_t)(n.row + r);
        }
    }

    // Starts the copies of the tile's stage number `stage` to `to`. Past the last column there are zeros.
    __device__ void start(uint32_t to, int stage) const
    {
        const int64_t along = (int64_t)stage * ROW_BYTES;
        const int bytes = stage * COLS + chunk * 8 < g.k ? 16 : 0;
        to += thread * 16;
        if (g.packed)
            weights_packed(to + Shape::TOKENS * ROW_BYTES, stage);
        else
            weights_rows(to + Shape::TOKENS * ROW_BYTES, along, bytes);
        tokens(to, along, bytes);
    }
};

template <class Shape, bool GATED> __device__ void fetch(const gemm &g, char *shared, uint32_t base)
{
    constexpr int WIDTH = GATED ? Shape::WEIGHTS / 2 : Shape::WEIGHTS; // of a tile in c
    note *notes = (note *)(shared + NOTES);
    const bool first_thread = threadIdx.x % FETCHERS == 0;
    const int64_t columns = (g.n + WIDTH - 1) / WIDTH;
    fetcher<Shape, GATED> copies(g);
    moe_tile_walk walk;
    place<Shape> at = {base};
    uint32_t to = base + RING;

    // Each thread's copies so far count, and one arrival more, because theirs says nothing of the note.
    auto done = [&]() {
        moe_barrier_arrive_cp_async(at.full);
        if (first_thread)
            moe_barrier_arrive(at.full);
        to += at.next();
    };

    int tiles = 0;
    for (int64_t tile = blockIdx.x; moe_find_group(g.offsets, g.groups, Shape::TOKENS, columns, tile, walk);
         tile += gridDim.x, tiles++) {
        const int64_t first = g.offsets[walk.group], count = g.offsets[walk.group + 1] - first;
        int64_t row_tile, column;
        moe_place_tile(tile - walk.before, (count + Shape::TOKENS - 1) / Shape::TOKENS, columns, &row_tile, &column);
        const int64_t before = row_tile * Shape::TOKENS, left = count - before;
        const note n = {first + before, (int32_t)(left < Shape::TOKENS ? left : Shape::TOKENS),
                        (int32_t)(column * WIDTH)};
        copies.tile(walk.group, n);
        for (int stage = 0; stage < g.stages; stage++) {
            moe_barrier_wait(at.empty(), at.parity ^ 1);
            if (stage == 0 && first_thread)
                notes[tiles % TILES] = n;
            copies.start(to, stage);
            done();
        }
    }
    moe_barrier_wait(at.empty(), at.parity ^ 1);
    if (first_thread)
        notes[tiles % TILES].rows = 0;
    done();
}

// ---- Multiplying ----
//
// A warp without rows in a tile only keeps count.

// The tokens and weights of a tile that are warp `warp`'s part.
template <class Shape> __device__ inline int first_token(int warp)
{
    return warp / Shape::ACROSS * Shape::PART;
}

template <class Shape> __device__ inline int first_weight(int warp)
{
    return warp % Shape::ACROSS * Shape::Part::WEIGHTS;
}

template <class Shape, bool GATED> __device__ void store(const gemm &g, const note &n, const typename Shape::Part &part)
{
    const int warp = moe_thread_again() / 32, token = first_token<Shape>(warp), weight = first_weight<Shape>(warp);
    const int column = n.column + (GATED ? weight / 2 : weight);
    typename Shape::T *c = (typename Shape::T *)g.c + (n.row + token) * g.n + column;
    part.template store<GATED>(c, g.n, n.rows - token, g.n - column, moe_thread_again() % 32);
}

template <class Shape, bool GATED> __device__ void multiply(const gemm &g, const char *shared, uint32_t base)
{
    typedef typename Shape::Part Part;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const note *notes = (const note *)(shared + NOTES);
    place<Shape> at = {base};
    uint32_t tokens = base + RING + first_token<Shape>(warp) * ROW_BYTES + Part::token_place(lane);
    uint32_t weights = base + RING + (Shape::TOKENS + first_weight<Shape>(warp)) * ROW_BYTES + Part::weight_place(lane);

    // This warp has read all of a stage; then it waits for the next one. There always is one: the last has the note
    // that ends all.
    auto next_stage = [&]() {
        moe_barrier_arrive(at.empty()); // each lane for itself
        const int bytes = at.next();
        tokens += bytes;
        weights += bytes;
        moe_barrier_wait(at.full, at.parity);
    };

    Part part;
    moe_barrier_wait(at.full, at.parity);
    for (int tile = 0;; tile++) {
        const int rows = notes[tile % TILES].rows;
        if (rows == 0)
            return;
        if (rows <= first_token<Shape>(moe_thread_again() / 32)) {
            for (int stage = 0; stage < g.stages; stage++)
                next_stage();
            continue;
        }
        part.clear();
        part.begin(tokens);
        for (int left = g.stages; left > 0; left--) {
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                part.step(tokens, weights, [&]() {
                    const uint32_t other = (k ^ ((k + 1) % STEPS)) * 32;
                    tokens ^= other;
                    weights ^= other;
                    if (k == STEPS - 1)
                        next_stage();
                });
        }
        store<Shape, GATED>(g, notes[tile % TILES], part);
    }
}

template <class Shape, bool GATED> __global__ void __launch_bounds__(Shape::THREADS, 1) mma_kernel(const gemm g)
{
    extern __shared__ __align__(128) char shared[];

    uint32_t base = moe_shared(shared);
    keep(base);
    if (GATED) // else the plan is to be complete when the next kernel starts
        moe_grid_launch_dependents();
    if (threadIdx.x < Shape::STAGES) {
        moe_barrier_init(base + threadIdx.x * 8, FETCHERS + 1);
        moe_barrier_init(base + EMPTY + threadIdx.x * 8, Shape::WARPS * 32);
    }
    __syncthreads();
    moe_grid_wait();
    if (!GATED)
        moe_grid_launch_dependents();
    if (threadIdx.x >= Shape::WARPS * 32)
        fetch<Shape, GATED>(g, shared, base);
    else
        multiply<Shape, GATED>(g, shared, base);
}

// ---- Host ----

template <class Shape, bool GATED> moe_status launch(const struct moe_call *call, const gemm &g, const char *name)
{
    const int64_t pairs = call->tokens * call->slots;
    const int64_t row_tiles = moe_max_tiles(pairs, g.groups, Shape::TOKENS);
    const int64_t columns = moe_ceil_div(g.n, GATED ? Shape::WEIGHTS / 2 : Shape::WEIGHTS);
    const unsigned grid = moe_grid(row_tiles * columns, call->max_sms, call->exec->sms, 1);

    cudaFuncSetAttribute(mma_kernel<Shape, GATED>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::SHARED_BYTES);
    moe_launch(mma_kernel<Shape, GATED>, grid, Shape::THREADS, Shape::SHARED_BYTES, call->stream,
               call->exec->compute_capability == 90, g);
    return moe_launched(call->error, name);
}

template <class Shape> moe_status both(const struct moe_call *call)
{
    const struct moe_plan &plan = call->plan.plan;
    const int32_t groups = call->plan.groups, h = (int32_t)call->hidden, i = (int32_t)call->intermediate;
    const bool packed13 = call->w13.layout == MOE_LAYOUT_PACKED, packed2 = call->w2.layout == MOE_LAYOUT_PACKED;
    const gemm gemm1 = {call->x, plan.row_token,        call->w13.data, call->act, plan.offsets, groups, i,
                        h,       (h + COLS - 1) / COLS, packed13};
    const gemm gemm2 = {call->act, NULL, call->w2.data,         call->down, plan.offsets, groups,
                        h,         i,    (i + COLS - 1) / COLS, packed2};

    const moe_status status = launch<Shape, true>(call, gemm1, "gemm1 mma");
    return status != MOE_OK ? status : launch<Shape, false>(call, gemm2, "gemm2 mma");
}

// From best to least. Weights are re-read from shared memory once for every PART tokens and tokens once for every 64
// weight rows: parts of 64 x 64 are what the registers hold. A wide tile costs the least traffic from L2: what fits
// decides. Groups of few rows are bound by reading weights, and parts of 32 tokens skip more of a tile that has no
// rows.
struct choice {
    const char *name;
    int64_t rows; // for groups of up to this many on average
    int shared_bytes;
    moe_status (*bf16)(const struct moe_call *call);
    moe_status (*f16)(const struct moe_call *call);
};

template <int TOKENS, int WEIGHTS, int PART, int STAGES> constexpr choice make(const char *name, int64_t rows)
{
    typedef shape<__nv_bfloat16, TOKENS, WEIGHTS, PART, STAGES> bf16;
    typedef shape<__half, TOKENS, WEIGHTS, PART, STAGES> f16;
    return {name, rows, bf16::SHARED_BYTES, both<bf16>, both<f16>};
}

constexpr choice choices[] = {
    make<64, 256, 32, 4>("mma-64x256x4", 32),          // 160 KB: 8.0, 9.0
    make<64, 128, 32, 4>("mma-64x128x4", 32),          // 96 KB: 8.6, 8.9
    make<128, 256, 64, 3>("mma-128x256x3", INT64_MAX), // 144 KB: 8.0, 9.0
    make<128, 128, 64, 3>("mma-128x128x3", INT64_MAX), // 96 KB
};
constexpr int CHOICES = sizeof choices / sizeof choices[0];
static_assert(choices[CHOICES - 1].shared_bytes <= 99 * 1024, "the last one fits every GPU from 8.0 on");

} // namespace

const char *moe_mma_tile_name(int32_t tile)
{
    return tile >= 1 && tile <= CHOICES ? choices[tile - 1].name : NULL;
}

moe_status moe_mma_tile_check(const struct moe_exec *exec, int32_t tile, struct moe_error *why)
{
    if (tile == 0 || exec->shared_bytes >= choices[tile - 1].shared_bytes)
        return MOE_OK;
    return moe_fail(why, MOE_ERROR_UNSUPPORTED,
                    "prefill configuration '%s' takes %d bytes of shared memory, this GPU has %d a block",
                    choices[tile - 1].name, choices[tile - 1].shared_bytes, (int)exec->shared_bytes);
}

moe_status moe_ffn_prefill_mma(const struct moe_call *call, int32_t tile)
{
    if (call->tokens == 0)
        return MOE_OK;

    const int64_t rows = call->tokens * call->slots / call->plan.groups;
    int i = tile > 0 ? tile - 1 : 0;
    if (tile == 0)
        while (i < CHOICES - 1 && (rows > choices[i].rows || call->exec->shared_bytes < choices[i].shared_bytes))
            i++;
    return call->dtype == MOE_F16 ? choices[i].f16(call) : choices[i].bf16(call);
}
