/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "config/config.h"
#include "tests/fuzz/fuzz.h"

static const char *const seeds[] = {
    "{\"model_type\":\"mixtral\",\"architectures\":[\"MixtralForCausalLM\"],\"num_hidden_layers\":32,"
    "\"hidden_size\":4096,\"intermediate_size\":14336,\"num_local_experts\":8,\"num_experts_per_tok\":2,"
    "\"torch_dtype\":\"bfloat16\",\"hidden_act\":\"silu\",\"rope_theta\":1e6}",
    "{\"model_type\":\"qwen3_moe\",\"num_hidden_layers\":48,\"hidden_size\":2048,\"moe_intermediate_size\":768,"
    "\"num_experts\":128,\"num_experts_per_tok\":8,\"norm_topk_prob\":true,\"decoder_sparse_step\":2,"
    "\"mlp_only_layers\":[1,3,5],\"dtype\":\"float16\"}",
    "{ \"model_type\" : \"olmoe\" , \"num_hidden_layers\" : 16 ,\n\"hidden_size\" : 2048 , \"intermediate_size\" : "
    "1024 ,"
    "\t\"num_experts\" : 64 , \"num_experts_per_tok\" : 8 , \"norm_topk_prob\" : false , \"dtype\" : \"float32\" , "
    "\"quantization_config\" : null , \"x\" : [ { \"a\" : -1.5e-3 } , \"\\u00e9\\ud83d\\ude00\\\"\" , true , null ] }",
    "{\"model_type\":\"deepseek_v3\",\"quantization_config\":{\"quant_method\":\"fp8\"}}",
};

static const char *const words[] = {
    "\"mixtral\"", "\"qwen3_moe\"", "\"olmoe\"",   "\"gpt_oss\"", "\"silu\"", "\"swish\"",
    "\"gelu\"",    "\"bfloat16\"",  "\"float16\"", "\"float32\"", "[0,1]",    "{\"quant_method\":\"gptq\"}",
    "100000",      "100001",        NULL,
};

static const char *const keys[] = {
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "quantization_config",
    "hidden_act",
    "dtype",
    "torch_dtype",
    "",
    "\\u0068idden_size",
    "a\\u0000",
    NULL,
};

size_t fuzz_seed(size_t i, uint8_t *data, size_t max_size)
{
    return i < sizeof seeds / sizeof *seeds ? fuzz_copy(seeds[i], data, max_size) : 0;
}

size_t fuzz_mutate(struct mutate *m, uint8_t *data, size_t size, size_t max_size)
{
    m->words = words;
    m->keys = keys;
    return mutate_json(m, (char *)data, size, max_size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct moe_config c;
    struct moe_error err = {""};
    const char *path;
    moe_status status = moe_config_parse((const char *)data, size, "config.json", &c, &err);
    if (fuzz_file(data, size, &path)) {
        struct moe_config same;
        FUZZ_CHECK(moe_config_load(path, &same, NULL) == status);
        FUZZ_CHECK(same.family == c.family && same.num_layers == c.num_layers && same.dense_count == c.dense_count);
        moe_config_free(&same);
    }
    if (status != MOE_OK) {
        FUZZ_CHECK(status == MOE_ERROR_FILE);
        FUZZ_CHECK(!strncmp(err.text, "config.json: ", 13) && !strchr(err.text, '\n'));
        return 0;
    }
    FUZZ_CHECK(!c.family->why_not);
    FUZZ_CHECK(c.num_layers >= 1);
    if (c.layer.dtype == MOE_DTYPE_NONE)
        c.layer.dtype = c.layer.logits_dtype = c.layer.topk_weight_dtype = MOE_BF16;
    FUZZ_CHECK(moe_desc_check(&c.layer, "layer", &err) == MOE_OK);
    FUZZ_CHECK(!moe_config_layer_is_sparse(&c, c.num_layers));
    moe_config_layer_is_sparse(&c, c.num_layers - 1);
    moe_config_free(&c);
    return 0;
}
