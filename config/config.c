/* SPDX-License-Identifier: Apache-2.0 */
#include "config/config.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/json.h"

/* A config.json has a few KB, with generation defaults and label maps at most a few hundred. */
#define MAX_CONFIG_BYTES (16u << 20)
#define MAX_LAYERS       100000

/* What every field is read with. */
struct reader {
    const cJSON *root;
    const char *name;
    struct moe_error *err;
};

/* A key that is null says no more than one that is absent. */
static const cJSON *get(const struct reader *r, const char *key)
{
    const cJSON *item = moe_json_get(r->root, key);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static moe_status bad(const struct reader *r, const char *key, const cJSON *item, const char *expected)
{
    char value[128];
    return moe_fail(r->err, MOE_ERROR_FILE, "%s: '%s' is %s, expected %s", r->name, key,
                    moe_json_show(item, value, sizeof value), expected);
}

static moe_status check_integer(const struct reader *r, const char *key, const cJSON *item, int64_t low, int64_t high,
                                int64_t *value)
{
    if (moe_json_integer(item, low, high, value))
        return MOE_OK;
    char expected[96];
    snprintf(expected, sizeof expected, "an integer from %lld to %lld", (long long)low, (long long)high);
    return bad(r, key, item, expected);
}

/* A size under one of its names; two names that disagree are an error. *key is the name found. */
static moe_status read_size(const struct reader *r, const char *const *names, size_t count, int64_t high,
                            const char **key, int64_t *value)
{
    *key = NULL;
    for (size_t i = 0; i < count && names[i]; i++) {
        const cJSON *item = get(r, names[i]);
        int64_t found;
        if (!item)
            continue;
        moe_status status = check_integer(r, names[i], item, 1, high, &found);
        if (status != MOE_OK)
            return status;
        if (*key && found != *value)
            return moe_fail(r->err, MOE_ERROR_FILE, "%s: '%s' is %lld, but '%s' is %lld, expected the same", r->name,
                            *key, (long long)*value, names[i], (long long)found);
        if (!*key)
            *key = names[i];
        *value = found;
    }
    return *key ? MOE_OK : check_integer(r, names[0], moe_json_get(r->root, names[0]), 1, high, value);
}

/* transformers 4 writes torch_dtype, transformers 5 dtype, some files have neither. */
static moe_status read_dtype(const struct reader *r, moe_dtype *dtype)
{
    static const char *const keys[] = {"dtype", "torch_dtype"};
    static const struct {
        const char *name;
        moe_dtype dtype;
    } known[] = {{"bfloat16", MOE_BF16}, {"float16", MOE_F16}, {"float32", MOE_F32}};

    *dtype = MOE_DTYPE_NONE;
    for (size_t k = 0; k < 2; k++) {
        const cJSON *item = get(r, keys[k]);
        moe_dtype found = MOE_DTYPE_NONE;
        if (!item)
            continue;
        for (size_t i = 0; i < sizeof known / sizeof *known && cJSON_IsString(item); i++)
            if (!strcmp(item->valuestring, known[i].name))
                found = known[i].dtype;
        if (found == MOE_DTYPE_NONE)
            return bad(r, keys[k], item, "\"bfloat16\", \"float16\" or \"float32\"");
        if (*dtype != MOE_DTYPE_NONE && *dtype != found)
            return bad(r, keys[k], item, "the same as 'dtype'");
        *dtype = found;
    }
    return MOE_OK;
}

static moe_status read_flag(const struct reader *r, const char *key, int32_t *value)
{
    const cJSON *item = get(r, key);
    if (item && !cJSON_IsBool(item))
        return bad(r, key, item, "true or false");
    *value = item && cJSON_IsTrue(item);
    return MOE_OK;
}

static moe_status read_model_type(const struct reader *r, struct moe_config *config)
{
    const cJSON *item = get(r, "model_type");
    char known[256] = "";
    size_t used = 0;
    for (size_t i = 0; moe_family_at(i); i++)
        if (!moe_family_at(i)->why_not && used < sizeof known)
            used += (size_t)snprintf(known + used, sizeof known - used, "%s\"%s\"", used ? ", " : "one of ",
                                     moe_family_at(i)->model_type);

    if (!cJSON_IsString(item) || strlen(item->valuestring) >= sizeof config->model_type ||
        !moe_family_find(item->valuestring))
        return bad(r, "model_type", item, known);
    strcpy(config->model_type, item->valuestring);
    config->family = moe_family_find(item->valuestring);
    if (config->family->why_not)
        return moe_fail(r->err, MOE_ERROR_FILE,
                        "%s: 'model_type' is \"%s\", which needs %s: not supported yet, expected %s", r->name,
                        config->model_type, config->family->why_not, known);
    return MOE_OK;
}

static moe_status reject_quantised(const struct reader *r)
{
    const cJSON *item = get(r, "quantization_config");
    if (!item)
        return MOE_OK;
    char method[128];
    moe_json_show(cJSON_IsObject(item) ? moe_json_get(item, "quant_method") : item, method, sizeof method);
    return moe_fail(r->err, MOE_ERROR_FILE,
                    "%s: 'quantization_config' has quant_method %s, expected none: quantised checkpoints are not "
                    "supported yet",
                    r->name, method);
}

static moe_status read_sparse_rule(const struct reader *r, struct moe_config *config)
{
    config->sparse_step = 1;
    if (config->family->sparse_rule != MOE_SPARSE_STEP)
        return MOE_OK;

    const cJSON *step = get(r, "decoder_sparse_step"), *dense = get(r, "mlp_only_layers");
    int64_t value;
    if (step) {
        moe_status status = check_integer(r, "decoder_sparse_step", step, 1, MAX_LAYERS, &value);
        if (status != MOE_OK)
            return status;
        config->sparse_step = (int32_t)value;
    }
    if (!dense)
        return MOE_OK;
    if (!cJSON_IsArray(dense))
        return bad(r, "mlp_only_layers", dense, "an array of layer numbers");
    int count = cJSON_GetArraySize(dense);
    if (count == 0)
        return MOE_OK;
    if (count > MAX_LAYERS)
        return moe_fail(r->err, MOE_ERROR_FILE, "%s: 'mlp_only_layers' has %d entries, expected at most %d", r->name,
                        count, MAX_LAYERS);
    config->dense_layers = malloc((size_t)count * sizeof *config->dense_layers);
    if (!config->dense_layers)
        return moe_fail(r->err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %d layer numbers", r->name, count);
    for (const cJSON *item = dense->child; item; item = item->next) {
        moe_status status = check_integer(r, "mlp_only_layers", item, 0, MAX_LAYERS, &value);
        if (status != MOE_OK)
            return status;
        config->dense_layers[config->dense_count++] = (int32_t)value;
    }
    return MOE_OK;
}

static moe_status read_activation(const struct reader *r, moe_activation *activation)
{
    /* Absent means silu in every family of the table. "swish" is transformers' other name for it. */
    const cJSON *item = get(r, "hidden_act");
    if (item && (!cJSON_IsString(item) || (strcmp(item->valuestring, "silu") && strcmp(item->valuestring, "swish"))))
        return bad(r, "hidden_act", item, "\"silu\"");
    *activation = MOE_ACTIVATION_SILU;
    return MOE_OK;
}

static moe_status read_sizes(const struct reader *r, struct moe_config *config)
{
    static const char *const layers_key[] = {"num_hidden_layers"}, *const hidden_key[] = {"hidden_size"};
    const struct moe_family *f = config->family;
    const char *key, *experts_key, *top_k_key;
    int64_t layers, experts, top_k;
    moe_layer_desc *layer = &config->layer;

    moe_status status = read_size(r, layers_key, 1, MAX_LAYERS, &key, &layers);
    if (status == MOE_OK)
        status = read_size(r, hidden_key, 1, MOE_MAX_SIZE, &key, &layer->hidden_size);
    if (status == MOE_OK)
        status = read_size(r, f->intermediate_key, 2, MOE_MAX_SIZE, &key, &layer->intermediate_size);
    if (status == MOE_OK)
        status = read_size(r, f->experts_key, 3, MOE_MAX_EXPERTS, &experts_key, &experts);
    if (status == MOE_OK)
        status = read_size(r, f->top_k_key, 2, MOE_MAX_TOP_K, &top_k_key, &top_k);
    if (status != MOE_OK)
        return status;
    if (top_k > experts)
        return moe_fail(r->err, MOE_ERROR_FILE, "%s: '%s' is %lld, expected at most '%s', which is %lld", r->name,
                        top_k_key, (long long)top_k, experts_key, (long long)experts);
    config->num_layers = (int32_t)layers;
    layer->num_experts = (int32_t)experts;
    layer->top_k = (int32_t)top_k;
    return MOE_OK;
}

static moe_status read_all(const struct reader *r, struct moe_config *config)
{
    moe_dtype dtype;
    moe_status status = read_model_type(r, config);
    if (status == MOE_OK)
        status = reject_quantised(r);
    if (status == MOE_OK)
        status = read_dtype(r, &dtype);
    if (status != MOE_OK)
        return status;

    config->layer = moe_layer_desc_init(dtype);
    status = read_sizes(r, config);
    if (status == MOE_OK)
        status = read_activation(r, &config->layer.activation);
    if (status == MOE_OK && config->family->renorm_rule == MOE_RENORM_KEY)
        status = read_flag(r, "norm_topk_prob", &config->layer.renormalize);
    if (status == MOE_OK)
        status = read_sparse_rule(r, config);
    if (config->family->topk_weight_in_model_dtype)
        config->layer.topk_weight_dtype = dtype;
    return status;
}

static moe_status read_tree(const cJSON *root, const char *name, struct moe_config *config, struct moe_error *err)
{
    struct reader r = {root, name, err};
    moe_status status = read_all(&r, config);
    if (status != MOE_OK)
        moe_config_free(config);
    return status;
}

moe_status moe_config_parse(const char *text, size_t length, const char *name, struct moe_config *config,
                            struct moe_error *err)
{
    cJSON *root;
    memset(config, 0, sizeof *config);
    moe_status status = moe_json_parse(text, length, name, &root, err);
    if (status == MOE_OK)
        status = read_tree(root, name, config, err);
    cJSON_Delete(root);
    return status;
}

moe_status moe_config_load(const char *path, struct moe_config *config, struct moe_error *err)
{
    cJSON *root;
    memset(config, 0, sizeof *config);
    moe_status status = moe_json_load(path, MAX_CONFIG_BYTES, &root, err);
    if (status == MOE_OK)
        status = read_tree(root, path, config, err);
    cJSON_Delete(root);
    return status;
}

void moe_config_free(struct moe_config *config)
{
    free(config->dense_layers);
    memset(config, 0, sizeof *config);
}

bool moe_config_layer_is_sparse(const struct moe_config *config, int32_t layer)
{
    if (layer < 0 || layer >= config->num_layers)
        return false;
    for (int32_t i = 0; i < config->dense_count; i++)
        if (config->dense_layers[i] == layer)
            return false;
    return (layer + 1) % config->sparse_step == 0;
}
