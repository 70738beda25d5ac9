// SPDX-License-Identifier: Apache-2.0
// The GPU's clock and its two ceilings: a pure read of the weights of the experts that a point touches, and dense
// cuBLAS products of the same FLOPs. Everything that can be captured is timed as a CUDA graph between two events, after
// L2 was flushed by reading other memory; nothing waits on the host inside a sample but calls that do so themselves.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "tools/bench/bench.h"
}

namespace
{

constexpr size_t flush_bytes = (size_t)384 << 20;
constexpr size_t blas_workspace_bytes = (size_t)64 << 20;
constexpr int64_t dense_rows = 65536; // a product of more rows is done in slices: its rate has long stopped growing
constexpr int read_threads = 512, read_unroll = 8, read_blocks_per_sm = 2;

// A contiguous run of 16-byte units; `first` is its place in the concatenation of all runs.
struct segment {
    const uint4 *data;
    uint64_t first, units;
};

using gemm_ex = cublasStatus_t (*)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void *,
                                   const void *, cudaDataType, int, const void *, cudaDataType, int, const void *,
                                   void *, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t);

struct blas {
    cublasStatus_t (*create)(cublasHandle_t *);
    cublasStatus_t (*destroy)(cublasHandle_t);
    cublasStatus_t (*set_stream)(cublasHandle_t, cudaStream_t);
    cublasStatus_t (*set_workspace)(cublasHandle_t, void *, size_t);
    gemm_ex gemm;
    cublasHandle_t handle;
};

struct cuda_machine {
    bench_machine base; // first: a bench_machine * is a cuda_machine *
    int device, sms;
    cudaStream_t stream;
    cudaEvent_t begin, end;
    uint4 *flush;
    uint32_t *sink;
    segment *segments; // on the device
    int segment_count;
    uint64_t units;
    blas cublas;
    void *blas_workspace;
    char *dense; // rows of the products' operands and results
    size_t dense_bytes;
    bench_call read_call, dense_call;
    const bench_point *point;
    char why[256];
};

cuda_machine *self(bench_machine *m)
{
    return reinterpret_cast<cuda_machine *>(m);
}

// A blank text where the CUDA call succeeded.
moe_status checked(cudaError_t error, const char *what, moe_error *err)
{
    if (error == cudaSuccess)
        return MOE_OK;
    cudaGetLastError(); // the failure is reported here, not by whoever asks next
    moe_status status = error == cudaErrorMemoryAllocation ? MOE_ERROR_DEVICE_MEMORY : MOE_ERROR_DEVICE;
    return moe_fail(err, status, "%s: %s", what, cudaGetErrorString(error));
}

__device__ uint32_t fold(uint4 v)
{
    return v.x ^ v.y ^ v.z ^ v.w;
}

// Each block reads an equal, contiguous part of the concatenation.
__global__ void __launch_bounds__(read_threads, read_blocks_per_sm)
    read_segments(const segment *segments, int count, uint64_t units, uint32_t *sink)
{
    uint64_t at = units * blockIdx.x / gridDim.x, end = units * (blockIdx.x + 1) / gridDim.x;
    int low = 0, high = count - 1; // the last segment whose `first` is not past `at`
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (segments[middle].first <= at)
            low = middle;
        else
            high = middle - 1;
    }
    uint32_t sum = 0;
    for (; at < end; low++) {
        const segment s = segments[low];
        uint64_t stop = min(end, s.first + s.units);
        const uint4 *data = s.data - s.first;
        for (uint64_t i = at + threadIdx.x; i < stop; i += read_threads * read_unroll) {
            uint4 v[read_unroll];
#pragma unroll
            for (int j = 0; j < read_unroll; j++) {
                uint64_t k = i + j * read_threads;
                v[j] = k < stop ? __ldcs(data + k) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int j = 0; j < read_unroll; j++)
                sum ^= fold(v[j]);
        }
        at = stop;
    }
    if (sum == 0x9e3779b9u) // next to never: so that the loads are needed
        *sink = sum;
}

__global__ void read_flat(const uint4 *data, uint64_t units, uint32_t *sink)
{
    uint32_t sum = 0;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < units; i += (uint64_t)gridDim.x * blockDim.x)
        sum ^= fold(data[i]);
    if (sum == 0x9e3779b9u)
        *sink = sum;
}

__device__ void store(float *to, float value)
{
    *to = value;
}

__device__ void store(__half *to, float value)
{
    *to = __float2half(value);
}

__device__ void store(__nv_bfloat16 *to, float value)
{
    *to = __float2bfloat16(value);
}

// About normal: the sum of four uniform numbers, unit variance. What a product costs depends on its data.
template <typename T> __global__ void fill_normal(T *to, uint64_t count)
{
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ x >> 27) * 0x94d049bb133111ebull;
        x ^= x >> 31;
        float sum = 0;
        for (int j = 0; j < 4; j++)
            sum += (float)(x >> 16 * j & 0xffff) * 0x1p-16f - 0.5f;
        store(to + i, sum * 1.7320508f);
    }
}

moe_status fill(cuda_machine *m, void *to, moe_dtype dtype, uint64_t count, moe_error *err)
{
    int blocks = m->sms * 8;
    if (dtype == MOE_BF16)
        fill_normal<<<blocks, 256, 0, m->stream>>>(static_cast<__nv_bfloat16 *>(to), count);
    else if (dtype == MOE_F16)
        fill_normal<<<blocks, 256, 0, m->stream>>>(static_cast<__half *>(to), count);
    else
        fill_normal<<<blocks, 256, 0, m->stream>>>(static_cast<float *>(to), count);
    return checked(cudaGetLastError(), "filling the operands of the dense product", err);
}

// ---- What the ceilings run ----

moe_status run_read(void *machine, void *stream)
{
    auto *m = static_cast<cuda_machine *>(machine);
    read_segments<<<m->sms * read_blocks_per_sm, read_threads, 0, static_cast<cudaStream_t>(stream)>>>(
        m->segments, m->segment_count, m->units, m->sink);
    return cudaGetLastError() == cudaSuccess ? MOE_OK : MOE_ERROR_DEVICE;
}

cudaDataType data_type(moe_dtype dtype)
{
    return dtype == MOE_BF16 ? CUDA_R_16BF : dtype == MOE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

// c[rows, n] = a[rows, k] . w[n, k]^T, all row-major, which to cuBLAS is its transpose.
bool multiply(cuda_machine *m, int64_t rows, int64_t n, int64_t k, const void *a, const void *w, void *c)
{
    const float one = 1, zero = 0;
    cudaDataType type = data_type(m->point->dtype);
    return m->cublas.gemm(m->cublas.handle, CUBLAS_OP_T, CUBLAS_OP_N, (int)n, (int)rows, (int)k, &one, w, type, (int)k,
                          a, type, (int)k, &zero, c, type, (int)n, CUBLAS_COMPUTE_32F,
                          CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
}

// Both products of the layer, as if one expert had all rows: its weights, the rows random.
moe_status run_dense(void *machine, void *stream)
{
    auto *m = static_cast<cuda_machine *>(machine);
    const bench_point *p = m->point;
    int64_t h = p->hidden, i = p->intermediate, size = (int64_t)moe_dtype_size(p->dtype);
    int64_t most = p->rows < dense_rows ? p->rows : dense_rows;
    char *x = m->dense, *act = x + most * h * size, *gate_up = act + most * i * size,
         *down = gate_up + most * 2 * i * size;
    if (m->cublas.set_stream(m->cublas.handle, static_cast<cudaStream_t>(stream)) != CUBLAS_STATUS_SUCCESS ||
        m->cublas.set_workspace(m->cublas.handle, m->blas_workspace, blas_workspace_bytes) != CUBLAS_STATUS_SUCCESS)
        return MOE_ERROR_DEVICE;
    for (int64_t done = 0; done < p->rows; done += most) {
        int64_t rows = p->rows - done < most ? p->rows - done : most;
        if (!multiply(m, rows, 2 * i, h, x, p->w13, gate_up) || !multiply(m, rows, h, i, act, p->w2, down))
            return MOE_ERROR_DEVICE;
    }
    return MOE_OK;
}

// ---- Timing ----

void cuda_release(bench_machine *, bench_call *call)
{
    if (call->graph)
        cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(call->graph));
    call->graph = nullptr;
}

moe_status capture(cuda_machine *m, bench_call *call, moe_error *err)
{
    moe_status status = checked(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeThreadLocal), "capture", err);
    if (status != MOE_OK)
        return status;
    status = call->run(call->argument, m->stream);
    cudaGraph_t graph = nullptr;
    cudaError_t ended = cudaStreamEndCapture(m->stream, &graph);
    if (status == MOE_ERROR_CAPTURE)
        cudaGetLastError(); // an abandoned capture may count as an error
    else if (status == MOE_OK)
        status = checked(ended, "ending the capture", err);
    cudaGraphExec_t exec = nullptr;
    if (status == MOE_OK)
        status = checked(cudaGraphInstantiate(&exec, graph, 0), "making a graph", err);
    if (status == MOE_OK)
        call->graph = exec;
    if (graph)
        cudaGraphDestroy(graph);
    return status == MOE_ERROR_CAPTURE ? MOE_OK : status;
}

moe_status cuda_prepare(bench_machine *base, bench_call *call, moe_error *err)
{
    cuda_machine *m = self(base);
    moe_status status = checked(cudaSetDevice(m->device), "cudaSetDevice", err);
    if (status == MOE_OK)
        status = call->run(call->argument, m->stream);
    if (status == MOE_OK)
        status = checked(cudaStreamSynchronize(m->stream), "the first run", err);
    return status == MOE_OK ? capture(m, call, err) : status;
}

moe_status cuda_time(bench_machine *base, bench_call *call, double *seconds, moe_error *err)
{
    cuda_machine *m = self(base);
    // The flush lasts long enough for the host to enqueue what follows behind it.
    read_flat<<<m->sms * 4, 512, 0, m->stream>>>(m->flush, flush_bytes / sizeof(uint4), m->sink);
    cudaError_t error = cudaEventRecord(m->begin, m->stream);
    moe_status status = MOE_OK;
    if (call->graph && error == cudaSuccess)
        error = cudaGraphLaunch(static_cast<cudaGraphExec_t>(call->graph), m->stream);
    else if (error == cudaSuccess)
        status = call->run(call->argument, m->stream);
    if (status != MOE_OK)
        return status;
    if (error == cudaSuccess)
        error = cudaEventRecord(m->end, m->stream);
    if (error == cudaSuccess)
        error = cudaEventSynchronize(m->end);
    float milliseconds = 0;
    if (error == cudaSuccess)
        error = cudaEventElapsedTime(&milliseconds, m->begin, m->end);
    *seconds = 1e-3 * milliseconds;
    return checked(error, "timing", err);
}

moe_status cuda_read(bench_machine *base, double *seconds, moe_error *err)
{
    return cuda_time(base, &self(base)->read_call, seconds, err);
}

moe_status cuda_dense(bench_machine *base, double *seconds, moe_error *err)
{
    return cuda_time(base, &self(base)->dense_call, seconds, err);
}

// ---- A point ----

// The touched experts' matrices, without the odd bytes before and after the 16-byte units.
moe_status set_segments(cuda_machine *m, moe_error *err)
{
    const bench_point *p = m->point;
    uint64_t matrix = (uint64_t)p->hidden * (uint64_t)p->intermediate * moe_dtype_size(p->dtype);
    const struct {
        const void *data;
        uint64_t bytes;
    } stacks[2] = {{p->w13, 2 * matrix}, {p->w2, matrix}};
    auto *host = static_cast<segment *>(malloc(2 * (size_t)p->touched * sizeof(segment)));
    if (!host)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for %d segments", 2 * p->touched);
    m->segment_count = 0;
    m->units = 0;
    for (const auto &stack : stacks) {
        for (int32_t i = 0; i < p->touched; i++) {
            uintptr_t begin = (uintptr_t)stack.data + (uint64_t)p->touched_ids[i] * stack.bytes;
            uintptr_t aligned = (begin + 15) / 16 * 16;
            segment s = {(const uint4 *)aligned, m->units, (begin + stack.bytes) / 16 - aligned / 16};
            host[m->segment_count++] = s;
            m->units += s.units;
        }
    }
    cudaError_t error = cudaMemcpyAsync(m->segments, host, (size_t)m->segment_count * sizeof(segment),
                                        cudaMemcpyHostToDevice, m->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(m->stream);
    free(host);
    return checked(error, "the list of weights to read", err);
}

moe_status set_dense(cuda_machine *m, moe_error *err)
{
    const bench_point *p = m->point;
    uint64_t rows = (uint64_t)(p->rows < dense_rows ? p->rows : dense_rows);
    uint64_t inputs = rows * (uint64_t)(p->hidden + p->intermediate);
    uint64_t outputs = rows * (uint64_t)(p->hidden + 2 * p->intermediate);
    uint64_t bytes = (inputs + outputs) * moe_dtype_size(p->dtype);
    if (bytes > m->dense_bytes) {
        cudaFree(m->dense);
        m->dense = nullptr;
        m->dense_bytes = 0;
        moe_status status = checked(cudaMalloc(&m->dense, bytes), "memory for the dense product", err);
        if (status != MOE_OK)
            return status;
        m->dense_bytes = bytes;
    }
    return fill(m, m->dense, p->dtype, inputs, err);
}

moe_status cuda_point(bench_machine *base, const bench_point *p, moe_error *err)
{
    cuda_machine *m = self(base);
    m->point = p;
    cuda_release(base, &m->read_call);
    cuda_release(base, &m->dense_call);
    moe_status status = checked(cudaSetDevice(m->device), "cudaSetDevice", err);
    if (status == MOE_OK)
        status = set_segments(m, err);
    if (status == MOE_OK)
        status = cuda_prepare(base, &m->read_call, err);
    if (status == MOE_OK && m->cublas.handle)
        status = set_dense(m, err);
    if (status == MOE_OK && m->cublas.handle)
        status = cuda_prepare(base, &m->dense_call, err);
    if (status != MOE_OK && err->text[0] == 0)
        moe_fail(err, status, "the ceilings could not be measured at %lld tokens", (long long)p->tokens);
    return status;
}

// ---- Opening ----

bool find_symbol(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != nullptr;
}

// False, with a reason in m->why, if there is no cuBLAS here.
bool find_blas(cuda_machine *m)
{
    void *library = nullptr;
    for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
        library = library ? library : dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    if (!library) {
        snprintf(m->why, sizeof m->why, "%s", dlerror());
        return false;
    }
    blas *b = &m->cublas;
    if (!find_symbol(library, "cublasCreate_v2", &b->create) ||
        !find_symbol(library, "cublasDestroy_v2", &b->destroy) ||
        !find_symbol(library, "cublasSetStream_v2", &b->set_stream) ||
        !find_symbol(library, "cublasSetWorkspace_v2", &b->set_workspace) ||
        !find_symbol(library, "cublasGemmEx", &b->gemm) || b->create(&b->handle) != CUBLAS_STATUS_SUCCESS) {
        snprintf(m->why, sizeof m->why, "cuBLAS is there but does not start");
        b->handle = nullptr;
        return false;
    }
    return true;
}

void cuda_close(bench_machine *base)
{
    cuda_machine *m = self(base);
    cuda_release(base, &m->read_call);
    cuda_release(base, &m->dense_call);
    if (m->cublas.handle)
        m->cublas.destroy(m->cublas.handle);
    cudaFree(m->flush);
    cudaFree(m->sink);
    cudaFree(m->segments);
    cudaFree(m->blas_workspace);
    cudaFree(m->dense);
    if (m->begin)
        cudaEventDestroy(m->begin);
    if (m->end)
        cudaEventDestroy(m->end);
    if (m->stream)
        cudaStreamDestroy(m->stream);
    free(m);
}

} // namespace

extern "C" moe_status bench_cuda_open(int32_t device, bench_machine **machine, moe_error *err)
{
    *machine = nullptr;
    auto *m = static_cast<cuda_machine *>(calloc(1, sizeof(cuda_machine)));
    if (!m)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for the probes");
    m->device = device;
    m->base.point = cuda_point;
    m->base.read = cuda_read;
    m->base.dense = cuda_dense;
    m->base.prepare = cuda_prepare;
    m->base.time = cuda_time;
    m->base.release = cuda_release;
    m->base.close = cuda_close;
    m->base.read_how = "plain read of the touched experts' weights";
    m->base.dense_how = "cuBLAS, two products of the same FLOPs";
    m->read_call.run = run_read;
    m->dense_call.run = run_dense;
    m->read_call.argument = m->dense_call.argument = m;

    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&m->sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess)
        error = cudaEventCreate(&m->begin);
    if (error == cudaSuccess)
        error = cudaEventCreate(&m->end);
    if (error == cudaSuccess)
        error = cudaMalloc(&m->flush, flush_bytes);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(m->flush, 1, flush_bytes, m->stream);
    if (error == cudaSuccess)
        error = cudaMalloc(&m->sink, sizeof *m->sink);
    if (error == cudaSuccess)
        error = cudaMalloc(&m->segments, 2 * MOE_MAX_EXPERTS * sizeof(segment));
    if (error == cudaSuccess)
        error = cudaMalloc(&m->blas_workspace, blas_workspace_bytes);
    if (error == cudaSuccess && !find_blas(m)) {
        m->base.dense_how = nullptr;
        m->base.dense_why = m->why;
    }
    moe_status status = checked(error, "setting up the probes", err);
    if (status != MOE_OK)
        cuda_close(&m->base);
    else
        *machine = &m->base;
    return status;
}
