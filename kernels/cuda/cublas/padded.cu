// SPDX-License-Identifier: Apache-2.0
// Every expert padded to the largest count, as a capacity-factor layer does it, but with nothing dropped: one strided
// batch for each GEMM. Only where tokens name the same expert twice, so that the largest count is more than the tokens,
// the groups may take several waves of it.
#include "kernels/cuda/common/activation.cuh"
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/cublas/internal.h"

namespace
{

constexpr int THREADS = 128;
constexpr int VEC = 8;

// In all kernels a block has row blockIdx.x of group blockIdx.y of the wave; `capacity` = gridDim.x rows are kept for
// each group. offsets and b begin at the wave's first group.

// padded[g][i] = x[token of row i of g], zeros for i >= counts[g].
template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    pad_kernel(const T *x, const int32_t *offsets, const int32_t *row_token, int64_t hidden, T *padded)
{
    const int g = blockIdx.y, row = offsets[g] + blockIdx.x;
    const bool used = row < offsets[g + 1];
    const T *from = x + (used ? row_token[row] * hidden : 0);
    T *to = padded + ((int64_t)g * gridDim.x + blockIdx.x) * hidden;
    for (int64_t h = threadIdx.x * VEC; h < hidden; h += THREADS * VEC) {
        float v[VEC] = {};
        if (used)
            moe_load<ALIGNED>(from + h, hidden - h, v);
        moe_store<ALIGNED>(to + h, hidden - h, v);
    }
}

// gate_up[g][i][0, I) = silu(gate) * up, in place. Rows that are padding stay as they are: their results are not read.
template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) activate_kernel(T *gate_up, const int32_t *offsets, int64_t intermediate)
{
    const int g = blockIdx.y;
    if (blockIdx.x >= offsets[g + 1] - offsets[g])
        return;
    T *row = gate_up + ((int64_t)g * gridDim.x + blockIdx.x) * 2 * intermediate;
    for (int64_t i = threadIdx.x * VEC; i < intermediate; i += THREADS * VEC) {
        float gate[VEC], up[VEC];
        moe_load<ALIGNED>(row + i, intermediate - i, gate);
        moe_load<ALIGNED>(row + intermediate + i, intermediate - i, up);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            gate[j] = moe_silu(gate[j]) * up[j];
        moe_store<ALIGNED>(row + i, intermediate - i, gate);
    }
}

// down[row i of g] = padded[g][i]
template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    unpad_kernel(const T *padded, const int32_t *offsets, int64_t hidden, T *down)
{
    const int g = blockIdx.y, row = offsets[g] + blockIdx.x;
    if (row >= offsets[g + 1])
        return;
    const T *from = padded + ((int64_t)g * gridDim.x + blockIdx.x) * hidden;
    T *to = down + row * hidden;
    for (int64_t h = threadIdx.x * VEC; h < hidden; h += THREADS * VEC) {
        float v[VEC];
        moe_load<ALIGNED>(from + h, hidden - h, v);
        moe_store<ALIGNED>(to + h, hidden - h, v);
    }
}

// Some groups at once, and the memory for their rows.
struct wave {
    int32_t first, groups;
    int32_t capacity;
    void *padded;  // [groups][capacity][H]
    void *gate_up; // [groups][capacity][2I]
};

// c[g][capacity] = a[g][capacity] . b[g]^T for the wave's groups; a's rows are lda elements apart. cuBLAS counts
// columns first, so it sees c^T = b . a^T.
cublasStatus_t multiply(const struct moe_call *call, const wave &w, const void *a, int64_t lda,
                        const struct moe_weights_view *b, void *c)
{
    const float one = 1.0f, zero = 0.0f;
    const struct moe_cublas *blas = call->exec->cublas;
    const cudaDataType type = moe_cublas_type(call->dtype);
    const int n = (int)b->rows, k = (int)b->cols;
    const char *weights = (const char *)b->data + (size_t)w.first * b->rows * b->cols * moe_dtype_size(call->dtype);
    return blas->api.gemm_strided(blas->handle, CUBLAS_OP_T, CUBLAS_OP_N, n, w.capacity, k, &one, weights, type, k,
                                  (long long)n * k, a, type, (int)lda, (long long)w.capacity * lda, &zero, c, type, n,
                                  (long long)w.capacity * n, w.groups, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

template <typename T, bool ALIGNED> moe_status run(const struct moe_call *call, const wave &w)
{
    const char *step = "ffn padded";
    const int32_t *offsets = call->plan.plan.offsets + w.first;
    const cudaStream_t stream = (cudaStream_t)call->stream;
    const dim3 grid((unsigned)w.capacity, (unsigned)w.groups);
    T *padded = (T *)w.padded, *gate_up = (T *)w.gate_up;

    pad_kernel<T, ALIGNED>
        <<<grid, THREADS, 0, stream>>>((const T *)call->x, offsets, call->plan.plan.row_token, call->hidden, padded);
    moe_status status = moe_launched(call->error, "padded: pad");
    if (status != MOE_OK)
        return status;
    cublasStatus_t s = multiply(call, w, padded, call->hidden, &call->w13, gate_up);
    if (s != CUBLAS_STATUS_SUCCESS)
        return moe_cublas_failed(call, step, s);

    activate_kernel<T, ALIGNED><<<grid, THREADS, 0, stream>>>(gate_up, offsets, call->intermediate);
    status = moe_launched(call->error, "padded: activation");
    if (status != MOE_OK)
        return status;
    s = multiply(call, w, gate_up, 2 * call->intermediate, &call->w2, padded);
    if (s != CUBLAS_STATUS_SUCCESS)
        return moe_cublas_failed(call, step, s);

    unpad_kernel<T, ALIGNED><<<grid, THREADS, 0, stream>>>(padded, offsets, call->hidden, (T *)call->down);
    return moe_launched(call->error, "padded: unpad");
}

// Rows that the scratch has room for: every group with a row of each token, and at least one group with all rows.
int64_t scratch_rows(const struct moe_call *call)
{
    return call->tokens * (call->plan.groups > call->slots ? call->plan.groups : call->slots);
}

// Scratch after cuBLAS's own: the padded rows, which GEMM 2's result takes over, then gate and up, where the activation
// takes over the gate's place. SIZE_MAX / 4, more than there is memory, where the size leaves 64 bits.
size_t scratch_bytes(const struct moe_call *call, size_t *gate_up_at)
{
    const size_t limit = SIZE_MAX / 4;
    const size_t rows = (size_t)scratch_rows(call) * moe_dtype_size(call->dtype);
    size_t padded, gate_up;
    if (__builtin_mul_overflow(rows, (size_t)call->hidden, &padded) ||
        __builtin_mul_overflow(rows, 2 * (size_t)call->intermediate, &gate_up) || padded > limit || gate_up > limit)
        return limit;
    *gate_up_at = MOE_CUBLAS_WORKSPACE + (padded + 255) / 256 * 256;
    const size_t bytes = *gate_up_at + gate_up;
    return bytes < limit ? bytes : limit;
}

moe_status run_waves(const struct moe_call *call)
{
    const int32_t *offsets = call->exec->cublas->offsets;
    const int32_t groups = call->plan.groups;
    int32_t capacity = 0;
    for (int32_t g = 0; g < groups; g++)
        if (offsets[g + 1] - offsets[g] > capacity)
            capacity = offsets[g + 1] - offsets[g];
    if (capacity == 0)
        return MOE_OK;

    size_t gate_up_at = 0;
    scratch_bytes(call, &gate_up_at);
    const int64_t fit = scratch_rows(call) / capacity;
    const bool aligned =
        call->hidden % VEC == 0 && call->intermediate % VEC == 0 && moe_aligned16(call->x) && moe_aligned16(call->down);
    moe_status status = MOE_OK;
    for (int32_t first = 0; first < groups && status == MOE_OK; first += (int32_t)fit) {
        const wave w = {first, (int32_t)(groups - first < fit ? groups - first : fit), capacity,
                        (char *)call->scratch + MOE_CUBLAS_WORKSPACE, (char *)call->scratch + gate_up_at};
        moe_with_dtype(call->dtype, [&](auto t) {
            moe_with_bool(aligned, [&](auto vector) { status = run<decltype(t), decltype(vector)::value>(call, w); });
        });
    }
    return status;
}

} // namespace

size_t moe_scratch_padded(const struct moe_call *call)
{
    size_t gate_up_at;
    return scratch_bytes(call, &gate_up_at);
}

moe_status moe_ffn_padded(const struct moe_call *call)
{
    if (call->tokens == 0)
        return MOE_OK;
    moe_status status = moe_cublas_begin(call, "ffn padded");
    if (status != MOE_OK)
        return status;
    status = run_waves(call);
    moe_cublas_end(call);
    return status;
}
