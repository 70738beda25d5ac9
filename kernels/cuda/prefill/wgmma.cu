// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM of compute capability 9.0 on the host: its tiles, its scratch memory, its tensor maps, the launches.
#include "kernels/cuda/prefill/wgmma.cuh"

#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/prefill/tensor_map.h"
#include "kernels/cuda/prefill/wgmma_kernel.cuh"

namespace
{

// ---- Tiles ----
//
// Large tiles of tokens need less of L2 for each product; the smaller one's shorter stages and finished tiles suit the
// time when reading weights is what counts.
struct choice {
    const char *name;
    int nmax;
    int64_t rows; // chosen where groups have up to this many rows on average
    moe_status (*bf16)(const ffn_args &args, unsigned grid, bool dependent, cudaStream_t stream, struct moe_error *err);
    moe_status (*f16)(const ffn_args &args, unsigned grid, bool dependent, cudaStream_t stream, struct moe_error *err);
};

template <typename T, class Shape>
moe_status launch(const ffn_args &args, unsigned grid, bool dependent, cudaStream_t stream, struct moe_error *err)
{
    cudaFuncSetAttribute(ffn_kernel<T, Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES);
    moe_launch(ffn_kernel<T, Shape>, grid, FFN_THREADS, Shape::BYTES, stream, dependent, args);
    return moe_launched(err, "ffn prefill");
}

template <class Shape> constexpr choice make_choice(const char *name, int64_t rows)
{
    return {name, Shape::NMAX, rows, launch<__nv_bfloat16, Shape>, launch<__half, Shape>};
}

const choice choices[] = {
    make_choice<ffn_shape<128, 4>>("wgmma-128", 80),
    make_choice<ffn_shape<192, 4>>("wgmma-192", INT64_MAX),
};
constexpr int CHOICES = sizeof choices / sizeof choices[0];

// ---- Scratch memory: the schedule, the tiles' counters, the items ----

int32_t bands_of(int64_t rows)
{
    return (int32_t)moe_ceil_div(rows, MOE_BAND_ROWS);
}

size_t aligned(uint64_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

size_t carve(const struct moe_call *call, const choice &chosen, moe_schedule_args *args)
{
    args->offsets = call->plan.plan.offsets;
    args->groups = call->plan.groups;
    args->bands1 = bands_of(2 * call->intermediate);
    args->bands2 = bands_of(call->hidden);
    args->nmax = chosen.nmax;
    args->max_tiles = moe_max_tiles(call->tokens * call->slots, call->plan.groups, chosen.nmax);
    char *at = (char *)call->scratch;
    args->schedule = (moe_schedule *)at;
    size_t used = aligned(sizeof(moe_schedule));
    args->finished = (int32_t *)(at + used);
    used += aligned(args->max_tiles * sizeof(int32_t));
    args->items = (moe_item *)(at + used);
    return used + args->max_tiles * (args->bands1 + args->bands2) * sizeof(moe_item);
}

// ---- Tensor maps ----

// act and down, [rows][columns], in boxes of 64 columns and `box` rows.
moe_status map_rows(const struct moe_call *call, const void *base, int64_t columns, uint32_t box, CUtensorMap *map)
{
    const uint64_t sizes[] = {(uint64_t)columns, (uint64_t)call->tokens * call->slots};
    const uint64_t strides[] = {(uint64_t)columns * 2};
    const uint32_t boxes[] = {MOE_PACKED_COLS, box};
    return moe_tensor_map(map, call->dtype, 2, base, sizes, strides, boxes, call->error);
}

// Row-major weights: eights of rows, of gate and of up in turn, in the order of the packed layout.
moe_status map_w13(const struct moe_call *call, CUtensorMap *map)
{
    const uint64_t row = (uint64_t)call->hidden * 2, width = (uint64_t)call->intermediate;
    const uint64_t sizes[] = {(uint64_t)call->hidden, 8, 2, width / 8, (uint64_t)call->plan.groups};
    const uint64_t strides[] = {row, width * row, 8 * row, 2 * width * row};
    const uint32_t boxes[] = {MOE_PACKED_COLS, 8, 2, MOE_PACKED_ROWS / 16, 1};
    return moe_tensor_map(map, call->dtype, 5, call->w13.data, sizes, strides, boxes, call->error);
}

moe_status map_w2(const struct moe_call *call, CUtensorMap *map)
{
    const uint64_t row = (uint64_t)call->intermediate * 2, height = (uint64_t)call->hidden;
    const uint64_t sizes[] = {(uint64_t)call->intermediate, height, (uint64_t)call->plan.groups};
    const uint64_t strides[] = {row, height * row};
    const uint32_t boxes[] = {MOE_PACKED_COLS, MOE_PACKED_ROWS, 1};
    return moe_tensor_map(map, call->dtype, 3, call->w2.data, sizes, strides, boxes, call->error);
}

} // namespace

const char *moe_wgmma_tile_name(int32_t tile)
{
    return tile >= 1 && tile <= CHOICES ? choices[tile - 1].name : NULL;
}

int32_t moe_wgmma_tile(const struct moe_call *call)
{
    const int64_t rows = call->tokens * call->slots / call->plan.groups;
    int32_t i = 0;
    while (choices[i].rows < rows)
        i++;
    return i + 1;
}

size_t moe_scratch_prefill_wgmma(const struct moe_call *call)
{
    moe_schedule_args schedule;
    return carve(call, choices[0], &schedule); // the smallest tiles make the longest list
}

moe_status moe_ffn_prefill_wgmma(const struct moe_call *call, int32_t tile)
{
    if (call->tokens == 0)
        return MOE_OK;
    const choice &chosen = choices[tile - 1];
    const bool dependent = call->exec->compute_capability == 90;
    cudaStream_t stream = (cudaStream_t)call->stream;
    if (call->tokens * (call->hidden / 8) > UINT32_MAX)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "path 'prefill': %lld tokens of %lld elements are too many for one call: split the batch",
                        (long long)call->tokens, (long long)call->hidden);

    moe_schedule_args schedule;
    carve(call, chosen, &schedule);
    const int64_t items = schedule.max_tiles * (schedule.bands1 + schedule.bands2);
    if (items > INT32_MAX || schedule.bands1 > MOE_ITEM_BANDS || schedule.bands2 > MOE_ITEM_BANDS)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "path 'prefill': %lld tokens in a layer of %lld x %lld are too many: split the batch",
                        (long long)call->tokens, (long long)call->hidden, (long long)call->intermediate);

    ffn_args args = {};
    args.x = call->x;
    args.row_token = call->plan.plan.row_token;
    args.act = call->act;
    args.down = call->down;
    args.schedule = schedule.schedule;
    args.finished = schedule.finished;
    args.items = schedule.items;
    args.hidden = (int32_t)call->hidden;
    args.intermediate = (int32_t)call->intermediate;
    args.bands1 = schedule.bands1;
    args.bands2 = schedule.bands2;
    moe_status status = map_rows(call, call->act, call->intermediate, 64, &args.act_64);
    if (status == MOE_OK)
        status = map_rows(call, call->act, call->intermediate, 16, &args.act_16);
    if (status == MOE_OK)
        status = map_rows(call, call->down, call->hidden, 64, &args.down_64);
    if (status == MOE_OK)
        status = map_rows(call, call->down, call->hidden, 16, &args.down_16);
    if (call->w13.layout == MOE_LAYOUT_PACKED) {
        args.w13 = (const char *)call->w13.data;
        args.w2 = (const char *)call->w2.data;
    } else {
        if (status == MOE_OK)
            status = map_w13(call, &args.w13_rows);
        if (status == MOE_OK)
            status = map_w2(call, &args.w2_rows);
    }
    if (status == MOE_OK)
        status = moe_schedule_cuda(schedule, call->max_sms, dependent, stream, call->error);
    if (status != MOE_OK)
        return status;
    const unsigned grid = moe_grid(items, call->max_sms, call->exec->sms, 1);
    return (call->dtype == MOE_F16 ? chosen.f16 : chosen.bf16)(args, grid, dependent, stream, call->error);
}
