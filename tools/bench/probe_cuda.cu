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
constexpr int read_trials = 3;
constexpr int touched_per_launch = 1024;

// One kind of matrix of every expert: expert e's begins e * stride bytes from `data`.
struct stack {
    const char *data;
    uint64_t stride;
    uint32_t chunks; // of a matrix; the last may be short
};

// What a launch of the read reads: matrices of both kinds of some experts. It travels as a parameter, because a list in
// memory would make the first load of every block wait for another one.
struct read_list {
    stack w13, w2;
    uint32_t experts;
    uint16_t ids[touched_per_launch];
};

using read_kernel = void (*)(read_list, uint32_t *);

// A way to read: how a block is made, and how many there are on an SM (0: as many blocks as there are chunks, of which
// the hardware runs those that fit).
struct read_way {
    read_kernel kernel;
    int threads, unroll, blocks_per_sm;
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
    const read_way *way;
    blas cublas;
    void *blas_workspace;
    char *dense; // rows of the products' operands and results
    size_t dense_bytes;
    bench_call read_call, dense_call;
    const bench_point *point;
    moe_error why; // there is no dense ceiling
};

cuda_machine *self(bench_machine *m)
{
    return reinterpret_cast<cuda_machine *>(m);
}

// The status and the text of an error in `what`. Without one err stays as it is.
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

// `pairs`: L2 brings two lines of 128 bytes at a time.
template <bool pairs> __device__ uint4 load_once(const uint4 *from)
{
    uint4 v;
    if (pairs)
        asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from));
    else
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from));
    return v;
}

// All blocks walk the matrices together, so that what is in flight lies close together in memory. A chunk is what a
// block loads at once.
template <int threads, int unroll, bool pairs>
__global__ void __launch_bounds__(threads) read_experts(const __grid_constant__ read_list list, uint32_t *sink)
{
    constexpr uint32_t chunk_bytes = threads * unroll * sizeof(uint4);
    const uint32_t w13_chunks = list.experts * list.w13.chunks, chunks = w13_chunks + list.experts * list.w2.chunks;
    uint32_t sum = 0;
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const bool first = chunk < w13_chunks;
        const stack &from = first ? list.w13 : list.w2;
        const uint32_t index = first ? chunk : chunk - w13_chunks, expert = index / from.chunks;
        const uint64_t begin = (uint64_t)(index - expert * from.chunks) * chunk_bytes;
        // Without the odd bytes around the 16-byte units.
        const uintptr_t matrix = (uintptr_t)from.data + list.ids[expert] * from.stride;
        const uint4 *data = reinterpret_cast<const uint4 *>((matrix + 15) / 16 * 16 + begin) + threadIdx.x;
        const uint4 *end = reinterpret_cast<const uint4 *>((matrix + from.stride) / 16 * 16);
        uint4 v[unroll];
        if (data - threadIdx.x + threads * unroll <= end) {
#pragma unroll
            for (int j = 0; j < unroll; j++)
                v[j] = load_once<pairs>(data + j * threads);
        } else {
#pragma unroll
            for (int j = 0; j < unroll; j++)
                v[j] = data + j * threads < end ? load_once<pairs>(data + j * threads) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int j = 0; j < unroll; j++)
            sum ^= fold(v[j]);
    }
    if (sum == 0x9e3779b9u) // next to never: so that the loads are needed
        *sink = sum;
}

// Which of these is the fastest depends on the GPU and on how much there is to read: each point tries all.
#define WAY(threads, unroll, blocks)                                                                                   \
    {read_experts<threads, unroll, true>, threads, unroll, blocks},                                                    \
    {                                                                                                                  \
        read_experts<threads, unroll, false>, threads, unroll, blocks                                                  \
    }
const read_way read_ways[] = {
    WAY(512, 8, 1), WAY(512, 8, 2), WAY(512, 8, 0), WAY(512, 16, 1), WAY(256, 8, 2), WAY(256, 8, 4),
    WAY(256, 8, 5), WAY(256, 8, 0), WAY(256, 4, 4), WAY(256, 4, 8),  WAY(256, 4, 0),
};

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

stack stack_of(const void *data, uint64_t matrix_bytes, const read_way &way)
{
    uint64_t chunk = (uint64_t)way.threads * way.unroll * sizeof(uint4);
    return {static_cast<const char *>(data), matrix_bytes, (uint32_t)((matrix_bytes + chunk - 1) / chunk)};
}

moe_status run_read(void *machine, void *stream)
{
    auto *m = static_cast<cuda_machine *>(machine);
    const bench_point *p = m->point;
    const read_way &way = *m->way;
    const uint64_t matrix = p->matrix_bytes;
    read_list list;
    list.w13 = stack_of(p->w13, 2 * matrix, way);
    list.w2 = stack_of(p->w2, matrix, way);
    for (int32_t done = 0; done < p->touched; done += (int32_t)list.experts) {
        int32_t left = p->touched - done;
        list.experts = left < touched_per_launch ? left : touched_per_launch;
        for (uint32_t i = 0; i < list.experts; i++)
            list.ids[i] = (uint16_t)p->touched_ids[done + i];
        uint32_t chunks = list.experts * (list.w13.chunks + list.w2.chunks);
        uint32_t blocks = way.blocks_per_sm ? m->sms * way.blocks_per_sm : chunks;
        way.kernel<<<blocks, way.threads, 0, static_cast<cudaStream_t>(stream)>>>(list, m->sink);
    }
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
    if (status == MOE_OK) {
        call->graph = exec;
        status = checked(cudaGraphUpload(exec, m->stream), "uploading a graph", err); // or the first sample would wait
    }
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

// Leaves the fastest way to read this point's weights prepared.
moe_status choose_read(cuda_machine *m, moe_error *err)
{
    const read_way *best = nullptr;
    double least = 0;
    moe_status status = MOE_OK;
    for (const read_way &way : read_ways) {
        m->way = &way;
        status = cuda_prepare(&m->base, &m->read_call, err);
        for (int trial = 0; status == MOE_OK && trial < read_trials; trial++) {
            double seconds;
            status = cuda_read(&m->base, &seconds, err);
            if (status == MOE_OK && (!best || seconds < least)) {
                best = &way;
                least = seconds;
            }
        }
        cuda_release(&m->base, &m->read_call);
        if (status != MOE_OK)
            return status;
    }
    m->way = best;
    return cuda_prepare(&m->base, &m->read_call, err);
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

// A device too small for the operands leaves the point without this ceiling.
moe_status choose_dense(cuda_machine *m, moe_error *err)
{
    moe_status status = set_dense(m, err);
    m->base.dense_why = nullptr;
    if (status == MOE_ERROR_DEVICE_MEMORY) {
        m->why = *err;
        m->base.dense_why = m->why.text;
        *err = {};
        return MOE_OK;
    }
    return status == MOE_OK ? cuda_prepare(&m->base, &m->dense_call, err) : status;
}

moe_status cuda_point(bench_machine *base, const bench_point *p, moe_error *err)
{
    cuda_machine *m = self(base);
    m->point = p;
    base->read_bytes = 3.0 * (double)p->matrix_bytes * p->touched;
    cuda_release(base, &m->read_call);
    cuda_release(base, &m->dense_call);
    moe_status status = checked(cudaSetDevice(m->device), "cudaSetDevice", err);
    if (status == MOE_OK)
        status = choose_read(m, err);
    if (status == MOE_OK && m->cublas.handle)
        status = choose_dense(m, err);
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
        snprintf(m->why.text, sizeof m->why.text, "%s", dlerror());
        return false;
    }
    blas *b = &m->cublas;
    if (!find_symbol(library, "cublasCreate_v2", &b->create) ||
        !find_symbol(library, "cublasDestroy_v2", &b->destroy) ||
        !find_symbol(library, "cublasSetStream_v2", &b->set_stream) ||
        !find_symbol(library, "cublasSetWorkspace_v2", &b->set_workspace) ||
        !find_symbol(library, "cublasGemmEx", &b->gemm) || b->create(&b->handle) != CUBLAS_STATUS_SUCCESS) {
        snprintf(m->why.text, sizeof m->why.text, "cuBLAS is there but does not start");
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
    m->base.read_how = "plain read of the touched experts' weights, the fastest of several loops";
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
        error = cudaMalloc(&m->blas_workspace, blas_workspace_bytes);
    if (error == cudaSuccess && !find_blas(m)) {
        m->base.dense_how = nullptr;
        m->base.dense_why = m->why.text;
    }
    moe_status status = checked(error, "setting up the probes", err);
    if (status != MOE_OK)
        cuda_close(&m->base);
    else
        *machine = &m->base;
    return status;
}
