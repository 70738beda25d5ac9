/* SPDX-License-Identifier: Apache-2.0 */
/* Checkpoint directories: which bytes of which file become which part of a layer. test_malformed.c has what is wrong.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "models/model.h"
#include "models/names.h"
#include "tests/unit/files.h"

enum { E = 3, H = 4, I = 6, MAX_TENSORS = 64 };

/* A checkpoint in the making: tensors of floats that each say where they belong. */
struct build {
    struct moe_st_write_tensor tensors[MAX_TENSORS];
    char names[MAX_TENSORS][MOE_MAX_TENSOR_NAME];
    size_t count;
};

/* The value of element `at` of a part of a layer. */
static float value(int32_t layer, enum moe_part part, size_t at)
{
    return (float)(layer * 10000 + (int)part * 1000) + (float)at;
}

static void add(struct build *b, enum moe_naming naming, enum moe_form form, enum moe_role role, int32_t layer,
                int32_t expert, int32_t rank, int64_t d0, int64_t d1, int64_t d2, enum moe_part part, size_t first)
{
    struct moe_st_write_tensor *t = &b->tensors[b->count];
    t->name = moe_tensor_name(naming, form, role, layer, expert, b->names[b->count++]);
    t->dtype = MOE_F32;
    t->rank = rank;
    t->shape[0] = d0, t->shape[1] = d1, t->shape[2] = d2;
    size_t elements = (size_t)(d0 * d1 * (rank == 3 ? d2 : 1));
    float *data = malloc(elements * sizeof *data);
    for (size_t i = 0; i < elements; i++)
        data[i] = value(layer, part, first + i);
    t->data = data;
}

static void add_layer(struct build *b, enum moe_naming naming, enum moe_form form, int32_t layer)
{
    if (form == MOE_FORM_STACKED) {
        add(b, naming, form, MOE_ROLE_DOWN, layer, 0, 3, E, H, I, MOE_PART_W2, 0);
        add(b, naming, form, MOE_ROLE_GATE_UP, layer, 0, 3, E, 2 * I, H, MOE_PART_W13, 0);
        add(b, naming, form, MOE_ROLE_GATE, layer, 0, 2, E, H, 0, MOE_PART_GATE, 0);
        return;
    }
    add(b, naming, form, MOE_ROLE_GATE, layer, 0, 2, E, H, 0, MOE_PART_GATE, 0);
    for (int32_t e = E - 1; e >= 0; e--) {
        size_t w13 = (size_t)e * 2 * I * H;
        /* Layer 1 has w3 first: neighbours in the file that are none in the part. */
        for (int32_t i = layer & 1, n = 0; n < 2; i ^= 1, n++)
            add(b, naming, form, i ? MOE_ROLE_W3 : MOE_ROLE_W1, layer, e, 2, I, H, 0, MOE_PART_W13,
                w13 + (size_t)i * I * H);
        add(b, naming, form, MOE_ROLE_W2, layer, e, 2, H, I, 0, MOE_PART_W2, (size_t)e * H * I);
    }
}

static void write_tensors(const char *path, const struct build *b, size_t first, size_t count)
{
    struct moe_error err;
    if (moe_st_write(path, b->tensors + first, count, &err) != MOE_OK)
        fail_msg("%s", err.text);
}

static void free_build(struct build *b)
{
    for (size_t i = 0; i < b->count; i++)
        free((void *)b->tensors[i].data);
}

static void write_config(const char *directory, const char *type, const char *more)
{
    char path[1024], text[512];
    mkdir(directory, 0700);
    snprintf(path, sizeof path, "%s/config.json", directory);
    snprintf(text, sizeof text,
             "{\"model_type\":\"%s\",\"num_hidden_layers\":2,\"hidden_size\":%d,\"%s\":%d,\"num_local_experts\":%d,"
             "\"num_experts_per_tok\":2%s}",
             type, H, strcmp(type, "qwen3_moe") ? "intermediate_size" : "moe_intermediate_size", I, E, more);
    files_write_at(path, text, strlen(text));
}

static void write_index(const char *directory, const struct build *b, size_t in_first)
{
    char path[1024], text[16384];
    size_t at = (size_t)sprintf(text, "{\"metadata\":{},\"weight_map\":{");
    for (size_t i = 0; i < b->count; i++)
        at += (size_t)sprintf(text + at, "%s\"%s\":\"%s\"", i ? "," : "", b->tensors[i].name,
                              i < in_first ? "model-00001.safetensors" : "model-00002.safetensors");
    at += (size_t)sprintf(text + at, "}}");
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
    files_write_at(path, text, at);
}

/* Loads a layer, puts its segments together and compares every element. Returns the number of segments. */
static size_t check_layer(struct moe_model *model, int32_t layer)
{
    static const size_t elements[MOE_PART_COUNT] = {E * H, E * 2 * I * H, E * H * I};
    struct moe_layer_source source;
    struct moe_error err;
    float parts[MOE_PART_COUNT][E * 2 * I * H];
    if (moe_model_layer(model, layer, &source, &err) != MOE_OK)
        fail_msg("%s", err.text);

    memset(parts, 0xFF, sizeof parts);
    for (size_t i = 0; i < source.segment_count; i++) {
        const struct moe_segment *s = &source.segments[i];
        /* In two reads, so that the offset counts. */
        char *to = (char *)parts[s->part] + s->part_offset;
        assert_int_equal(moe_segment_read(s, 0, to, 5, &err), MOE_OK);
        assert_int_equal(moe_segment_read(s, 5, to + 5, s->bytes - 5, &err), MOE_OK);
        assert_int_equal(moe_segment_read(s, 5, to, s->bytes - 4, &err), MOE_ERROR_INVALID_ARGUMENT);
        if (i && s[-1].file == s->file)
            assert_true(s[-1].file_offset + s[-1].bytes <= s->file_offset);
    }
    for (int part = 0; part < MOE_PART_COUNT; part++) {
        assert_int_equal(source.part_bytes[part], elements[part] * sizeof(float));
        for (size_t i = 0; i < elements[part]; i++)
            if (parts[part][i] != value(layer, part, i))
                fail_msg("layer %d, part %d, element %zu is %g", (int)layer, part, i, parts[part][i]);
    }
    assert_int_equal(source.desc.dtype, MOE_F32);
    assert_int_equal(source.desc.gate_dtype, MOE_F32);
    assert_int_equal(source.desc.logits_dtype, MOE_F32);
    assert_int_equal(source.desc.topk_weight_dtype, MOE_F32);
    assert_int_equal(source.desc.num_experts, E);
    assert_int_equal(moe_desc_check(&source.desc, "layer", NULL), MOE_OK);
    size_t count = source.segment_count;
    moe_layer_source_free(&source);
    assert_null(source.segments);
    return count;
}

static struct moe_model *open_model(const char *directory)
{
    struct moe_model *model;
    struct moe_error err;
    if (moe_model_open(directory, &model, &err) != MOE_OK)
        fail_msg("%s", err.text);
    return model;
}

static void single_files(void **state)
{
    (void)state;
    static const struct {
        const char *type;
        enum moe_naming naming;
        enum moe_form form;
        size_t segments[2]; /* of layer 0 and 1 */
    } cases[] = {
        /* w1 and w3 of an expert merge if they follow on each other; stacked tensors are a segment each */
        {"mixtral", MOE_NAMING_MIXTRAL, MOE_FORM_PER_EXPERT, {1 + 2 * E, 1 + 3 * E}},
        {"mixtral", MOE_NAMING_MIXTRAL, MOE_FORM_STACKED, {3, 3}},
        {"qwen3_moe", MOE_NAMING_QWEN, MOE_FORM_PER_EXPERT, {1 + 2 * E, 1 + 3 * E}},
        {"qwen3_moe", MOE_NAMING_QWEN, MOE_FORM_STACKED, {3, 3}},
        {"olmoe", MOE_NAMING_QWEN, MOE_FORM_PER_EXPERT, {1 + 2 * E, 1 + 3 * E}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct build b = {.count = 0};
        char name[32], path[512];
        snprintf(name, sizeof name, "single%zu", i);
        snprintf(path, sizeof path, "%s/%s/model.safetensors", files_directory, name);
        write_config(files_path(name), cases[i].type, "");
        for (int32_t layer = 0; layer < 2; layer++)
            add_layer(&b, cases[i].naming, cases[i].form, layer);
        write_tensors(path, &b, 0, b.count);

        struct moe_model *model = open_model(files_path(name));
        assert_string_equal(moe_model_directory(model), files_path(name));
        assert_string_equal(moe_model_config(model)->model_type, cases[i].type);
        assert_int_equal(moe_model_file_count(model), 1);
        struct stat st;
        stat(path, &st);
        assert_int_equal(moe_model_file_bytes(model), st.st_size);
        for (int32_t layer = 0; layer < 2; layer++)
            assert_int_equal(check_layer(model, layer), cases[i].segments[layer]);
        moe_model_close(model);
        free_build(&b);
    }
    moe_model_close(NULL);
}

static void shards(void **state)
{
    (void)state;
    struct build b = {.count = 0};
    char path[512];
    struct moe_error err = {""};
    struct moe_layer_source source;
    for (int32_t layer = 0; layer < 2; layer++)
        add_layer(&b, MOE_NAMING_MIXTRAL, MOE_FORM_PER_EXPERT, layer);
    size_t in_first = b.count / 2 + 2; /* layer 1 spans both */
    write_config(files_path("shards"), "mixtral", "");
    write_index(files_path("shards"), &b, in_first);

    /* Without any shard the directory opens; only the layers do not load. */
    struct moe_model *model = open_model(files_path("shards/"));
    assert_int_equal(moe_model_file_count(model), 2);
    assert_int_equal(moe_model_file_bytes(model), 0);
    assert_int_equal(moe_model_layer(model, 0, &source, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "shards/model-00001.safetensors: the shard is missing"));

    /* With the first, layer 0 does. A shard that comes later is found by the same handle. */
    snprintf(path, sizeof path, "%s/shards/model-00001.safetensors", files_directory);
    write_tensors(path, &b, 0, in_first);
    check_layer(model, 0);
    assert_int_equal(moe_model_layer(model, 1, &source, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "shards/model-00002.safetensors: the shard is missing"));
    snprintf(path, sizeof path, "%s/shards/model-00002.safetensors", files_directory);
    write_tensors(path, &b, in_first, b.count - in_first);
    check_layer(model, 1);
    moe_model_close(model);

    /* A plain file wins over the index. */
    snprintf(path, sizeof path, "%s/shards/model.safetensors", files_directory);
    write_tensors(path, &b, 0, b.count);
    model = open_model(files_path("shards"));
    assert_int_equal(moe_model_file_count(model), 1);
    check_layer(model, 1);
    moe_model_close(model);
    free_build(&b);
}

static void shards_without_an_index(void **state)
{
    (void)state;
    struct build b = {.count = 0};
    char path[512];
    struct moe_error err = {""};
    struct moe_layer_source source;
    for (int32_t layer = 0; layer < 2; layer++)
        add_layer(&b, MOE_NAMING_MIXTRAL, MOE_FORM_PER_EXPERT, layer);
    size_t half = b.count / 2, more = half + 2;
    write_config(files_path("loose"), "mixtral", "");
    static const char *const others[] = {"model-notes.txt", "x.safetensors", "model", ".safetensors"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        snprintf(path, sizeof path, "%s/loose/%s", files_directory, others[i]);
        files_write_at(path, "no shard", 8);
    }

    /* One shard with a whole layer and a bit. */
    snprintf(path, sizeof path, "%s/loose/model-00001-of-00002.safetensors", files_directory);
    write_tensors(path, &b, 0, more);
    struct moe_model *model = open_model(files_path("loose"));
    assert_int_equal(moe_model_file_count(model), 1);
    check_layer(model, 0);
    assert_int_equal(moe_model_layer(model, 1, &source, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "/loose: layer 1: 3 of 3 experts are incomplete"));
    moe_model_close(model);

    snprintf(path, sizeof path, "%s/loose/model-00002-of-00002.safetensors", files_directory);
    write_tensors(path, &b, more, b.count - more);
    model = open_model(files_path("loose"));
    assert_int_equal(moe_model_file_count(model), 2);
    check_layer(model, 0);
    check_layer(model, 1);
    moe_model_close(model);

    write_tensors(path, &b, half, b.count - half);
    assert_int_equal(moe_model_open(files_path("loose"), &model, &err), MOE_ERROR_FILE);
    assert_null(model);
    if (!strstr(err.text, "/loose: tensor 'model.layers.1.block_sparse_moe.experts.2.w3.weight' is in "
                          "'model-00001-of-00002.safetensors' and in 'model-00002-of-00002.safetensors'"))
        fail_msg("'%s'", err.text);

    files_write_at(path, "12345678", 8);
    assert_int_equal(moe_model_open(files_path("loose"), &model, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "/loose/model-00002-of-00002.safetensors: "));
    free_build(&b);
}

static void refuses_what_is_no_checkpoint(void **state)
{
    (void)state;
    mkdir(files_path("bare"), 0700);
    files_write("plain", "x", 1);
    write_config(files_path("weightless"), "mixtral", "");
    static const struct {
        const char *name, *message;
    } cases[] = {
        {"nowhere", "/nowhere: cannot open the checkpoint directory: No such file or directory"},
        {"plain", "/plain: is a file, expected the directory of a checkpoint"},
        {"bare", "/bare/config.json: cannot open: No such file or directory"},
        {"weightless",
         "/weightless: has no model.safetensors, no model.safetensors.index.json and no other model*.safetensors"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_model *model = (void *)&cases;
        struct moe_error err = {""};
        assert_int_equal(moe_model_open(files_path(cases[i].name), &model, &err), MOE_ERROR_FILE);
        assert_null(model);
        if (!strstr(err.text, cases[i].message))
            fail_msg("%s: '%s'", cases[i].name, err.text);
    }
}

static void refuses_layers(void **state)
{
    (void)state;
    struct build b = {.count = 0};
    char path[512];
    add_layer(&b, MOE_NAMING_QWEN, MOE_FORM_PER_EXPERT, 1);
    write_config(files_path("dense"), "qwen3_moe", ",\"mlp_only_layers\":[0]");
    snprintf(path, sizeof path, "%s/dense/model.safetensors", files_directory);
    write_tensors(path, &b, 0, b.count);

    struct moe_model *model = open_model(files_path("dense"));
    struct moe_layer_source source;
    struct moe_error err = {""};
    check_layer(model, 1);
    assert_int_equal(moe_model_layer(model, 0, &source, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "layer 0 is dense"));
    assert_int_equal(moe_model_layer(model, 2, &source, &err), MOE_ERROR_INVALID_ARGUMENT);
    assert_non_null(strstr(err.text, "layer 2 does not exist, expected 0 to 1"));
    assert_int_equal(moe_model_layer(model, -1, &source, &err), MOE_ERROR_INVALID_ARGUMENT);

    /* A file that is cut short while it is open. */
    assert_int_equal(moe_model_layer(model, 1, &source, &err), MOE_OK);
    const struct moe_segment *last = &source.segments[source.segment_count - 1];
    char bytes[E * 2 * I * H * sizeof(float)];
    assert_int_equal(truncate(path, (off_t)last->file_offset + 3), 0);
    assert_int_equal(moe_segment_read(last, 0, bytes, last->bytes, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "model.safetensors: ends at byte"));
    moe_layer_source_free(&source);
    moe_model_close(model);
    free_build(&b);
}

static void stacked_halves(void **state)
{
    (void)state;
    struct build b = {.count = 0};
    char path[512];
    add_layer(&b, MOE_NAMING_MIXTRAL, MOE_FORM_STACKED, 0);
    write_config(files_path("half"), "mixtral", "");
    snprintf(path, sizeof path, "%s/half/model.safetensors", files_directory);
    write_tensors(path, &b, 1, 2);
    struct moe_model *model = open_model(files_path("half"));
    struct moe_layer_source source;
    struct moe_error err = {""};
    assert_int_equal(moe_model_layer(model, 0, &source, &err), MOE_ERROR_FILE);
    assert_non_null(
        strstr(err.text, "tensor 'model.layers.0.mlp.experts.down_proj' is missing, and with it all 3 experts"));
    moe_model_close(model);
    free_build(&b);
}

static void *load_many(void *model)
{
    for (int i = 0; i < 50; i++) {
        struct moe_layer_source source;
        if (moe_model_layer(model, i & 1, &source, NULL) != MOE_OK)
            return model;
        moe_layer_source_free(&source);
    }
    return NULL;
}

static void threads_share_a_model(void **state)
{
    (void)state;
    unlink(files_path("shards/model.safetensors"));
    struct moe_model *model = open_model(files_path("shards"));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, load_many, model), 0);
    for (int i = 0; i < 4; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    moe_model_close(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(single_files),
        cmocka_unit_test(shards),
        cmocka_unit_test(shards_without_an_index),
        cmocka_unit_test(refuses_what_is_no_checkpoint),
        cmocka_unit_test(refuses_layers),
        cmocka_unit_test(stacked_halves),
        cmocka_unit_test(threads_share_a_model),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
