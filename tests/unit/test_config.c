/* SPDX-License-Identifier: Apache-2.0 */
/* config.json of each family: what is read, what is refused; and descriptions from callers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "config/config.h"
#include "tests/unit/files.h"

#define MIXTRAL                                                                                                        \
    "\"model_type\":\"mixtral\",\"num_hidden_layers\":32,\"hidden_size\":4096,\"intermediate_size\":14336,"            \
    "\"num_local_experts\":8,\"num_experts_per_tok\":2"
#define QWEN3                                                                                                          \
    "\"model_type\":\"qwen3_moe\",\"num_hidden_layers\":6,\"hidden_size\":2048,\"intermediate_size\":6144,"            \
    "\"moe_intermediate_size\":768,\"num_experts_per_tok\":8"
#define OLMOE                                                                                                          \
    "\"model_type\":\"olmoe\",\"num_hidden_layers\":16,\"hidden_size\":2048,\"intermediate_size\":1024,"               \
    "\"num_experts\":64,\"num_experts_per_tok\":8"

static void parse(const char *text, struct moe_config *config)
{
    struct moe_error err = {""};
    if (moe_config_parse(text, strlen(text), "config.json", config, &err) != MOE_OK)
        fail_msg("%s: %s", text, err.text);
}

static void reads_mixtral(void **state)
{
    (void)state;
    struct moe_config c;
    parse("{" MIXTRAL ",\"torch_dtype\":\"bfloat16\",\"hidden_act\":\"silu\",\"norm_topk_prob\":false}", &c);
    assert_string_equal(c.model_type, "mixtral");
    assert_int_equal(c.num_layers, 32);
    assert_int_equal(c.layer.hidden_size, 4096);
    assert_int_equal(c.layer.intermediate_size, 14336);
    assert_int_equal(c.layer.num_experts, 8);
    assert_int_equal(c.layer.top_k, 2);
    assert_int_equal(c.layer.dtype, MOE_BF16);
    assert_int_equal(c.layer.logits_dtype, MOE_BF16);
    assert_int_equal(c.layer.topk_weight_dtype, MOE_F32);
    assert_int_equal(c.layer.renormalize, 1); /* whatever norm_topk_prob says */
    assert_int_equal(c.layer.activation, MOE_ACTIVATION_SILU);
    assert_int_equal(moe_desc_check(&c.layer, "layer", NULL), MOE_OK);
    assert_true(moe_config_layer_is_sparse(&c, 0));
    assert_true(moe_config_layer_is_sparse(&c, 31));
    assert_false(moe_config_layer_is_sparse(&c, 32));
    assert_false(moe_config_layer_is_sparse(&c, -1));
    moe_config_free(&c);
}

static void reads_qwen3(void **state)
{
    (void)state;
    struct moe_config c;
    parse("{" QWEN3 ",\"num_experts\":128,\"norm_topk_prob\":true,\"dtype\":\"float16\",\"decoder_sparse_step\":2,"
          "\"mlp_only_layers\":[3]}",
          &c);
    assert_int_equal(c.layer.intermediate_size, 768);
    assert_int_equal(c.layer.num_experts, 128);
    assert_int_equal(c.layer.renormalize, 1);
    assert_int_equal(c.layer.topk_weight_dtype, MOE_F16);
    for (int32_t layer = 0; layer < 6; layer++)
        assert_int_equal(moe_config_layer_is_sparse(&c, layer), layer == 1 || layer == 5);
    moe_config_free(&c);

    /* As transformers 5 saves it; null is as good as absent; no norm_topk_prob means no. */
    parse("{" QWEN3 ",\"num_local_experts\":16,\"mlp_only_layers\":null,\"quantization_config\":null,\"dtype\":null}",
          &c);
    assert_int_equal(c.layer.num_experts, 16);
    assert_int_equal(c.layer.renormalize, 0);
    assert_int_equal(c.layer.dtype, MOE_DTYPE_NONE);
    assert_true(moe_config_layer_is_sparse(&c, 0));
    moe_config_free(&c);
}

static void reads_olmoe(void **state)
{
    (void)state;
    struct moe_config c;
    parse("{" OLMOE ",\"norm_topk_prob\":false,\"torch_dtype\":\"float32\",\"dtype\":\"float32\","
          "\"num_local_experts\":64}",
          &c);
    assert_int_equal(c.layer.intermediate_size, 1024);
    assert_int_equal(c.layer.num_experts, 64);
    assert_int_equal(c.layer.renormalize, 0);
    assert_int_equal(c.layer.topk_weight_dtype, MOE_F32);
    moe_config_free(&c);
}

static void names_what_is_lacking(void **state)
{
    (void)state;
    size_t lacking = 0;
    for (size_t i = 0; moe_family_at(i); i++) {
        const struct moe_family *f = moe_family_at(i);
        assert_ptr_equal(moe_family_find(f->model_type), f);
        if (!f->why_not)
            continue;
        char text[256];
        struct moe_config c;
        struct moe_error err = {""};
        snprintf(text, sizeof text, "{\"model_type\":\"%s\"}", f->model_type);
        assert_int_equal(moe_config_parse(text, strlen(text), "config.json", &c, &err), MOE_ERROR_FILE);
        assert_non_null(strstr(err.text, f->model_type));
        assert_non_null(strstr(err.text, f->why_not));
        assert_non_null(strstr(err.text, "not supported yet"));
        lacking++;
    }
    assert_true(lacking > 20);
    assert_null(moe_family_find("Mixtral"));
    assert_null(moe_family_find(""));
}

static void refuses(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"{}", "'model_type' is missing, expected one of \"mixtral\", \"qwen3_moe\", \"olmoe\""},
        {"{" MIXTRAL ",\"dtype\":\"float64\"}", "'dtype' is \"float64\", expected \"bfloat16\""},
        {"{" MIXTRAL ",\"dtype\":1}", "'dtype' is 1, expected"},
        {"{" MIXTRAL ",\"dtype\":\"float16\",\"torch_dtype\":\"bfloat16\"}",
         "'torch_dtype' is \"bfloat16\", expected the same as 'dtype'"},
        {"{" MIXTRAL ",\"hidden_act\":\"gelu\"}", "'hidden_act' is \"gelu\", expected \"silu\""},
        {"{" MIXTRAL ",\"num_experts\":9}", "'num_local_experts' is 8, but 'num_experts' is 9"},
        {"{" MIXTRAL ",\"quantization_config\":{\"quant_method\":\"fp8\"}}", "quant_method \"fp8\""},
        {"{" MIXTRAL ",\"quantization_config\":{}}", "quant_method missing"},
        {"{" MIXTRAL ",\"quantization_config\":true}", "quant_method true"},
        {"{" QWEN3 "}", "'num_experts' is missing, expected an integer from 1 to 4096"},
        {"{" QWEN3 ",\"num_experts\":null}", "'num_experts' is null"},
        {"{" QWEN3 ",\"num_experts\":4}", "'num_experts_per_tok' is 8, expected at most 'num_experts', which is 4"},
        {"{" QWEN3 ",\"num_experts\":4097}", "'num_experts' is 4097, expected an integer from 1 to 4096"},
        {"{" QWEN3 ",\"num_experts\":8.5}", "'num_experts' is 8.5"},
        {"{" QWEN3 ",\"num_experts\":8,\"norm_topk_prob\":1}", "'norm_topk_prob' is 1, expected true or false"},
        {"{" QWEN3 ",\"num_experts\":8,\"decoder_sparse_step\":0}", "'decoder_sparse_step' is 0, expected"},
        {"{" QWEN3 ",\"num_experts\":8,\"mlp_only_layers\":3}", "'mlp_only_layers' is 3, expected an array"},
        {"{" QWEN3 ",\"num_experts\":8,\"mlp_only_layers\":[1,-1]}", "'mlp_only_layers' is -1, expected"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_config c;
        struct moe_error err = {""};
        assert_int_equal(moe_config_parse(cases[i].text, strlen(cases[i].text), "config.json", &c, &err),
                         MOE_ERROR_FILE);
        if (!strstr(err.text, cases[i].message) || strncmp(err.text, "config.json: '", 14))
            fail_msg("%s gave '%s', expected '%s'", cases[i].text, err.text, cases[i].message);
        assert_null(c.family);
        assert_null(c.dense_layers);
    }
}

static void checks_descriptions(void **state)
{
    (void)state;
    moe_layer_desc good = moe_layer_desc_init(MOE_F16), d;
    good.hidden_size = MOE_MAX_SIZE;
    good.intermediate_size = MOE_MAX_SIZE;
    good.num_experts = MOE_MAX_EXPERTS;
    good.top_k = MOE_MAX_TOP_K;
    assert_int_equal(moe_desc_check(&good, "d", NULL), MOE_OK);
    good.gate_dtype = MOE_DTYPE_NONE;
    assert_int_equal(moe_desc_check(&good, "d", NULL), MOE_OK);

    struct moe_error err;
#define REFUSED(field, bad, message)                                                                                   \
    d = good;                                                                                                          \
    d.field = bad;                                                                                                     \
    err.text[0] = 0;                                                                                                   \
    assert_int_equal(moe_desc_check(&d, "d", &err), MOE_ERROR_INVALID_ARGUMENT);                                       \
    assert_string_equal(err.text, "d: " #field " is " message)

    REFUSED(hidden_size, 0, "0, expected 1 to 1048576");
    REFUSED(hidden_size, MOE_MAX_SIZE + 1, "1048577, expected 1 to 1048576");
    REFUSED(intermediate_size, -5, "-5, expected 1 to 1048576");
    REFUSED(num_experts, 4097, "4097, expected 1 to 4096");
    REFUSED(top_k, 65, "65, expected 1 to 64");
    REFUSED(dtype, MOE_I32, "4, expected MOE_BF16, MOE_F16 or MOE_F32");
    REFUSED(dtype, MOE_DTYPE_NONE, "0, expected MOE_BF16, MOE_F16 or MOE_F32");
    REFUSED(gate_dtype, MOE_I64, "5, expected MOE_DTYPE_NONE, MOE_BF16, MOE_F16 or MOE_F32");
    REFUSED(scoring, (moe_scoring)0, "0, expected MOE_SCORING_SOFTMAX");
    REFUSED(renormalize, 2, "2, expected 0 or 1");
    REFUSED(logits_dtype, MOE_DTYPE_NONE, "0, expected MOE_BF16, MOE_F16 or MOE_F32");
    REFUSED(topk_weight_dtype, MOE_I32, "4, expected MOE_BF16, MOE_F16 or MOE_F32");
    REFUSED(activation, (moe_activation)7, "7, expected MOE_ACTIVATION_SILU");
    good.num_experts = 3;
    REFUSED(top_k, 4, "4, expected 1 to 3");
}

static void loads_from_a_file(void **state)
{
    (void)state;
    static const char text[] = "{" OLMOE "}";
    struct moe_config c;
    struct moe_error err = {""};
    assert_int_equal(moe_config_load(files_write("config.json", text, sizeof text - 1), &c, &err), MOE_OK);
    moe_config_free(&c);
    assert_int_equal(moe_config_load(files_path("none.json"), &c, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "none.json: cannot open"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_mixtral),         cmocka_unit_test(reads_qwen3), cmocka_unit_test(reads_olmoe),
        cmocka_unit_test(names_what_is_lacking), cmocka_unit_test(refuses),     cmocka_unit_test(checks_descriptions),
        cmocka_unit_test(loads_from_a_file),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
