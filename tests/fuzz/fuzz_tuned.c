/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "config/tuned.h"
#include "tests/fuzz/fuzz.h"

static const char *const seeds[] = {
    "{\"device\":{\"name\":\"NVIDIA H200\",\"compute_capability\":90,\"cores\":132},\"entries\":[]}",
    "{\"device\":{\"name\":\"NVIDIA H200\",\"compute_capability\":90,\"cores\":132},\"entries\":[{\"hidden_size\":4096,"
    "\"intermediate_size\":14336,\"num_experts\":8,\"top_k\":2,\"dtype\":\"bf16\",\"layout\":\"packed\",\"points\":["
    "{\"tokens\":256,\"path\":\"prefill\"},{\"tokens\":1024,\"path\":\"prefill\",\"config\":\"wgmma-192\"}]},"
    "{\"hidden_size\":2048,\"intermediate_size\":768,\"num_experts\":128,\"top_k\":8,\"dtype\":\"f32\","
    "\"layout\":\"row-major\",\"points\":[{\"tokens\":1,\"path\":\"simple\"}]}]}",
};

static const char *const words[] = {
    "\"prefill\"",   "\"simple\"",    "\"auto\"", "\"cpu\"", "\"bf16\"", "\"f16\"",    "\"f32\"", "\"packed\"",
    "\"row-major\"", "\"wgmma-192\"", "256",      "257",     "1048576",  "2147483647", NULL,
};

static const char *const keys[] = {
    "device",
    "name",
    "compute_capability",
    "cores",
    "entries",
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "top_k",
    "dtype",
    "layout",
    "points",
    "tokens",
    "path",
    "config",
    "",
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

/* What every lookup relies on. */
static void check_entry(const struct moe_tuned *t, const struct moe_tuned_entry *e)
{
    moe_layer_desc desc = moe_layer_desc_init(e->dtype);
    desc.hidden_size = e->hidden_size;
    desc.intermediate_size = e->intermediate_size;
    desc.num_experts = e->num_experts;
    desc.top_k = e->top_k;
    FUZZ_CHECK(moe_tuned_find(t, &desc, e->layout) == e);
    FUZZ_CHECK(e->count >= 1 && e->top_k >= 1 && e->top_k <= e->num_experts);
    FUZZ_CHECK(!moe_tuned_at(e, e->points[0].tokens - 1));
    for (int32_t i = 0; i < e->count; i++) {
        const struct moe_tuned_point *p = &e->points[i];
        FUZZ_CHECK(p->tokens >= 1 && p->path != MOE_PATH_AUTO && moe_path_name(p->path));
        FUZZ_CHECK(strlen(p->name) < sizeof p->name);
        FUZZ_CHECK(moe_tuned_at(e, p->tokens) == p);
        FUZZ_CHECK(i == 0 || moe_tuned_at(e, p->tokens - 1) == p - 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct moe_tuned t;
    struct moe_error err = {""};
    const char *path;
    moe_status status = moe_tuned_parse((const char *)data, size, "t.json", &t, &err);
    if (fuzz_file(data, size, &path)) {
        struct moe_tuned same;
        FUZZ_CHECK(moe_tuned_load(path, &same, NULL) == status);
        FUZZ_CHECK(same.count == t.count && same.cores == t.cores && !strcmp(same.device, t.device));
        moe_tuned_free(&same);
    }
    if (status != MOE_OK) {
        FUZZ_CHECK(status == MOE_ERROR_FILE);
        FUZZ_CHECK(!strncmp(err.text, "t.json: ", 8) && !strchr(err.text, '\n'));
        return 0;
    }
    for (int32_t i = 0; i < t.count; i++)
        check_entry(&t, &t.entries[i]);
    moe_tuned_free(&t);
    return 0;
}
