/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/device.h"

#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

bool moe_cuda_built(void)
{
    return true;
}

/* Reading the error clears it, so that one failed call does not poison the next. */
static moe_status failed(struct moe_error *err, const char *what, cudaError_t e)
{
    cudaGetLastError();
    return moe_fail(err, MOE_ERROR_DEVICE, "%s: %s", what, cudaGetErrorString(e));
}

/* The thread's current device; -1: none. */
static int32_t current_device(void)
{
    int device;

    if (cudaGetDevice(&device) != cudaSuccess) {
        cudaGetLastError();
        return -1;
    }
    return device;
}

void moe_cuda_leave(int32_t previous)
{
    if (previous >= 0 && previous != current_device() && cudaSetDevice(previous) != cudaSuccess)
        cudaGetLastError();
}

static moe_status set_device(int32_t device, struct moe_error *err)
{
    cudaError_t e = cudaSetDevice(device);

    return e == cudaSuccess ? MOE_OK : failed(err, "cudaSetDevice", e);
}

static moe_status stream_state(void *stream, bool *capturing, struct moe_error *err)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaError_t e;

    /* An error that the caller left unread would be taken for one of our launches. */
    cudaGetLastError();
    e = cudaStreamIsCapturing((cudaStream_t)stream, &capture);
    if (e == cudaErrorStreamCaptureImplicit) {
        cudaGetLastError();
        return moe_fail(err, MOE_ERROR_CAPTURE,
                        "the default stream cannot be used while another stream is being captured");
    }
    if (e != cudaSuccess)
        return failed(err, "stream", e);
    if (capture == cudaStreamCaptureStatusInvalidated)
        return moe_fail(err, MOE_ERROR_CAPTURE, "the capture of this stream has become invalid");
    *capturing = capture == cudaStreamCaptureStatusActive;
    return MOE_OK;
}

moe_status moe_cuda_enter(int32_t device, void *stream, int32_t *previous, bool *capturing, struct moe_error *err)
{
    moe_status status;

    *previous = current_device();
    *capturing = false;
    status = set_device(device, err);
    if (status == MOE_OK)
        status = stream_state(stream, capturing, err);
    if (status != MOE_OK)
        moe_cuda_leave(*previous);
    return status;
}

/* ---- Which device ---- */

static moe_status no_device(struct moe_error *err, cudaError_t e)
{
    int driver = 0;

    cudaGetLastError();
    if (e == cudaErrorNoDevice)
        return moe_fail(err, MOE_ERROR_NO_DEVICE, "no CUDA GPU");
    if (cudaDriverGetVersion(&driver) != cudaSuccess)
        cudaGetLastError();
    if (driver == 0)
        return moe_fail(err, MOE_ERROR_NO_DEVICE, "no CUDA driver");
    if (e == cudaErrorInsufficientDriver)
        return moe_fail(err, MOE_ERROR_NO_DEVICE, "the driver is too old for CUDA %d.%d: it knows CUDA %d.%d",
                        CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, driver / 1000, driver % 1000 / 10);
    return moe_fail(err, MOE_ERROR_NO_DEVICE, "CUDA: %s", cudaGetErrorString(e));
}

static moe_status open_device(int32_t device, struct moe_cuda_facts *facts, struct moe_error *err)
{
    struct cudaDeviceProp prop;
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    moe_status status;

    if (e != cudaSuccess)
        return no_device(err, e);
    if (count == 0)
        return no_device(err, cudaErrorNoDevice);
    if (device < 0 || device >= count)
        return moe_fail(err, MOE_ERROR_NO_DEVICE, "CUDA device %d: this machine has devices 0 to %d", (int)device,
                        count - 1);
    e = cudaGetDeviceProperties(&prop, device);
    if (e != cudaSuccess)
        return failed(err, "cudaGetDeviceProperties", e);
    if (prop.major < 8)
        return moe_fail(err, MOE_ERROR_NO_DEVICE, "CUDA device %d (%s) has compute capability %d.%d, 8.0 is needed",
                        (int)device, prop.name, prop.major, prop.minor);

    memset(facts, 0, sizeof *facts);
    memcpy(facts->name, prop.name, sizeof facts->name - 1);
    facts->sms = prop.multiProcessorCount;
    facts->compute_capability = prop.major * 10 + prop.minor;
    facts->shared_bytes = (int32_t)prop.sharedMemPerBlockOptin;
    facts->memory_bytes = prop.totalGlobalMem;
    facts->l2_bytes = (uint64_t)prop.l2CacheSize;
    /* Makes the device's context now, so that a GPU in a bad state is found here. */
    status = set_device(device, err);
    return status == MOE_OK ? moe_cuda_probe(&facts->cluster, err) : status;
}

moe_status moe_cuda_open(int32_t device, struct moe_cuda_facts *facts, struct moe_error *err)
{
    int32_t previous = current_device();
    moe_status status = open_device(device, facts, err);

    moe_cuda_leave(previous);
    return status;
}

/* ---- Memory and copies ---- */

moe_status moe_cuda_alloc(int32_t device, size_t bytes, void **pointer, struct moe_error *err)
{
    int32_t previous = current_device();
    moe_status status = set_device(device, err);

    *pointer = NULL;
    if (status == MOE_OK) {
        cudaError_t e = cudaMalloc(pointer, bytes ? bytes : 1);

        if (e == cudaErrorMemoryAllocation) {
            size_t free_bytes = 0, total = 0;

            cudaGetLastError();
            if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess)
                cudaGetLastError();
            status =
                moe_fail(err, MOE_ERROR_DEVICE_MEMORY, "CUDA device %d: %zu bytes of memory asked, %zu of %zu are free",
                         (int)device, bytes, free_bytes, total);
        } else if (e != cudaSuccess) {
            status = failed(err, "cudaMalloc", e);
        }
    }
    moe_cuda_leave(previous);
    return status;
}

void moe_cuda_free(int32_t device, void *pointer)
{
    int32_t previous;

    if (!pointer)
        return;
    previous = current_device();
    if (set_device(device, NULL) == MOE_OK && cudaFree(pointer) != cudaSuccess)
        cudaGetLastError();
    moe_cuda_leave(previous);
}

moe_status moe_cuda_copy(int32_t device, void *to, const void *from, size_t bytes, void *stream, struct moe_error *err)
{
    int32_t previous = current_device();
    moe_status status = set_device(device, err);

    if (status == MOE_OK && bytes > 0) {
        cudaError_t e = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream);

        if (e == cudaSuccess)
            e = cudaStreamSynchronize((cudaStream_t)stream);
        if (e != cudaSuccess)
            status = failed(err, "copy", e);
    }
    moe_cuda_leave(previous);
    return status;
}

moe_status moe_cuda_synchronize(int32_t device, void *stream, struct moe_error *err)
{
    int32_t previous = current_device();
    moe_status status = set_device(device, err);

    if (status == MOE_OK) {
        cudaError_t e = cudaStreamSynchronize((cudaStream_t)stream);

        if (e != cudaSuccess)
            status = failed(err, "stream", e);
    }
    moe_cuda_leave(previous);
    return status;
}

/* ---- Pinned staging ---- */

/* Two would do for copies of equal speed; a third covers a reader that is late now and then. */
enum { STAGE_BUFFERS = 3 };

struct moe_cuda_stage {
    int32_t device;
    cudaStream_t stream; /* of its own, so that copies wait for nobody's work */
    void *landing;       /* device memory for rows on their way to a packed stack; in stream order one is enough */
    void *host[STAGE_BUFFERS];
    cudaEvent_t done[STAGE_BUFFERS]; /* the last copy of that buffer */
    int current;
};

static moe_status make_buffers(struct moe_cuda_stage *stage, size_t bytes, struct moe_error *err)
{
    cudaError_t e = cudaStreamCreateWithFlags(&stage->stream, cudaStreamNonBlocking);

    for (int i = 0; i < STAGE_BUFFERS && e == cudaSuccess; i++) {
        e = cudaHostAlloc(&stage->host[i], bytes ? bytes : 1, cudaHostAllocDefault);
        if (e == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no %zu bytes of pinned memory", bytes);
        }
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&stage->done[i], cudaEventDisableTiming);
    }
    return e == cudaSuccess ? MOE_OK : failed(err, "staging buffers", e);
}

moe_status moe_cuda_stage_create(int32_t device, size_t bytes, bool lands, struct moe_cuda_stage **stage,
                                 struct moe_error *err)
{
    int32_t previous = current_device();
    struct moe_cuda_stage *s = calloc(1, sizeof *s);
    moe_status status;

    *stage = NULL;
    if (!s)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for a staging buffer");
    s->device = device;
    status = set_device(device, err);
    if (status == MOE_OK)
        status = make_buffers(s, bytes, err);
    moe_cuda_leave(previous);
    if (status == MOE_OK && lands)
        status = moe_cuda_alloc(device, bytes, &s->landing, err);
    if (status != MOE_OK) {
        moe_cuda_stage_destroy(s, NULL);
        return status;
    }
    *stage = s;
    return MOE_OK;
}

moe_status moe_cuda_stage_next(struct moe_cuda_stage *stage, void **host, struct moe_error *err)
{
    cudaError_t e;

    stage->current = (stage->current + 1) % STAGE_BUFFERS;
    *host = stage->host[stage->current];
    e = cudaEventSynchronize(stage->done[stage->current]); /* at once if the buffer was never sent */
    return e == cudaSuccess ? MOE_OK : failed(err, "copy to the device", e);
}

static moe_status start_copy(struct moe_cuda_stage *stage, void *device, size_t bytes, struct moe_error *err)
{
    cudaError_t e = cudaMemcpyAsync(device, stage->host[stage->current], bytes, cudaMemcpyHostToDevice, stage->stream);

    if (e == cudaSuccess)
        e = cudaEventRecord(stage->done[stage->current], stage->stream);
    return e == cudaSuccess ? MOE_OK : failed(err, "copy to the device", e);
}

moe_status moe_cuda_stage_send(struct moe_cuda_stage *stage, void *device, size_t bytes, struct moe_error *err)
{
    int32_t previous = current_device();
    moe_status status = set_device(stage->device, err);

    if (status == MOE_OK)
        status = start_copy(stage, device, bytes, err);
    moe_cuda_leave(previous);
    return status;
}

moe_status moe_cuda_stage_pack(struct moe_cuda_stage *stage, const struct moe_weights_view *view, bool w13,
                               int64_t first, int64_t rows, void *packed, struct moe_error *err)
{
    size_t bytes = (size_t)rows * (size_t)view->cols * moe_dtype_size(view->dtype);
    int32_t previous = current_device();
    moe_status status = set_device(stage->device, err);

    if (status == MOE_OK)
        status = start_copy(stage, stage->landing, bytes, err);
    if (status == MOE_OK)
        status = moe_pack_rows(view, w13, first, rows, stage->landing, packed, stage->stream, err);
    moe_cuda_leave(previous);
    return status;
}

moe_status moe_cuda_stage_destroy(struct moe_cuda_stage *stage, struct moe_error *err)
{
    cudaError_t e = cudaSuccess;
    int32_t previous;

    if (!stage)
        return MOE_OK;
    previous = current_device();
    if (set_device(stage->device, NULL) == MOE_OK) {
        if (stage->stream) {
            e = cudaStreamSynchronize(stage->stream);
            cudaStreamDestroy(stage->stream);
        }
        for (int i = 0; i < STAGE_BUFFERS; i++) {
            if (stage->done[i])
                cudaEventDestroy(stage->done[i]);
            if (stage->host[i])
                cudaFreeHost(stage->host[i]);
        }
        if (stage->landing)
            cudaFree(stage->landing);
    }
    moe_cuda_leave(previous);
    free(stage);
    return e == cudaSuccess ? MOE_OK : failed(err, "copy to the device", e);
}
