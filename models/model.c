/* SPDX-License-Identifier: Apache-2.0 */
#include "models/model.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "config/convert.h"
#include "config/file.h"
#include "models/index.h"
#include "models/names.h"

struct shard {
    char *path;
    struct moe_st_file *file; /* NULL until needed */
};

struct moe_model {
    char *directory;
    struct moe_config config;
    bool sharded;
    struct moe_index index; /* if sharded */
    struct shard *shards;   /* [shard_count], in the order of index.files */
    int32_t shard_count;
    uint64_t bytes;
    pthread_mutex_t lock; /* of shards[].file */
};

/* ---- Opening ---- */

static moe_status out_of_memory(const char *directory, struct moe_error *err)
{
    return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", directory);
}

static moe_status check_directory(const char *directory, struct moe_error *err)
{
    struct stat st;
    if (stat(directory, &st))
        return moe_fail(err, MOE_ERROR_FILE, "%s: cannot open the checkpoint directory: %s", directory,
                        strerror(errno));
    if (!S_ISDIR(st.st_mode))
        return moe_fail(err, MOE_ERROR_FILE, "%s: is a file, expected the directory of a checkpoint", directory);
    return MOE_OK;
}

static moe_status load_config(struct moe_model *model, struct moe_error *err)
{
    char *path = moe_file_join(model->directory, "config.json");
    if (!path)
        return out_of_memory(model->directory, err);
    moe_status status = moe_config_load(path, &model->config, err);
    free(path);
    return status;
}

/* Takes over `path`. A file that is not there counts no bytes. */
static moe_status add_shard(struct moe_model *model, char *path, struct moe_error *err)
{
    struct stat st;
    if (!path)
        return out_of_memory(model->directory, err);
    if (stat(path, &st) == 0 && S_ISREG(st.st_mode))
        model->bytes += (uint64_t)st.st_size;
    model->shards[model->shard_count++].path = path;
    return MOE_OK;
}

static moe_status add_shards(struct moe_model *model, int32_t count, struct moe_error *err)
{
    model->shards = calloc((size_t)count, sizeof *model->shards);
    if (!model->shards)
        return out_of_memory(model->directory, err);
    moe_status status = MOE_OK;
    for (int32_t i = 0; i < count && status == MOE_OK; i++)
        status = add_shard(
            model, moe_file_join(model->directory, model->sharded ? model->index.files[i] : "model.safetensors"), err);
    return status;
}

static moe_status find_files(struct moe_model *model, struct moe_error *err)
{
    struct stat st;
    char *single = moe_file_join(model->directory, "model.safetensors");
    char *index = moe_file_join(model->directory, "model.safetensors.index.json");
    moe_status status = MOE_OK;
    if (!single || !index) {
        status = out_of_memory(model->directory, err);
    } else if (stat(single, &st) == 0) {
        status = add_shards(model, 1, err);
        if (status == MOE_OK)
            status = moe_st_open(single, &model->shards[0].file, err);
    } else {
        model->sharded = true;
        status = stat(index, &st) == 0 ? moe_index_load(index, &model->index, err)
                                       : moe_index_scan(model->directory, &model->index, err);
        if (status == MOE_OK)
            status = add_shards(model, model->index.file_count, err);
    }
    free(single);
    free(index);
    return status;
}

moe_status moe_model_open(const char *directory, struct moe_model **out, struct moe_error *err)
{
    *out = NULL;
    moe_status status = check_directory(directory, err);
    if (status != MOE_OK)
        return status;
    struct moe_model *model = calloc(1, sizeof *model);
    if (!model || !(model->directory = strdup(directory))) {
        free(model);
        return out_of_memory(directory, err);
    }
    pthread_mutex_init(&model->lock, NULL);
    status = load_config(model, err);
    if (status == MOE_OK)
        status = find_files(model, err);
    if (status != MOE_OK) {
        moe_model_close(model);
        return status;
    }
    *out = model;
    return MOE_OK;
}

void moe_model_close(struct moe_model *model)
{
    if (!model)
        return;
    for (int32_t i = 0; i < model->shard_count; i++) {
        moe_st_close(model->shards[i].file);
        free(model->shards[i].path);
    }
    free(model->shards);
    moe_index_free(&model->index);
    moe_config_free(&model->config);
    pthread_mutex_destroy(&model->lock);
    free(model->directory);
    free(model);
}

const struct moe_config *moe_model_config(const struct moe_model *model)
{
    return &model->config;
}

const char *moe_model_directory(const struct moe_model *model)
{
    return model->directory;
}

int32_t moe_model_file_count(const struct moe_model *model)
{
    return model->shard_count;
}

uint64_t moe_model_file_bytes(const struct moe_model *model)
{
    return model->bytes;
}

/* ---- Finding tensors ---- */

/* Index and shard must say the same: each tensor that the index puts here is here, and none that it puts elsewhere. */
static moe_status check_shard(const struct moe_model *model, int32_t shard, const struct moe_st_file *file,
                              struct moe_error *err)
{
    for (size_t i = 0; i < moe_st_count(file); i++) {
        const char *name = moe_st_at(file, i)->name;
        int32_t named = moe_index_find(&model->index, name);
        if (named >= 0 && named != shard)
            return moe_fail(err, MOE_ERROR_FILE, "%s: holds tensor '%.200s', which the index puts in '%s'",
                            moe_st_path(file), name, model->index.files[named]);
    }
    for (size_t i = 0; i < model->index.count; i++) {
        const struct moe_index_entry *entry = &model->index.entries[i];
        if (entry->file == shard && !moe_st_find(file, entry->tensor))
            return moe_fail(err, MOE_ERROR_FILE, "%s: lacks tensor '%.200s', which the index puts there",
                            moe_st_path(file), entry->tensor);
    }
    return MOE_OK;
}

static moe_status open_shard(struct moe_model *model, int32_t shard, struct moe_error *err)
{
    struct moe_st_file *file;
    struct stat st;
    if (stat(model->shards[shard].path, &st) && errno == ENOENT)
        return moe_fail(err, MOE_ERROR_FILE, "%s: the shard is missing", model->shards[shard].path);
    moe_status status = moe_st_open(model->shards[shard].path, &file, err);
    if (status == MOE_OK && model->sharded)
        status = check_shard(model, shard, file, err);
    if (status != MOE_OK) {
        moe_st_close(file);
        return status;
    }
    model->shards[shard].file = file;
    return MOE_OK;
}

/* The shard that should hold a tensor, -1 for none; a shard need not be there for this. */
static int32_t locate(const struct moe_model *model, const char *name)
{
    if (model->sharded)
        return moe_index_find(&model->index, name);
    return moe_st_find(model->shards[0].file, name) ? 0 : -1;
}

/* A layer's tensors on their way into a source. */
struct gather {
    struct moe_model *model;
    int32_t layer;
    enum moe_form form;
    struct moe_layer_source *source;
    const struct moe_st_tensor *first; /* of the experts; sets the dtype */
};

static const char *role_name(const struct gather *g, enum moe_form form, enum moe_role role, int32_t expert,
                             char name[MOE_MAX_TENSOR_NAME])
{
    return moe_tensor_name(g->model->config.family->naming, form, role, g->layer, expert, name);
}

/* Experts that lack one of their matrices, and the name of the first that is missing. */
static int32_t count_missing(const struct gather *g, char first[MOE_MAX_TENSOR_NAME])
{
    int32_t missing = 0;
    char name[MOE_MAX_TENSOR_NAME];
    for (int32_t e = 0; e < g->source->desc.num_experts; e++) {
        bool whole = true;
        for (int role = MOE_ROLE_W1; role <= MOE_ROLE_W2; role++) {
            if (locate(g->model, role_name(g, MOE_FORM_PER_EXPERT, role, e, name)) >= 0)
                continue;
            if (whole && !missing)
                memcpy(first, name, sizeof name);
            whole = false;
        }
        missing += !whole;
    }
    return missing;
}

/* Decides which form the layer has, from names alone, and that it is complete. */
static moe_status find_form(struct gather *g, struct moe_error *err)
{
    static const enum moe_role stacked[] = {MOE_ROLE_GATE_UP, MOE_ROLE_DOWN};
    char name[MOE_MAX_TENSOR_NAME], first[MOE_MAX_TENSOR_NAME];
    const char *directory = g->model->directory;
    int32_t experts = g->source->desc.num_experts, missing = count_missing(g, first);
    int found = 0;
    for (int i = 0; i < 2; i++)
        found += locate(g->model, role_name(g, MOE_FORM_STACKED, stacked[i], 0, name)) >= 0;

    if (found && missing < experts)
        return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d holds experts both one by one and stacked, as '%s'",
                        directory, (int)g->layer, role_name(g, MOE_FORM_STACKED, MOE_ROLE_GATE_UP, 0, name));
    g->form = found ? MOE_FORM_STACKED : MOE_FORM_PER_EXPERT;
    for (int i = 0; i < 2 && found == 1; i++)
        if (locate(g->model, role_name(g, MOE_FORM_STACKED, stacked[i], 0, name)) < 0)
            return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d: tensor '%s' is missing, and with it all %d experts",
                            directory, (int)g->layer, name, (int)experts);
    if (!found && missing)
        return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d: %d of %d experts are incomplete: tensor '%s' is missing",
                        directory, (int)g->layer, (int)missing, (int)experts, first);
    if (locate(g->model, role_name(g, g->form, MOE_ROLE_GATE, 0, name)) < 0)
        return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d: the router's tensor '%s' is missing", directory,
                        (int)g->layer, name);
    return MOE_OK;
}

static moe_status check_tensor(const struct gather *g, const char *path, const struct moe_st_tensor *tensor,
                               int32_t rank, const int64_t *shape, struct moe_error *err)
{
    if (!moe_dtype_is_float(tensor->type))
        return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d: tensor '%s' is %s, expected BF16, F16 or F32", path,
                        (int)g->layer, tensor->name, tensor->dtype);
    if (tensor->rank != rank || memcmp(tensor->shape, shape, (size_t)rank * sizeof *shape)) {
        char found[MOE_ST_SHAPE_TEXT], expected[MOE_ST_SHAPE_TEXT];
        return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d: tensor '%s' has shape %s, expected %s by config.json", path,
                        (int)g->layer, tensor->name, moe_st_show_shape(tensor->rank, tensor->shape, found),
                        moe_st_show_shape(rank, shape, expected));
    }
    return MOE_OK;
}

/* Checks one tensor and adds it as a segment; it goes to element `at` of `part`. */
static moe_status add_tensor(struct gather *g, enum moe_role role, int32_t expert, enum moe_part part, int32_t rank,
                             const int64_t *shape, int64_t at, struct moe_error *err)
{
    char name[MOE_MAX_TENSOR_NAME];
    int32_t number = locate(g->model, role_name(g, g->form, role, expert, name));
    struct shard *shard = &g->model->shards[number];
    moe_status status = shard->file ? MOE_OK : open_shard(g->model, number, err);
    if (status != MOE_OK)
        return status;

    const struct moe_st_tensor *tensor = moe_st_find(shard->file, name);
    status = check_tensor(g, shard->path, tensor, rank, shape, err);
    if (status != MOE_OK)
        return status;

    moe_layer_desc *desc = &g->source->desc;
    if (part == MOE_PART_GATE) {
        desc->gate_dtype = tensor->type;
    } else if (!g->first) {
        g->first = tensor;
        desc->dtype = tensor->type;
    } else if (desc->dtype != tensor->type) {
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: layer %d: tensor '%s' is %s, but '%s' is %s, expected one dtype for all experts",
                        shard->path, (int)g->layer, tensor->name, tensor->dtype, g->first->name, g->first->dtype);
    }

    int64_t elements = 1;
    for (int32_t i = 0; i < rank; i++)
        elements *= shape[i];
    uint64_t element_bytes = tensor->bytes / (uint64_t)elements;
    g->source->part_bytes[part] += tensor->bytes;
    g->source->segments[g->source->segment_count++] = (struct moe_segment){
        .file = moe_st_descriptor(shard->file),
        .path = shard->path,
        .file_offset = tensor->offset,
        .bytes = tensor->bytes,
        .part = part,
        .part_offset = (uint64_t)at * element_bytes,
    };
    return MOE_OK;
}

static moe_status add_all(struct gather *g, struct moe_error *err)
{
    const moe_layer_desc *d = &g->source->desc;
    const int64_t E = d->num_experts, H = d->hidden_size, I = d->intermediate_size;
    moe_status status = add_tensor(g, MOE_ROLE_GATE, 0, MOE_PART_GATE, 2, (const int64_t[]){E, H}, 0, err);
    if (status != MOE_OK)
        return status;
    if (g->form == MOE_FORM_STACKED) {
        status = add_tensor(g, MOE_ROLE_GATE_UP, 0, MOE_PART_W13, 3, (const int64_t[]){E, 2 * I, H}, 0, err);
        if (status == MOE_OK)
            status = add_tensor(g, MOE_ROLE_DOWN, 0, MOE_PART_W2, 3, (const int64_t[]){E, H, I}, 0, err);
        return status;
    }
    for (int32_t e = 0; e < E && status == MOE_OK; e++) {
        const int64_t first = e * 2 * I * H;
        status = add_tensor(g, MOE_ROLE_W1, e, MOE_PART_W13, 2, (const int64_t[]){I, H}, first, err);
        if (status == MOE_OK)
            status = add_tensor(g, MOE_ROLE_W3, e, MOE_PART_W13, 2, (const int64_t[]){I, H}, first + I * H, err);
        if (status == MOE_OK)
            status = add_tensor(g, MOE_ROLE_W2, e, MOE_PART_W2, 2, (const int64_t[]){H, I}, e * H * I, err);
    }
    return status;
}

static int compare_segments(const void *a, const void *b)
{
    const struct moe_segment *x = a, *y = b;
    int order = strcmp(x->path, y->path);
    if (order)
        return order;
    return x->file_offset < y->file_offset ? -1 : x->file_offset > y->file_offset;
}

static void sort_and_merge(struct moe_layer_source *source)
{
    size_t out = 0;
    qsort(source->segments, source->segment_count, sizeof *source->segments, compare_segments);
    for (size_t i = 1; i < source->segment_count; i++) {
        struct moe_segment *last = &source->segments[out], *next = &source->segments[i];
        if (last->file == next->file && last->part == next->part &&
            last->file_offset + last->bytes == next->file_offset &&
            last->part_offset + last->bytes == next->part_offset)
            last->bytes += next->bytes;
        else
            source->segments[++out] = *next;
    }
    source->segment_count = out + 1;
}

moe_status moe_model_layer(struct moe_model *model, int32_t index, struct moe_layer_source *source,
                           struct moe_error *err)
{
    memset(source, 0, sizeof *source);
    if (index < 0 || index >= model->config.num_layers)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: layer %d does not exist, expected 0 to %d",
                        model->directory, (int)index, (int)model->config.num_layers - 1);
    if (!moe_config_layer_is_sparse(&model->config, index))
        return moe_fail(err, MOE_ERROR_FILE, "%s: layer %d is dense by config.json, expected a layer with experts",
                        model->directory, (int)index);

    struct gather g = {.model = model, .layer = index, .source = source};
    source->desc = model->config.layer;
    moe_status status = find_form(&g, err);
    if (status != MOE_OK)
        return status;
    source->segments = malloc((3 * (size_t)source->desc.num_experts + 1) * sizeof *source->segments);
    if (!source->segments)
        return out_of_memory(model->directory, err);

    pthread_mutex_lock(&model->lock);
    status = add_all(&g, err);
    pthread_mutex_unlock(&model->lock);
    if (status != MOE_OK) {
        moe_layer_source_free(source);
        return status;
    }
    source->desc.logits_dtype = source->desc.dtype;
    source->desc.topk_weight_dtype = model->config.family->topk_weight_in_model_dtype ? source->desc.dtype : MOE_F32;
    sort_and_merge(source);
    return MOE_OK;
}

void moe_layer_source_free(struct moe_layer_source *source)
{
    free(source->segments);
    memset(source, 0, sizeof *source);
}

moe_status moe_segment_read(const struct moe_segment *segment, uint64_t offset, void *destination, uint64_t bytes,
                            struct moe_error *err)
{
    if (offset > segment->bytes || bytes > segment->bytes - offset)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: %llu bytes at %llu of a segment of %llu", segment->path,
                        (unsigned long long)bytes, (unsigned long long)offset, (unsigned long long)segment->bytes);
    return moe_file_read(segment->file, segment->path, segment->file_offset + offset, destination, bytes, err);
}
