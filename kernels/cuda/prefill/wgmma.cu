// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM of compute capability 9.0 on the host: its tiles, its scratch memory, its tensor maps, the launches.
#include "kernels/cuda/prefill/wgmma.cuh"

#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/tensor_map.h"
#include "kernels/cuda/common/tiles.h"
#include "kernels/cuda/common/weight_map.h"
#include "kernels/cuda/prefill/wgmma_kernel.cuh"

namespace
{

// ---- Tiles ----

struct choice {
    const char *name;
    int nmax;
    bool ordered; // GEMM 1's tokens are put into plan order first
    int blocks;   // that take an item together
    int joint;    // rows of a group up to which these take its two tiles as one
    bool cuts;    // the last items, where they are long
    moe_status (*bf16)(const ffn_args &args, unsigned grid, bool dependent, cudaStream_t stream, struct moe_error *err);
    moe_status (*f16)(const ffn_args &args, unsigned grid, bool dependent, cudaStream_t stream, struct moe_error *err);
};

template <typename T, class Shape>
moe_status launch(const ffn_args &args, unsigned grid, bool dependent, cudaStream_t stream, struct moe_error *err)
{
    cudaFuncSetAttribute(ffn_kernel<T, Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES);
    moe_launch_cluster(ffn_kernel<T, Shape>, Shape::BLOCKS, grid, FFN_THREADS, Shape::BYTES, stream, dependent, args);
    return moe_launched(err, "ffn prefill");
}

using rows_192 = ffn_shape<192, 4, true, false>;
constexpr int SUM_BYTES = rows_192::SUM_BYTES;

template <class Shape> constexpr choice make_choice(const char *name)
{
    static_assert(Shape::SUM_BYTES == SUM_BYTES || !Shape::CUTS, "the workspace is the same for all tiles");
    return {name,
            Shape::NMAX,
            Shape::ORDERED,
            Shape::BLOCKS,
            Shape::JOINT,
            Shape::CUTS,
            launch<__nv_bfloat16, Shape>,
            launch<__half, Shape>};
}

enum { TILE_128 = 1, TILE_192, TILE_192_ROWS, TILE_192_PAIR, TILES = TILE_192_PAIR };
const choice choices[TILES] = {
    make_choice<ffn_shape<128, 4, false, false>>("wgmma-128"), // the smallest comes first
    make_choice<ffn_shape<192, 4, false, false>>("wgmma-192"),
    make_choice<rows_192>("wgmma-192-rows"),
    make_choice<ffn_shape<192, 4, true, true>>("wgmma-192-pair"),
};

// Whether putting the tokens into plan order takes less time than it saves: a launch, and reading each token and
// writing each row once, against the share of its products by which GEMM 1 is longer when threads gather its tokens.
// That share grows with intermediate, what is moved does not. Seconds on an H200.
bool ordering_pays(const struct moe_call *call)
{
    constexpr double LAUNCH = 2e-6, BYTES_A_SECOND = 4e12, GATHER = 0.08, FLOPS = 620e12;
    const double tokens = (double)call->tokens, rows = tokens * call->slots, hidden = (double)call->hidden;
    const double copy = LAUNCH + (tokens + rows) * hidden * 2 / BYTES_A_SECOND;
    return copy < GATHER * rows * hidden * (double)call->intermediate * 4 / FLOPS;
}

// As many as there may be.
int32_t blocks_of(const struct moe_call *call)
{
    return call->max_sms > 0 && call->max_sms < call->exec->sms ? call->max_sms : call->exec->sms;
}

// Whether on average no more than one tile has the rows of a group: then each weight is read once, from memory.
bool reads_once(const struct moe_call *call)
{
    return call->tokens * call->slots <= (int64_t)choices[TILE_192 - 1].nmax * call->plan.groups;
}

// Tiles asked for before the routing is known, of each of a block's two bands. With more of them the routing waits
// longer for what it reads than the weights are there sooner.
constexpr int GUESSED_TILES = 2;

moe_items items_of(const struct moe_call *call, const choice &chosen)
{
    return moe_items_make(call->plan.groups, chosen.nmax, (int32_t)moe_ceil_div(2 * call->intermediate, MOE_BAND_ROWS),
                          (int32_t)moe_ceil_div(call->hidden, MOE_BAND_ROWS), chosen.blocks, chosen.joint);
}

int64_t max_tiles(const struct moe_call *call, const choice &chosen)
{
    return moe_max_tiles(call->tokens * call->slots, call->plan.groups, chosen.nmax);
}

// ---- Items that are cut (items.h) ----

// Blocks of K in GEMM 2 from which on its last items may be cut into two slices, and into up to four: what a slice
// leaves is written and read, which takes as long as some blocks.
constexpr int TWO_SLICES = 40, FOUR_SLICES = 96;
static_assert(TWO_SLICES / 2 - 1 >= WARPGROUP / 32 && FOUR_SLICES / MOST_SLICES - (MOST_SLICES - 1) >= WARPGROUP / 32,
              "each loading warp has a block of every slice, of the last one too, which is a little shorter");

int32_t most_slices(const struct moe_call *call)
{
    const int64_t blocks = moe_packed_blocks(call->intermediate);
    return blocks >= FOUR_SLICES ? MOST_SLICES : blocks >= TWO_SLICES ? 2 : 1;
}

// How many slices can leave their sums: one for each SM, but with no more than 7 MB and a twelfth of what act and down
// take. With more tokens it is not less.
int64_t room_for_sums(const struct moe_call *call)
{
    constexpr int64_t SMALL = 7 << 20, PART = 12;
    if (!moe_has_wgmma(call->exec->compute_capability) || most_slices(call) == 1)
        return 0;
    const int64_t act_and_down = call->tokens * call->slots * (call->intermediate + call->hidden) * 2;
    const int64_t room = (SMALL + act_and_down / PART) / SUM_BYTES;
    return room < call->exec->sms ? room : call->exec->sms;
}

// ---- Scratch memory: the items' counter and that of all results, in parts of their own, then the tiles' counters, the
// slices' flags, and behind all that must be zero the slices' sums ----

constexpr size_t COUNTER_BYTES = 256;

struct layout {
    size_t finished, summed, sums, bytes; // where these begin, and where the last ones end
};

layout layout_of(const struct moe_call *call)
{
    const auto aligned = [](size_t bytes) { return moe_ceil_div(bytes, 256) * 256; };
    const size_t tiles = (size_t)max_tiles(call, choices[0]); // the smallest ones are the most
    layout at = {};
    at.finished = COUNTER_BYTES;
    at.summed = at.finished + aligned(tiles * sizeof(int32_t));
    at.sums = at.summed + aligned((size_t)room_for_sums(call) * MULTIPLYING_WARPS * sizeof(int32_t));
    at.bytes = at.sums + (size_t)room_for_sums(call) * SUM_BYTES;
    return at;
}

// ---- Tensor maps ----

// act and down, [rows][columns].
moe_status map_rows(const struct moe_call *call, const void *base, int64_t columns, row_maps *maps)
{
    const uint64_t sizes[] = {(uint64_t)columns, (uint64_t)call->tokens * call->slots};
    const uint64_t strides[] = {(uint64_t)columns * 2};
    const auto map = [&](uint32_t rows, CUtensorMap *to) {
        const uint32_t box[] = {MOE_PACKED_COLS, rows};
        return moe_tensor_map(to, call->dtype, 2, base, sizes, strides, box, call->error);
    };
    moe_status status = map(64, &maps->by_64);
    if (status == MOE_OK)
        status = map(16, &maps->by_16);
    if (status == MOE_OK)
        status = map(4, &maps->by_4);
    return status == MOE_OK ? map(1, &maps->by_1) : status;
}

} // namespace

const char *moe_wgmma_tile_name(int32_t tile)
{
    return tile >= 1 && tile <= TILES ? choices[tile - 1].name : NULL;
}

// By the rows that groups have on average. Large tiles of tokens need less of L2 for each product; the smaller one's
// shorter stages and finished tiles suit the time when reading weights is what counts, by up to 1.3 %. But that time
// ends early where a few groups have most of the rows: from SMALL on large tiles are up to 8 % faster then. Reading
// hides the gather, too, until the first groups have two tiles. Then, as long as two are enough for most, pairs of
// blocks read each weight once. Of many tiles a group they are up to 1 % faster again, if items are long; otherwise it
// costs more that tiles and bands come in twos.
int32_t moe_wgmma_tile(const struct moe_call *call)
{
    constexpr int SMALL = 24, ONE_TILE = 165, TWO_TILES = 320, MANY_TILES = 1024; // rows, as measured
    constexpr int LONG = 4096;                                                    // intermediate
    const int64_t rows = call->tokens * call->slots / call->plan.groups;
    if (rows <= SMALL)
        return TILE_128;
    if (rows < ONE_TILE || !ordering_pays(call))
        return TILE_192;
    const bool pairs = rows <= TWO_TILES || (rows >= MANY_TILES && call->intermediate >= LONG);
    return pairs && blocks_of(call) > 1 ? TILE_192_PAIR : TILE_192_ROWS;
}

size_t moe_scratch_prefill_wgmma(const struct moe_call *call)
{
    return layout_of(call).bytes;
}

size_t moe_zeroed_prefill_wgmma(const struct moe_call *call)
{
    return layout_of(call).sums;
}

moe_status moe_ffn_prefill_wgmma(const struct moe_call *call, int32_t tile)
{
    if (call->tokens == 0)
        return MOE_OK;
    // One block alone has no other one.
    const choice &chosen = choices[(tile == TILE_192_PAIR && blocks_of(call) < 2 ? TILE_192_ROWS : tile) - 1];
    const bool dependent = call->exec->compute_capability == 90;
    cudaStream_t stream = (cudaStream_t)call->stream;
    if (call->tokens * (call->hidden / 8) > UINT32_MAX)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "path 'prefill': %lld tokens of %lld elements are too many for one call: split the batch",
                        (long long)call->tokens, (long long)call->hidden);

    ffn_args args = {};
    args.items = items_of(call, chosen);
    args.items.most_slices = chosen.cuts ? most_slices(call) : 1;
    args.items.room = (int32_t)(room_for_sums(call) / chosen.blocks); // of both blocks of a pair
    args.items.memory_bound = reads_once(call);
    const int64_t items =
        max_tiles(call, chosen) * (args.items.bands1 + args.items.bands2) + (chosen.cuts ? room_for_sums(call) : 0);
    if (items > INT32_MAX)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "path 'prefill': %lld tokens in a layer of %lld x %lld are too many: split the batch",
                        (long long)call->tokens, (long long)call->hidden, (long long)call->intermediate);

    const layout at = layout_of(call);
    args.x = call->x;
    args.row_token = call->plan.plan.row_token;
    args.taken = (uint32_t *)call->scratch;
    args.all_finished = (int32_t *)((char *)call->scratch + COUNTER_BYTES / 2);
    args.finished = (int32_t *)((char *)call->scratch + at.finished);
    args.summed = (int32_t *)((char *)call->scratch + at.summed);
    args.sums = (char *)call->scratch + at.sums;
    args.items.offsets = call->plan.plan.offsets;
    args.hidden = (int32_t)call->hidden;
    args.intermediate = (int32_t)call->intermediate;
    moe_status status = map_rows(call, call->act, call->intermediate, &args.act);
    if (status == MOE_OK)
        status = map_rows(call, call->down, call->hidden, &args.down);
    if (call->w13.layout == MOE_LAYOUT_PACKED) {
        args.w13 = (const char *)call->w13.data;
        args.w2 = (const char *)call->w2.data;
        if (args.items.memory_bound)
            args.guess = moe_guessed_tiles(call->tokens * call->slots, call->plan.groups, GUESSED_TILES);
    } else {
        if (status == MOE_OK)
            status = moe_map_w13(call, &args.w13_rows);
        if (status == MOE_OK)
            status = moe_map_w2(call, &args.w2_rows);
    }
    if (status == MOE_OK && chosen.ordered) {
        struct moe_call gather = *call;
        gather.rows = call->down; // wgmma_kernel.cuh says why they may lie there
        status = moe_gather_cuda(&gather);
    }
    if (status != MOE_OK)
        return status;
    args.items.workers = (int32_t)moe_grid(items, blocks_of(call) / chosen.blocks, call->exec->sms, 1);
    const unsigned grid = (unsigned)(chosen.blocks * args.items.workers);
    return (call->dtype == MOE_F16 ? chosen.f16 : chosen.bf16)(args, grid, dependent, stream, call->error);
}
