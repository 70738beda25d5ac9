/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "models/index.h"
#include "tests/fuzz/fuzz.h"

static const char *const seeds[] = {
    "{\"metadata\":{\"total_size\":46702792704},\"weight_map\":{"
    "\"model.layers.0.block_sparse_moe.gate.weight\":\"model-00001-of-00002.safetensors\","
    "\"model.layers.0.block_sparse_moe.experts.0.w1.weight\":\"model-00001-of-00002.safetensors\","
    "\"model.layers.0.block_sparse_moe.experts.0.w2.weight\":\"model-00002-of-00002.safetensors\"}}",
    "{\"weight_map\":{\"c\":\"2\",\"a\":\"1\",\"b\":\"2\",\"d\":\"3\",\"e\":\"1\"}}",
    "{\"metadata\":{},\n \"weight_map\":{\n  \"\\u00e9\":\"\\\"x\\\"\",\n  \"\":\"...\"\n }\n}\n",
};

static const char *const words[] = {
    "\"model-00001-of-00002.safetensors\"",
    "\".\"",
    "\"..\"",
    "\"a/b\"",
    "\"/\"",
    "\"a\\u0000b\"",
    "\"\\u002e.\"",
    "{\"a\":\"x\",\"b\":\"x\"}",
    NULL,
};

static const char *const keys[] = {"weight_map", "metadata", "a", "b", "\\u0061", "a\\u0000", "", NULL};

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
    struct moe_index index;
    struct moe_error err = {""};
    const char *path;
    moe_status status = moe_index_parse((const char *)data, size, "index.json", &index, &err);
    if (fuzz_file(data, size, &path)) {
        struct moe_index same;
        FUZZ_CHECK(moe_index_load(path, &same, NULL) == status);
        FUZZ_CHECK(same.count == index.count && same.file_count == index.file_count);
        moe_index_free(&same);
    }
    if (status != MOE_OK) {
        FUZZ_CHECK(status == MOE_ERROR_FILE);
        FUZZ_CHECK(!strncmp(err.text, "index.json: ", 12) && !strchr(err.text, '\n'));
        return 0;
    }
    FUZZ_CHECK(index.count >= 1 && index.file_count >= 1 && (size_t)index.file_count <= index.count);
    for (int32_t i = 0; i < index.file_count; i++) {
        const char *file = index.files[i];
        FUZZ_CHECK(*file && !strchr(file, '/') && strcmp(file, ".") && strcmp(file, ".."));
        FUZZ_CHECK(i == 0 || strcmp(index.files[i - 1], file) < 0);
    }
    for (size_t i = 0; i < index.count; i++) {
        FUZZ_CHECK(index.entries[i].file >= 0 && index.entries[i].file < index.file_count);
        FUZZ_CHECK(moe_index_find(&index, index.entries[i].tensor) == index.entries[i].file);
        FUZZ_CHECK(i == 0 || strcmp(index.entries[i - 1].tensor, index.entries[i].tensor) < 0);
    }
    moe_index_find(&index, "not there");
    moe_index_free(&index);
    return 0;
}
