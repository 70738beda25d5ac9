/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/tensor_io.h"

#include <stdio.h>
#include <stdlib.h>

#include "config/convert.h"
#include "config/file.h"
#include "models/safetensors.h"

/* The tensor `name`, which must be a matrix of `rows` rows (-1: any number). */
static moe_status find_matrix(const struct moe_st_file *file, const char *name, int64_t rows,
                              const struct moe_st_tensor **tensor, struct moe_error *err)
{
    const char *path = moe_st_path(file);
    *tensor = moe_st_find(file, name);
    if (!*tensor)
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' is missing", path, name);
    if ((*tensor)->rank != 2)
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' has %d dimensions, expected 2", path, name,
                        (*tensor)->rank);
    if (rows >= 0 && (*tensor)->shape[0] != rows)
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' has %lld rows, but 'hidden_states' has %lld", path, name,
                        (long long)(*tensor)->shape[0], (long long)rows);
    return MOE_OK;
}

static moe_status wrong_dtype(const struct moe_st_file *file, const struct moe_st_tensor *tensor, const char *expected,
                              struct moe_error *err)
{
    return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%s' is %s, expected %s", moe_st_path(file), tensor->name,
                    tensor->dtype, expected);
}

/* Copies a tensor's bytes. Reading, not the mapping: tensors may be unaligned, and a file that is cut short meanwhile
 * is an error then and not a signal. */
static moe_status read_tensor(const struct moe_st_file *file, const struct moe_st_tensor *tensor, const void **data,
                              struct moe_error *err)
{
    void *copy = malloc(tensor->bytes ? (size_t)tensor->bytes : 1);
    if (!copy)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: no memory for the %llu bytes of tensor '%s'",
                        moe_st_path(file), (unsigned long long)tensor->bytes, tensor->name);
    *data = copy;
    return moe_file_read(moe_st_descriptor(file), moe_st_path(file), tensor->offset, copy, tensor->bytes, err);
}

static moe_status read_routing(const struct moe_st_file *file, struct host_batch *batch, struct moe_error *err)
{
    const struct moe_st_tensor *ids, *weights;
    moe_status status = find_matrix(file, "topk_ids", batch->tokens, &ids, err);
    if (status == MOE_OK)
        status = find_matrix(file, "topk_weights", batch->tokens, &weights, err);
    if (status != MOE_OK)
        return status;
    if (ids->type != MOE_I32 && ids->type != MOE_I64)
        return wrong_dtype(file, ids, "I32 or I64", err);
    if (weights->type != MOE_F32)
        return wrong_dtype(file, weights, "F32", err);
    if (ids->shape[1] < 1 || ids->shape[1] > MOE_MAX_TOP_K)
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor 'topk_ids' has %lld columns, expected 1 to %d",
                        moe_st_path(file), (long long)ids->shape[1], MOE_MAX_TOP_K);
    if (weights->shape[1] != ids->shape[1])
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor 'topk_weights' has %lld columns, but 'topk_ids' has %lld",
                        moe_st_path(file), (long long)weights->shape[1], (long long)ids->shape[1]);
    batch->ids_dtype = ids->type;
    batch->top_k = (int32_t)ids->shape[1];
    const void *data = NULL;
    status = read_tensor(file, ids, &batch->topk_ids, err);
    if (status == MOE_OK)
        status = read_tensor(file, weights, &data, err);
    batch->topk_weights = data;
    return status;
}

static moe_status read_batch(const struct moe_st_file *file, int64_t hidden, bool routing, struct host_batch *batch,
                             struct moe_error *err)
{
    const struct moe_st_tensor *x;
    moe_status status = find_matrix(file, "hidden_states", -1, &x, err);
    if (status != MOE_OK)
        return status;
    if (!moe_dtype_is_float(x->type))
        return wrong_dtype(file, x, "BF16, F16 or F32", err);
    if (x->shape[1] != hidden)
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: tensor 'hidden_states' has %lld columns, the model's hidden_size is %lld",
                        moe_st_path(file), (long long)x->shape[1], (long long)hidden);
    batch->tokens = x->shape[0];
    batch->hidden = hidden;
    batch->dtype = x->type;
    status = read_tensor(file, x, &batch->hidden_states, err);
    return status == MOE_OK && routing ? read_routing(file, batch, err) : status;
}

moe_status host_batch_read(const char *path, int64_t hidden, bool routing, struct host_batch *batch,
                           struct moe_error *err)
{
    memset(batch, 0, sizeof *batch);
    struct moe_st_file *file = NULL;
    moe_status status = moe_st_open(path, &file, err);
    if (status == MOE_OK)
        status = read_batch(file, hidden, routing, batch, err);
    moe_st_close(file);
    if (status != MOE_OK)
        host_batch_free(batch);
    return status;
}

void host_batch_free(struct host_batch *batch)
{
    free((void *)batch->hidden_states);
    free((void *)batch->topk_ids);
    free((void *)batch->topk_weights);
    memset(batch, 0, sizeof *batch);
}
