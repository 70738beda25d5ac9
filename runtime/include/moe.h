/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libmoe: the mixture-of-experts layer of a transformer, hidden states in, hidden states out.
 *
 * The shortest use, on the CPU (tests compile and run tools/examples/forward.c, the same thing whole):
 *
 *     moe_context *ctx;  moe_checkpoint *ckpt;  moe_layer *layer;
 *     moe_context_create(NULL, &ctx);
 *     moe_checkpoint_open(ctx, "Mixtral-8x7B-v0.1", &ckpt);
 *     moe_layer_load(ckpt, 0, NULL, &layer);
 *
 *     moe_batch batch = moe_batch_init();
 *     batch.tokens = tokens;
 *     batch.hidden_states = x;  batch.output = y;  batch.dtype = MOE_BF16;
 *
 *     moe_limits limits = moe_limits_init();
 *     limits.max_tokens = tokens;
 *     size_t bytes;
 *     moe_workspace_size(layer, &limits, &bytes);
 *     void *workspace = aligned_alloc(MOE_WORKSPACE_ALIGNMENT, bytes);
 *     moe_forward(layer, &batch, workspace, bytes, NULL);
 *
 * Rules that hold for every call:
 * - Every call that can fail returns a moe_status. The library never aborts, exits or prints.
 * - Handles come from a create/open/load call and go to the destroy/close call of the same name, which
 *   accepts NULL. A handle must be destroyed before the context it was made from.
 * - moe_forward, moe_route and moe_experts_forward only enqueue on the caller's stream: they allocate
 *   nothing, do not wait for the device and do not read counts on the host, unless the path says so
 *   (see moe_path). On a CPU context they are done when they return.
 * - A context, a checkpoint and a layer may be used from several threads at once; a workspace serves one
 *   call in flight.
 * - Structs that cross the interface begin with their size, set by their *_init function, so that a caller
 *   compiled against an older header keeps working.
 */
#ifndef MOE_H
#define MOE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0
#define MOE_VERSION (MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH)

#if defined(_WIN32)
#define MOE_API
#else
#define MOE_API __attribute__((visibility("default")))
#endif

/* The version of the library in use, as MOE_VERSION encodes it. */
MOE_API int moe_version(void);

/* ---- Status ------------------------------------------------------------------------------------------ */

/* name, number (fixed for ever), what moe_status_string returns */
#define MOE_STATUS_MAP(X)                                                                                    \
    X(MOE_OK, 0, "success")                                                                                  \
    X(MOE_ERROR_INVALID_ARGUMENT, 1, "invalid argument")                                                     \
    X(MOE_ERROR_WORKSPACE, 2, "workspace missing, misaligned or too small")                                  \
    X(MOE_ERROR_UNSUPPORTED, 3, "not supported by this machine, build or path")                              \
    X(MOE_ERROR_NO_DEVICE, 4, "no usable device")                                                            \
    X(MOE_ERROR_CAPTURE, 5, "this path synchronises and cannot be captured in a graph")                      \
    X(MOE_ERROR_OUT_OF_MEMORY, 6, "out of host memory")                                                      \
    X(MOE_ERROR_DEVICE_MEMORY, 7, "out of device memory")                                                    \
    X(MOE_ERROR_DEVICE, 8, "device error")                                                                   \
    X(MOE_ERROR_FILE, 9, "input file missing, unreadable, malformed or of an unknown kind")                  \
    X(MOE_ERROR_WRITE, 10, "output file could not be written")                                               \
    X(MOE_ERROR_MISMATCH, 11, "results differ")

typedef enum moe_status {
#define MOE_STATUS_ENUM(name, number, text) name = number,
    MOE_STATUS_MAP(MOE_STATUS_ENUM)
#undef MOE_STATUS_ENUM
} moe_status;

/* A constant text for a status; never NULL, also for numbers that are not a status. */
MOE_API const char *moe_status_string(moe_status status);

/* ---- Types -------------------------------------------------------------------------------------------- */

typedef enum moe_dtype {
    MOE_DTYPE_NONE = 0,
    MOE_BF16 = 1,
    MOE_F16 = 2,
    MOE_F32 = 3,
    MOE_I32 = 4,
    MOE_I64 = 5,
} moe_dtype;

/* Bytes of one element; 0 for a number that is no dtype. */
MOE_API size_t moe_dtype_size(moe_dtype dtype);
/* "bf16", "f16", "f32", "i32", "i64"; "?" otherwise. */
MOE_API const char *moe_dtype_name(moe_dtype dtype);

typedef enum moe_device {
    MOE_DEVICE_AUTO = 0, /* the CUDA GPU that device_index names if it works, else the CPU */
    MOE_DEVICE_CPU = 1,
    MOE_DEVICE_CUDA = 2,
} moe_device;

/*
 * A path is one way to run the layer. The same batch gives the same bits from run to run on one path and device.
 *
 *   reference       plain C, one thread; what every other path is checked against
 *   cpu             all cores, AVX2 or AVX-512 by what the machine has
 *   cublas-loop     CUDA: one cublasGemmEx an expert                             (1)
 *   cublas-grouped  CUDA: cublasGemmGroupedBatchedEx                             (1)
 *   padded          CUDA: every expert padded to the largest count, strided batch (1)
 *   simple          CUDA: our readable grouped GEMM, one launch for all experts
 *   decode          CUDA: for few tokens, bound by reading weights               (2)
 *   prefill         CUDA: our fast grouped GEMM, for many tokens                 (2)
 *
 * (1) reads the counts on the host: it waits for the stream, and returns MOE_ERROR_CAPTURE while the stream
 *     is being captured. `auto` never picks it.
 * (2) weights in bf16 or f16, packed or row-major; hidden_size and intermediate_size are multiples of 8. Can be
 *     captured, as `simple` can. Unless a tuned table says otherwise, `auto` on CUDA takes one of these two wherever
 *     they can run, decode up to a number of tokens that follows from device and shape; else `simple`. All other paths
 *     read row-major weights only (see moe_layout).
 */
#define MOE_PATH_MAP(X)                                                                                      \
    X(MOE_PATH_AUTO, 0, "auto")                                                                              \
    X(MOE_PATH_REFERENCE, 1, "reference")                                                                    \
    X(MOE_PATH_CPU, 2, "cpu")                                                                                \
    X(MOE_PATH_CUBLAS_LOOP, 3, "cublas-loop")                                                                \
    X(MOE_PATH_CUBLAS_GROUPED, 4, "cublas-grouped")                                                          \
    X(MOE_PATH_PADDED, 5, "padded")                                                                          \
    X(MOE_PATH_SIMPLE, 6, "simple")                                                                          \
    X(MOE_PATH_DECODE, 7, "decode")                                                                          \
    X(MOE_PATH_PREFILL, 8, "prefill")

typedef enum moe_path {
#define MOE_PATH_ENUM(name, number, text) name = number,
    MOE_PATH_MAP(MOE_PATH_ENUM)
#undef MOE_PATH_ENUM
    MOE_PATH_COUNT
} moe_path;

/* "auto", "reference", ...; NULL for a number that is no path. */
MOE_API const char *moe_path_name(moe_path path);
/* The path of that name in *path; MOE_ERROR_INVALID_ARGUMENT for an unknown name. */
MOE_API moe_status moe_path_from_name(const char *name, moe_path *path);
/* A few words on configuration `config` of a path, for moe_batch.config: they are numbered from 1 without gaps. NULL
 * past the last one, for a path that has none and for a number that is no path. Not every device can run every one: a
 * batch that names such a one gets MOE_ERROR_UNSUPPORTED. */
MOE_API const char *moe_path_config_name(moe_path path, int32_t config);

/* ---- Context: a device, its threads or handles, and where messages go ---------------------------------- */

typedef struct moe_context moe_context;
typedef struct moe_checkpoint moe_checkpoint;
typedef struct moe_layer moe_layer;
typedef struct moe_capture moe_capture;
typedef struct moe_session moe_session;

typedef enum moe_log_level { MOE_LOG_WARNING = 1, MOE_LOG_INFO = 2 } moe_log_level;

/* `text` is one line without a newline and lives only during the call. May be called from any thread that
 * calls the library. Never called from moe_forward, moe_route or moe_experts_forward. */
typedef void (*moe_log_fn)(void *user, moe_log_level level, const char *text);

typedef struct moe_context_options {
    size_t size;
    moe_device device;
    int32_t device_index; /* CUDA device; ignored on the CPU */
    int32_t threads;      /* CPU threads, the caller's included; 0: as many as the process may use */
    moe_log_fn log;       /* NULL: silent */
    void *log_user;
    const char *tuned;    /* file that `moe tune` wrote, by which auto chooses on the device that it was measured on
                             (another device's is passed over, with a warning); NULL: the one that the environment
                             variable MOE_TUNED names, if it is set; "": none */
} moe_context_options;

static inline moe_context_options moe_context_options_init(void)
{
    moe_context_options o;
    memset(&o, 0, sizeof o);
    o.size = sizeof o;
    return o;
}

/* options NULL: the defaults. Without a CUDA driver MOE_DEVICE_CUDA gives MOE_ERROR_NO_DEVICE, a tuned table that
 * cannot be read or names what cannot run MOE_ERROR_FILE. */
MOE_API moe_status moe_context_create(const moe_context_options *options, moe_context **ctx);
MOE_API void moe_context_destroy(moe_context *ctx);

/* Copies the text of the last failure on this context (or, with ctx NULL, of the last failed call of this
 * thread that had no context yet) into buffer, truncated and always terminated. Empty if nothing failed. */
MOE_API void moe_last_error(const moe_context *ctx, char *buffer, size_t bytes);

typedef struct moe_device_info {
    size_t size;
    moe_device device;      /* never AUTO */
    int32_t device_index;
    char name[256];
    int32_t cores;          /* CPU: threads used; CUDA: SMs */
    int32_t compute_capability; /* CUDA: 90 for 9.0; CPU: 0 */
    uint64_t memory_bytes;  /* the device's memory, in all */
    uint64_t l2_bytes;      /* CUDA: L2; CPU: last-level cache if known */
    char features[128];     /* CPU: the instruction sets that `cpu` uses */
} moe_device_info;

static inline moe_device_info moe_device_info_init(void)
{
    moe_device_info i;
    memset(&i, 0, sizeof i);
    i.size = sizeof i;
    return i;
}

MOE_API moe_status moe_context_device(const moe_context *ctx, moe_device_info *info);

/* Memory and copies on the context's device, for callers that have no CUDA headers. On a CPU context these are
 * plain memory. Allocation is aligned to MOE_WORKSPACE_ALIGNMENT and not initialised. Copies with a CUDA context
 * are ordered on `stream` and have arrived when the call returns. */
MOE_API moe_status moe_buffer_alloc(moe_context *ctx, size_t bytes, void **pointer);
MOE_API void moe_buffer_free(moe_context *ctx, void *pointer);
MOE_API moe_status moe_copy_in(moe_context *ctx, void *device, const void *host, size_t bytes, void *stream);
MOE_API moe_status moe_copy_out(moe_context *ctx, void *host, const void *device, size_t bytes, void *stream);
/* Waits for the stream and reports what went wrong on it. */
MOE_API moe_status moe_synchronize(moe_context *ctx, void *stream);

/* ---- Checkpoint: a Hugging Face directory --------------------------------------------------------------- */

/* directory holds config.json and model.safetensors, or model.safetensors.index.json and its shards, or some shards
 * (model*.safetensors) alone. Shards may be missing: a layer that is whole in those at hand can be loaded. Reads and
 * checks headers only. */
MOE_API moe_status moe_checkpoint_open(moe_context *ctx, const char *directory, moe_checkpoint **checkpoint);
MOE_API void moe_checkpoint_close(moe_checkpoint *checkpoint);

typedef enum moe_activation { MOE_ACTIVATION_SILU = 1 } moe_activation;
typedef enum moe_scoring { MOE_SCORING_SOFTMAX = 1 } moe_scoring;

/* What one MoE layer is. Row-major matrices, row = output feature. */
typedef struct moe_layer_desc {
    size_t size;
    int64_t hidden_size;
    int64_t intermediate_size;
    int32_t num_experts;
    int32_t top_k;
    moe_dtype dtype;          /* of the expert weights, and of the arithmetic's operands */
    moe_dtype gate_dtype;     /* of the router's weight; MOE_DTYPE_NONE in moe_layer_create: as dtype */
    moe_scoring scoring;      /* over the experts' logits, in fp32 */
    int32_t renormalize;      /* 1: the top_k weights are divided by their sum */
    moe_dtype logits_dtype;   /* logits accumulate in fp32, then round to this */
    moe_dtype topk_weight_dtype; /* weights are computed in fp32, then round to this */
    moe_activation activation; /* expert(x) = down(activation(gate x) * up x) */
} moe_layer_desc;

/* Zeroes, with Mixtral's rule: softmax, renormalised, SiLU; logits round to `dtype`, weights stay fp32. */
static inline moe_layer_desc moe_layer_desc_init(moe_dtype dtype)
{
    moe_layer_desc d;
    memset(&d, 0, sizeof d);
    d.size = sizeof d;
    d.dtype = d.gate_dtype = d.logits_dtype = dtype;
    d.scoring = MOE_SCORING_SOFTMAX;
    d.renormalize = 1;
    d.topk_weight_dtype = MOE_F32;
    d.activation = MOE_ACTIVATION_SILU;
    return d;
}

typedef struct moe_checkpoint_info {
    size_t size;
    char model_type[64];
    int32_t num_layers;
    int32_t first_moe_layer; /* -1: none */
    int32_t num_files;
    uint64_t file_bytes;     /* of all safetensors files */
} moe_checkpoint_info;

static inline moe_checkpoint_info moe_checkpoint_info_init(void)
{
    moe_checkpoint_info i;
    memset(&i, 0, sizeof i);
    i.size = sizeof i;
    return i;
}

MOE_API moe_status moe_checkpoint_describe(const moe_checkpoint *checkpoint, moe_checkpoint_info *info);
/* Describes layer `index` from config and tensor headers, without reading weights. MOE_ERROR_FILE if it is not a
 * whole MoE layer; the message names the tensor. */
MOE_API moe_status moe_checkpoint_layer(const moe_checkpoint *checkpoint, int32_t index, moe_layer_desc *desc);

/* ---- Layer ------------------------------------------------------------------------------------------------ */

/* How a layer's expert weights lie in memory. A layer has one layout; a path that cannot read it is unavailable. */
typedef enum moe_layout {
    MOE_LAYOUT_AUTO = 0,      /* the one for the fastest path on this device and shape */
    MOE_LAYOUT_ROW_MAJOR = 1, /* the canonical form, as moe_layer_weights describes it: every path reads it */
    MOE_LAYOUT_PACKED = 2,    /* where `decode` and `prefill` can run, which read it fastest: tiles, a little larger
                                 where sizes are no multiples of 64 */
} moe_layout;

/* Called by moe_layer_load on the calling thread, a few hundred times at most. */
typedef void (*moe_progress_fn)(void *user, uint64_t bytes_done, uint64_t bytes_total);

typedef struct moe_load_options {
    size_t size;
    moe_progress_fn progress; /* NULL: none */
    void *progress_user;
    moe_layout layout; /* of the layer; MOE_ERROR_UNSUPPORTED where it is PACKED and neither `decode` nor `prefill` can
                          run */
} moe_load_options;

static inline moe_load_options moe_load_options_init(void)
{
    moe_load_options o;
    memset(&o, 0, sizeof o);
    o.size = sizeof o;
    return o;
}

/* Loads layer `index` into the memory of the checkpoint's context: one copy, the library's own. The checkpoint may be
 * closed afterwards. */
MOE_API moe_status moe_layer_load(moe_checkpoint *checkpoint, int32_t index, const moe_load_options *options,
                                  moe_layer **layer);

/* The caller's own weights, on the context's device, 16-byte aligned, complete when the layer is created and unchanged
 * until it is destroyed: a forward may read them before what is ahead of it in its stream has ended. w13 and w2 are
 * these matrices in row-major order, or what a packed layer holds in their place. */
typedef struct moe_layer_weights {
    size_t size;
    const void *gate; /* [num_experts, hidden_size], gate_dtype; NULL if only moe_experts_forward is used */
    const void *w13;  /* [num_experts, 2 * intermediate_size, hidden_size], dtype: gate rows, then up rows */
    const void *w2;   /* [num_experts, hidden_size, intermediate_size], dtype */
    moe_layout layout; /* of w13 and w2; in moe_layer_create AUTO means row-major, and PACKED that they are another
                          layer's, of the same shape */
} moe_layer_weights;

static inline moe_layer_weights moe_layer_weights_init(void)
{
    moe_layer_weights w;
    memset(&w, 0, sizeof w);
    w.size = sizeof w;
    return w;
}

MOE_API moe_status moe_layer_create(moe_context *ctx, const moe_layer_desc *desc, const moe_layer_weights *weights,
                                    moe_layer **layer);
/* A packed copy of a row-major layer, which owns all its weights. Runs on the default stream and waits for it: work
 * that writes the weights on other streams must have finished. */
MOE_API moe_status moe_layer_pack(const moe_layer *layer, moe_layer **packed);
MOE_API void moe_layer_destroy(moe_layer *layer);
MOE_API moe_status moe_layer_describe(const moe_layer *layer, moe_layer_desc *desc);
/* The layer's weights, on the context's device, in the form of moe_layer_weights. They belong to the layer. */
MOE_API moe_status moe_layer_weights_get(const moe_layer *layer, moe_layer_weights *weights);

/* ---- Running ------------------------------------------------------------------------------------------------ */

#define MOE_WORKSPACE_ALIGNMENT 256

/* One batch of tokens. Pointers are on the context's device; hidden_states and output are aligned to 16 bytes. Nothing
 * overlaps output, whose memory the work uses before the result is there. */
typedef struct moe_batch {
    size_t size;
    int64_t tokens;            /* 0 is legal */
    moe_dtype dtype;           /* of hidden_states and output: BF16, F16 or F32; converted if it is not the layer's */
    const void *hidden_states; /* [tokens, hidden_size] */
    void *output;              /* [tokens, hidden_size]; not used by moe_route */

    /* Routing done outside, read by moe_experts_forward. An id outside [0, num_experts) means no expert. */
    const void *topk_ids;      /* [tokens, top_k], ids_dtype */
    const float *topk_weights; /* [tokens, top_k] */
    moe_dtype ids_dtype;       /* MOE_I32 or MOE_I64; MOE_DTYPE_NONE: MOE_I32 */
    int32_t top_k;             /* of topk_ids, 1 to MOE_MAX_TOP_K; 0: the layer's */

    /* What moe_forward and moe_route write beside the output; each may be NULL. */
    float *router_logits_out;  /* [tokens, num_experts] */
    int32_t *topk_ids_out;     /* [tokens, top_k of the layer], by falling score, ties to the lowest id */
    float *topk_weights_out;   /* [tokens, top_k of the layer] */

    moe_path path;             /* MOE_PATH_AUTO: chosen from device, shape and tokens */
    /* CUDA: the most SMs to use, 0: all. A hint: the cublas paths ignore it. On compute capability 9.0 routing, or the
     * plan of given ids, may wait for up to 16 SMs that are free at the same time. With a bound of less than half of all
     * SMs it does not: give one beside kernels that hold SMs until this forward has ended. */
    int32_t max_sms;
    int32_t config;            /* of the path, numbered from 1 (moe_path_config_name); 0: chosen for the batch */
} moe_batch;

#define MOE_MAX_TOP_K 64
#define MOE_MAX_EXPERTS 4096

static inline moe_batch moe_batch_init(void)
{
    moe_batch b;
    memset(&b, 0, sizeof b);
    b.size = sizeof b;
    return b;
}

/* The largest batch that a workspace must serve. A workspace serves every batch within its limits. */
typedef struct moe_limits {
    size_t size;
    int64_t max_tokens;
    int32_t top_k;  /* 0: the layer's */
    moe_path path;  /* a named path, or MOE_PATH_AUTO: whatever auto may choose up to max_tokens */
} moe_limits;

static inline moe_limits moe_limits_init(void)
{
    moe_limits l;
    memset(&l, 0, sizeof l);
    l.size = sizeof l;
    return l;
}

MOE_API moe_status moe_workspace_size(const moe_layer *layer, const moe_limits *limits, size_t *bytes);

/* The whole layer. `workspace` is on the context's device, aligned to MOE_WORKSPACE_ALIGNMENT, and must stay until the
 * work is done; its contents are scratch. `stream` is a cudaStream_t (NULL: the default stream), ignored on the CPU. */
MOE_API moe_status moe_forward(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes,
                               void *stream);
/* Only the router: logits, ids and weights. */
MOE_API moe_status moe_route(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes,
                             void *stream);
/* Only the experts, with the batch's topk_ids and topk_weights. */
MOE_API moe_status moe_experts_forward(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes,
                                       void *stream);

/* Which path a batch of `tokens` would run on, and in `reason` (may be NULL) one line that says which path, in which
 * configuration if it has any (with batch.config and max_sms 0), and why: "prefill, configuration wgmma-192: 128 rows
 * an expert on average". With `wanted` a named path: that path, or MOE_ERROR_UNSUPPORTED and the reason why it cannot
 * run here. */
MOE_API moe_status moe_path_choose(const moe_layer *layer, moe_path wanted, int64_t tokens, moe_path *path,
                                   char *reason, size_t reason_bytes);
/* Whether a path can run, before there is a layer; desc NULL: on any shape. MOE_OK, or MOE_ERROR_UNSUPPORTED and in
 * `reason` (may be NULL) why not. MOE_PATH_AUTO can always run. */
MOE_API moe_status moe_path_available(const moe_context *ctx, moe_path path, const moe_layer_desc *desc, char *reason,
                                      size_t reason_bytes);

/* ---- Captured batches ------------------------------------------------------------------------------------------ */

/*
 * A session is a directory: session.jsonl, one line a batch, and one safetensors file a batch. A batch is in the
 * session when its line is, whole: a process that dies while appending leaves the session without that batch.
 */
typedef struct moe_record {
    size_t size;
    int32_t layer;
    const char *phase;          /* "prefill", "decode" or another word; NULL when appending: "decode" for one token,
                                   else "prefill" */
    int64_t tokens;
    int64_t hidden_size;
    int32_t num_experts;        /* columns of router_logits; 0 without them */
    int32_t top_k;
    moe_dtype dtype;            /* of hidden_states and output */
    double time;                /* seconds since 1970; 0 when appending: now */
    const void *hidden_states;  /* [tokens, hidden_size] */
    const int32_t *topk_ids;    /* [tokens, top_k] */
    const float *topk_weights;  /* [tokens, top_k] */
    const float *router_logits; /* [tokens, num_experts], or NULL */
    const void *output;         /* [tokens, hidden_size], or NULL */
} moe_record;

static inline moe_record moe_record_init(void)
{
    moe_record r;
    memset(&r, 0, sizeof r);
    r.size = sizeof r;
    return r;
}

/* Opens a session directory for appending, made if it does not exist. One writer at a time: a second one gets
 * MOE_ERROR_WRITE. A forked child shares the writer's lock: others can write once the capture is closed here and the
 * child has ended or called exec. A capture serves one thread at a time. */
MOE_API moe_status moe_capture_open(moe_context *ctx, const char *directory, moe_capture **capture);
/* Appends one batch; all pointers are host memory. On failure the session is as before. */
MOE_API moe_status moe_capture_append(moe_capture *capture, const moe_record *record);
MOE_API void moe_capture_close(moe_capture *capture);

/* Opens a session for reading. A last line that was cut short is left out. A session serves one thread at a time. */
MOE_API moe_status moe_session_open(moe_context *ctx, const char *directory, moe_session **session);
MOE_API void moe_session_close(moe_session *session);
MOE_API int64_t moe_session_count(const moe_session *session);
/* Reads record `index` into *record, whose pointers stay valid until the next read or the close. */
MOE_API moe_status moe_session_read(moe_session *session, int64_t index, moe_record *record);

#ifdef __cplusplus
}
#endif

#endif
