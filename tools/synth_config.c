/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/synth_config.h"

#include <stdlib.h>

#include "config/json.h"

/* As the models' own config.json say, apart from fields that have no bearing on a layer. The tiny ones are the same
 * forms at sizes for tests. */
static const struct {
    const char *model_type, *architecture;
    int layers, hidden, intermediate, experts, top_k;
    const char *rest; /* members that the family has besides; a JSON object */
} models[] = {
    {"mixtral", "MixtralForCausalLM", 32, 4096, 14336, 8, 2, "{\"vocab_size\": 32000, \"num_attention_heads\": 32}"},
    {"mixtral", "MixtralForCausalLM", 56, 6144, 16384, 8, 2, "{\"vocab_size\": 32768, \"num_attention_heads\": 48}"},
    {"qwen3_moe", "Qwen3MoeForCausalLM", 48, 2048, 768, 128, 8,
     "{\"vocab_size\": 151936, \"num_attention_heads\": 32, \"intermediate_size\": 6144, \"norm_topk_prob\": true,"
     " \"decoder_sparse_step\": 1, \"mlp_only_layers\": []}"},
    {"qwen3_moe", "Qwen3MoeForCausalLM", 94, 4096, 1536, 128, 8,
     "{\"vocab_size\": 151936, \"num_attention_heads\": 64, \"intermediate_size\": 12288, \"norm_topk_prob\": true,"
     " \"decoder_sparse_step\": 1, \"mlp_only_layers\": []}"},
    {"olmoe", "OlmoeForCausalLM", 16, 2048, 1024, 64, 8,
     "{\"vocab_size\": 50304, \"num_attention_heads\": 16, \"norm_topk_prob\": false}"},
    {"mixtral", "MixtralForCausalLM", 2, 64, 128, 4, 2, "{\"vocab_size\": 256, \"num_attention_heads\": 4}"},
    {"qwen3_moe", "Qwen3MoeForCausalLM", 2, 64, 32, 16, 4,
     "{\"vocab_size\": 256, \"num_attention_heads\": 4, \"intermediate_size\": 192, \"norm_topk_prob\": true,"
     " \"decoder_sparse_step\": 1, \"mlp_only_layers\": []}"},
};

const char *const synth_models[] = {"mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b",  "qwen3-235b-a22b",
                                    "olmoe-1b-7b",  "tiny-mixtral",  "tiny-qwen3-moe", NULL};

cJSON *synth_config_like(int which)
{
    cJSON *root = cJSON_Parse(models[which].rest);
    const struct moe_family *family = moe_family_find(models[which].model_type);
    const char *const architectures[] = {models[which].architecture};
    bool ok = root && family && cJSON_AddStringToObject(root, "model_type", family->model_type) &&
              cJSON_AddItemToObject(root, "architectures", cJSON_CreateStringArray(architectures, 1)) &&
              cJSON_AddStringToObject(root, "hidden_act", "silu") &&
              cJSON_AddStringToObject(root, "torch_dtype", "bfloat16") &&
              cJSON_AddNumberToObject(root, "num_hidden_layers", models[which].layers) &&
              cJSON_AddNumberToObject(root, "hidden_size", models[which].hidden) &&
              cJSON_AddNumberToObject(root, family->intermediate_key[0], models[which].intermediate) &&
              cJSON_AddNumberToObject(root, family->experts_key[0], models[which].experts) &&
              cJSON_AddNumberToObject(root, family->top_k_key[0], models[which].top_k);
    if (!ok) {
        cJSON_Delete(root);
        return NULL;
    }
    return root;
}

static bool put(cJSON *root, const char *key, cJSON *value)
{
    bool ok = value && (moe_json_get(root, key) ? cJSON_ReplaceItemInObjectCaseSensitive(root, key, value)
                                                : cJSON_AddItemToObject(root, key, value));
    if (!ok)
        cJSON_Delete(value);
    return ok;
}

/* Under every one of the names that the file has, or else under the first. */
static bool put_size(cJSON *root, const char *const *keys, size_t count, int64_t value)
{
    bool found = false, ok = true;
    for (size_t i = 0; value != 0 && i < count && keys[i]; i++) {
        if (moe_json_get(root, keys[i])) {
            ok = ok && put(root, keys[i], cJSON_CreateNumber((double)value));
            found = true;
        }
    }
    return value == 0 || (found ? ok : put(root, keys[0], cJSON_CreateNumber((double)value)));
}

static bool put_dtype(cJSON *root, moe_dtype dtype)
{
    static const char *const keys[] = {"torch_dtype", "dtype"};
    const char *name = dtype == MOE_BF16 ? "bfloat16" : dtype == MOE_F16 ? "float16" : "float32";
    bool found = false, ok = true;
    for (size_t i = 0; i < 2; i++) {
        if (moe_json_get(root, keys[i])) {
            ok = ok && put(root, keys[i], cJSON_CreateString(name));
            found = true;
        }
    }
    return found ? ok : put(root, keys[0], cJSON_CreateString(name));
}

moe_status synth_config_change(cJSON *root, const struct synth_changes *changes, const char *name,
                               struct moe_config *config, struct moe_error *err)
{
    const struct moe_family *family = moe_family_find(moe_json_get(root, "model_type")->valuestring);
    static const char *const layers[] = {"num_hidden_layers"}, *const hidden[] = {"hidden_size"};
    char *text = NULL;
    if (put_size(root, layers, 1, changes->layers) && put_size(root, hidden, 1, changes->hidden) &&
        put_size(root, family->intermediate_key, 2, changes->intermediate) &&
        put_size(root, family->experts_key, 3, changes->experts) &&
        put_size(root, family->top_k_key, 2, changes->top_k) &&
        (changes->dtype == MOE_DTYPE_NONE || put_dtype(root, changes->dtype)))
        text = cJSON_Print(root);
    if (!text)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: %s", name, moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
    moe_status status = moe_config_parse(text, strlen(text), name, config, err);
    cJSON_free(text);
    return status;
}
