// SPDX-License-Identifier: Apache-2.0
// Row-major weights -> packed ones (kernels/packed.h), once a layer.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/kernels.h"
#include "kernels/packed.h"

namespace
{

constexpr int THREADS = 256;
constexpr int GROUP = 8; // rows that stand together in either layout: none straddles an expert, or gate and up
constexpr int CHUNK = 8; // elements in 16 bytes

__device__ inline void store(char *expert, int64_t rows, int64_t cols, int64_t row, int64_t chunk, uint4 value)
{
    *reinterpret_cast<uint4 *>(expert + moe_packed_offset(rows, cols, row, chunk)) = value;
}

// A block packs a group. A warp takes 64 columns of it at a time: it reads 128 bytes of each row and writes 1 KB in one
// piece.
__global__ void __launch_bounds__(THREADS, 4)
    pack_kernel(const uint4 *canonical, bool w13, int64_t first, int64_t rows, int64_t cols, char *packed)
{
    const int lane_row = threadIdx.x % 32 / 8, lane_chunk = threadIdx.x % 8;
    const int64_t before = (int64_t)blockIdx.x * GROUP;    // rows of `canonical`
    const int64_t row = first + before, from = row % rows; // of the stack, of the expert
    const int64_t to = w13 ? moe_packed_w13_row(rows, from) : from;
    const int64_t chunks = cols / CHUNK, places = moe_packed_blocks(cols) * 8;
    const uint4 *source = canonical + before * chunks;
    char *expert = packed + row / rows * moe_packed_expert_bytes(rows, cols);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int64_t padding = from + GROUP == rows ? moe_packed_rows(rows) : 0; // rows up to here follow the last group

#pragma unroll 2
    for (int64_t chunk = threadIdx.x / 32 * 8 + lane_chunk; chunk < places; chunk += THREADS / 32 * 8) {
        uint4 v[GROUP / 4];
#pragma unroll
        for (int i = 0; i < GROUP / 4; i++)
            v[i] = chunk < chunks ? __ldcs(source + (i * 4 + lane_row) * chunks + chunk) : zero;
#pragma unroll
        for (int i = 0; i < GROUP / 4; i++)
            store(expert, rows, cols, to + i * 4 + lane_row, chunk, v[i]);
        for (int64_t r = rows + lane_row; r < padding; r += 4)
            store(expert, rows, cols, r, chunk, zero);
    }
}

} // namespace

moe_status moe_pack_rows(const struct moe_weights_view *view, bool w13, int64_t first, int64_t rows,
                         const void *canonical, void *packed, void *stream, struct moe_error *err)
{
    if (rows == 0)
        return MOE_OK;

    pack_kernel<<<(unsigned)(rows / GROUP), THREADS, 0, (cudaStream_t)stream>>>((const uint4 *)canonical, w13, first,
                                                                                view->rows, view->cols, (char *)packed);
    return moe_launched(err, "pack");
}
