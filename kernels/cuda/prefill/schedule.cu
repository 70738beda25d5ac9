// SPDX-License-Identifier: Apache-2.0
// From the plan's offsets to the list of items. Each block finds for itself how many token tiles the groups before each
// group have, and writes its share of the list.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/prefill/schedule.cuh"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 512;

// About one on each SM: each adds up all counts anew.
constexpr int MAX_BLOCKS = 128;

// Items that follow each other run at the same time, so they should share what they read: in a group, up to this many
// tiles of tokens go through all weights together, the tiles of one band of weights following each other.
constexpr int PART = 16;

// Rows of a group are cut into as few tiles as can be, of nearly the same size. They begin at multiples of 16 rows of
// the group, because that is the step in which the kernel's products grow.
__device__ inline int tiles_of(int count, int nmax)
{
    return (count + nmax - 1) / nmax;
}

__device__ inline int first_row(int count, int tiles, int tile)
{
    const int64_t steps = (count + MOE_ROW_STEP - 1) / MOE_ROW_STEP;
    const int row = (int)(steps * tile / tiles) * MOE_ROW_STEP;
    return row < count ? row : count;
}

// The last group with first_tile[g] <= tile: the others of them have no tiles.
__device__ inline int group_of_tile(const int32_t *first_tile, int groups, int32_t tile)
{
    int g = 0, end = groups;
    while (end - g > 1) {
        const int middle = (g + end) / 2;
        if (first_tile[middle] <= tile)
            g = middle;
        else
            end = middle;
    }
    return g;
}

__global__ void __launch_bounds__(THREADS) schedule_kernel(const moe_schedule_args args)
{
    extern __shared__ int32_t first_tile[]; // [groups + 1]
    __shared__ int32_t warp_sums[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    moe_grid_launch_dependents();
    moe_grid_wait();
    int32_t before = 0;
    for (int g0 = 0; g0 < args.groups; g0 += THREADS) {
        const int g = g0 + threadIdx.x;
        const int32_t own = g < args.groups ? tiles_of(args.offsets[g + 1] - args.offsets[g], args.nmax) : 0;
        int32_t sum = own;
        for (int d = 1; d < 32; d *= 2) {
            const int32_t v = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d)
                sum += v;
        }
        if (lane == 31)
            warp_sums[warp] = sum;
        __syncthreads();
        int32_t round = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp)
                sum += warp_sums[w];
            round += warp_sums[w];
        }
        if (g < args.groups)
            first_tile[g] = before + sum - own;
        before += round;
        __syncthreads();
    }
    if (threadIdx.x == 0)
        first_tile[args.groups] = before;
    __syncthreads();

    const int32_t tiles = first_tile[args.groups];
    const int64_t items1 = (int64_t)tiles * args.bands1, items = items1 + (int64_t)tiles * args.bands2;
    const int64_t start = blockIdx.x * (int64_t)THREADS + threadIdx.x, stride = (int64_t)gridDim.x * THREADS;
    if (start == 0) {
        args.schedule->items = (int32_t)items;
        args.schedule->taken = 0;
    }
    for (int64_t t = start; t < tiles; t += stride)
        args.finished[t] = 0;

    for (int64_t i = start; i < items; i += stride) {
        const bool gemm2 = i >= items1;
        const int32_t bands = gemm2 ? args.bands2 : args.bands1;
        const int64_t at = gemm2 ? i - items1 : i;
        const int g = group_of_tile(first_tile, args.groups, (int32_t)(at / bands));
        const int32_t count = args.offsets[g + 1] - args.offsets[g], own = first_tile[g + 1] - first_tile[g];
        const int64_t in_group = at - (int64_t)first_tile[g] * bands;
        const int32_t part = (int32_t)(in_group / ((int64_t)PART * bands)) * PART; // tiles of earlier parts
        const int32_t in_part = (int32_t)(in_group - (int64_t)part * bands);
        const int32_t height = min(PART, own - part);
        const int32_t mine = part + in_part % height, band = in_part / height;

        const int32_t row = first_row(count, own, mine);
        moe_item item;
        item.row = args.offsets[g] + row;
        item.rows = first_row(count, own, mine + 1) - row;
        item.tile = first_tile[g] + mine;
        item.weights = (uint32_t)band << MOE_ITEM_BAND_SHIFT | (gemm2 ? MOE_ITEM_GEMM2 : 0) | (uint32_t)g;
        args.items[i] = item;
    }
}

} // namespace

moe_status moe_schedule_cuda(const moe_schedule_args &args, int32_t max_sms, bool dependent, cudaStream_t stream,
                             struct moe_error *err)
{
    const int64_t most = args.max_tiles * (args.bands1 + args.bands2);
    const unsigned grid = moe_grid(moe_ceil_div(most, THREADS), max_sms < MAX_BLOCKS ? max_sms : 0, MAX_BLOCKS, 1);
    const size_t shared = (args.groups + 1) * sizeof(int32_t);
    moe_launch(schedule_kernel, grid, THREADS, shared, stream, dependent, args);
    return moe_launched(err, "schedule");
}
