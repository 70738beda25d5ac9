/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Malformed checkpoints, one fault each: every one must be refused with MOE_ERROR_FILE and a message of its own that
 * says what is wrong. With `--write DIR` the cases are written to DIR/NAME/ instead, for tests of the command line.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "models/model.h"
#include "tests/unit/files.h"

/* The layer that the cases spoil: 2 experts, hidden 4, intermediate 8, F32. */
#define CONFIG_START "\"model_type\":\"mixtral\",\"num_hidden_layers\":1,\"hidden_size\":4,\"intermediate_size\":8,"
#define CONFIG       "{" CONFIG_START "\"num_local_experts\":2,\"num_experts_per_tok\":1}"
#define SET(more)    "{" CONFIG_START more "}"
#define ALSO(more)   "{" CONFIG_START "\"num_local_experts\":2,\"num_experts_per_tok\":1," more "}"

#define P    "model.layers.0.block_sparse_moe."
#define GATE P "gate.weight"

static const struct tensor {
    const char *name, *shape;
    int elements;
} good[] = {
    {GATE, "[2,4]", 8},
    {P "experts.0.w1.weight", "[8,4]", 32},
    {P "experts.0.w3.weight", "[8,4]", 32},
    {P "experts.0.w2.weight", "[4,8]", 32},
    {P "experts.1.w1.weight", "[8,4]", 32},
    {P "experts.1.w3.weight", "[8,4]", 32},
    {P "experts.1.w2.weight", "[4,8]", 32},
};
enum { TENSORS = sizeof good / sizeof *good };

struct text {
    const char *bytes;
    size_t length; /* 0: to the first NUL */
};

struct malformed {
    const char *name;
    struct text config; /* NULL: the good one */
    struct text header; /* of model.safetensors; NULL: the good one, with the changes below */
    int data_bytes;     /* behind `header` */
    const char *length; /* the 8 bytes before the header, if they are not its length */
    const char *whole;  /* the file, all of it */
    size_t whole_length;
    struct text index;                            /* shards instead of model.safetensors */
    int change;                                   /* 1 + the tensor to change, 0: none */
    const char *new_name, *new_dtype, *new_shape; /* "" as name: left out */
    const char *message;
};

#define RAW(s)                                                                                                         \
    {                                                                                                                  \
        s, sizeof(s) - 1                                                                                               \
    }
#define TXT(s)                                                                                                         \
    {                                                                                                                  \
        s, 0                                                                                                           \
    }
#define ONE(dtype, shape, offsets) "{\"t\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
#define TWO(a, b)                                                                                                      \
    "{\"t\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" a                                                       \
    "},\"u\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" b "}}"

static const struct malformed cases[] = {
    /* config.json: the text */
    {.name = "config-empty", .config = RAW(" "), .message = "line 1, column 2: expected a JSON object"},
    {.name = "config-array", .config = RAW("[1]"), .message = "line 1, column 1: expected a JSON object"},
    {.name = "config-cut", .config = RAW("{\"model_type\":\"mix"), .message = "the text ends inside a string"},
    {.name = "config-cut-object", .config = RAW("{\"a\":1"), .message = "the text ends inside an object or array"},
    {.name = "config-trailing", .config = RAW(CONFIG "x"), .message = "text after the end of the object"},
    {.name = "config-bom", .config = RAW("\xEF\xBB\xBF" CONFIG), .message = "byte-order mark"},
    {.name = "config-latin1", .config = RAW(ALSO("\"x\":\"\xE9\"")), .message = "bytes that are not UTF-8"},
    {.name = "config-control", .config = RAW(ALSO("\"x\":\"\x1b[2J\"")), .message = "raw control character"},
    {.name = "config-nul-escape", .config = RAW(ALSO("\"a\\u0000\":1")), .message = "\\u0000 in a string"},
    {.name = "config-surrogate", .config = RAW(ALSO("\"a\":\"\\ud800\"")), .message = "half of a surrogate pair"},
    {.name = "config-escape", .config = RAW(ALSO("\"a\":\"\\q\"")), .message = "unknown escape"},
    {.name = "config-comma", .config = RAW(ALSO("")), .message = "expected a key in double quotes"},
    {.name = "config-no-colon", .config = RAW(ALSO("\"a\" 1")), .message = "expected ':' after a key"},
    {.name = "config-no-value", .config = RAW(ALSO("\"a\":")), .message = "expected a value"},
    {.name = "config-octal", .config = RAW(ALSO("\"a\":017")), .message = "number with a leading zero"},
    {.name = "config-no-digit", .config = RAW(ALSO("\"a\":1.")), .message = "expected a digit"},
    {.name = "config-long-number",
     .config = RAW(ALSO("\"a\":1000000000000000000000000000000000000000000000000000000000000000")),
     .message = "number of more than 63 characters"},
    {.name = "config-twice", .config = RAW(ALSO("\"hidden_size\":4")), .message = "'hidden_size' appears twice"},
    {.name = "config-deep",
     .config = RAW(ALSO("\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["
                        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[")),
     .message = "nested more than 128 levels"},

    /* config.json: the fields */
    {.name = "type-missing", .config = RAW("{}"), .message = "'model_type' is missing"},
    {.name = "type-number", .config = RAW("{\"model_type\":7}"), .message = "'model_type' is 7"},
    {.name = "type-unknown", .config = RAW("{\"model_type\":\"llama\"}"), .message = "'model_type' is \"llama\""},
    {.name = "type-unsupported",
     .config = RAW("{\"model_type\":\"deepseek_v3\"}"),
     .message = "needs group-limited sigmoid routing: not supported yet"},
    {.name = "quantised",
     .config = RAW(ALSO("\"quantization_config\":{\"quant_method\":\"gptq\"}")),
     .message = "'quantization_config' has quant_method \"gptq\""},
    {.name = "dtype-unknown", .config = RAW(ALSO("\"dtype\":\"int8\"")), .message = "'dtype' is \"int8\""},
    {.name = "dtype-two",
     .config = RAW(ALSO("\"dtype\":\"float16\",\"torch_dtype\":\"float32\"")),
     .message = "'torch_dtype' is \"float32\", expected the same as 'dtype'"},
    {.name = "activation", .config = RAW(ALSO("\"hidden_act\":\"gelu\"")), .message = "'hidden_act' is \"gelu\""},
    {.name = "layers-missing",
     .config = RAW("{\"model_type\":\"mixtral\"}"),
     .message = "'num_hidden_layers' is missing"},
    {.name = "layers-huge",
     .config = RAW("{\"model_type\":\"mixtral\",\"num_hidden_layers\":1e9}"),
     .message = "'num_hidden_layers' is 1000000000, expected an integer from 1 to 100000"},
    {.name = "hidden-string",
     .config = RAW("{\"model_type\":\"mixtral\",\"num_hidden_layers\":1,\"hidden_size\":\"4\"}"),
     .message = "'hidden_size' is \"4\", expected an integer from 1 to 1048576"},
    {.name = "intermediate-list",
     .config = RAW("{\"model_type\":\"mixtral\",\"num_hidden_layers\":1,\"hidden_size\":4,\"intermediate_size\":[8]}"),
     .message = "'intermediate_size' is an array"},
    {.name = "experts-missing",
     .config = RAW(SET("\"num_experts_per_tok\":1")),
     .message = "'num_local_experts' is missing"},
    {.name = "experts-zero", .config = RAW(SET("\"num_local_experts\":0")), .message = "'num_local_experts' is 0"},
    {.name = "experts-negative",
     .config = RAW(SET("\"num_local_experts\":-3")),
     .message = "'num_local_experts' is -3"},
    {.name = "experts-fraction",
     .config = RAW(SET("\"num_local_experts\":2.5")),
     .message = "'num_local_experts' is 2.5"},
    {.name = "experts-huge",
     .config = RAW(SET("\"num_local_experts\":1e300")),
     .message = "'num_local_experts' is 1e+300"},
    {.name = "experts-disagree", .config = RAW(ALSO("\"num_experts\":3")), .message = "but 'num_experts' is 3"},
    {.name = "top-k-missing",
     .config = RAW(SET("\"num_local_experts\":2")),
     .message = "'num_experts_per_tok' is missing, expected an integer from 1 to 64"},
    {.name = "top-k-large",
     .config = RAW(SET("\"num_local_experts\":2,\"num_experts_per_tok\":3")),
     .message = "'num_experts_per_tok' is 3, expected at most 'num_local_experts', which is 2"},
    {.name = "all-dense",
     .config =
         RAW("{\"model_type\":\"qwen3_moe\",\"num_hidden_layers\":1,\"hidden_size\":4,\"moe_intermediate_size\":8,"
             "\"num_experts\":2,\"num_experts_per_tok\":1,\"mlp_only_layers\":[0]}"),
     .message = "layer 0 is dense by config.json"},
    {.name = "sparse-step",
     .config =
         RAW("{\"model_type\":\"qwen3_moe\",\"num_hidden_layers\":1,\"hidden_size\":4,\"moe_intermediate_size\":8,"
             "\"num_experts\":2,\"num_experts_per_tok\":1,\"decoder_sparse_step\":0}"),
     .message = "'decoder_sparse_step' is 0"},

    /* model.safetensors: before the header */
    {.name = "st-empty", .whole = "", .message = "is empty, expected safetensors"},
    {.name = "st-seven-bytes", .whole = "1234567", .whole_length = 7, .message = "has 7 bytes, expected at least 8"},
    {.name = "st-lfs",
     .whole = "version https://git-lfs.github.com/spec/v1\n",
     .whole_length = 43,
     .message = "is a Git LFS pointer"},
    {.name = "st-length-huge",
     .header = TXT("{}"),
     .length = "\xff\xff\xff\xff\xff\xff\xff\xff",
     .message = "header length is 18446744073709551615, expected at most 100000000"},
    {.name = "st-length-past-end",
     .header = TXT("{}"),
     .length = "\3\0\0\0\0\0\0\0",
     .message = "header length is 3, but the file has only 10 bytes"},
    {.name = "st-length-zero",
     .header = TXT("{}"),
     .length = "\0\0\0\0\0\0\0\0",
     .message = "header length is 0, expected at least 2"},
    {.name = "st-leading-space", .header = TXT(" {}"), .message = "header begins with byte 0x20, expected '{'"},
    {.name = "st-trailing-newline",
     .header = TXT("{}\n"),
     .message = "header ends with byte 0x0a, expected '}' or spaces"},
    {.name = "st-trailing-nul",
     .header = RAW("{}\0\0"),
     .message = "header ends with byte 0x00, expected '}' or spaces"},

    /* model.safetensors: the header */
    {.name = "st-twice",
     .header = TXT("{\"t\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},"
                   "\"t\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"),
     .message = "key 't' appears twice"},
    {.name = "st-metadata-twice",
     .header = TXT("{\"__metadata__\":{},\"__metadata__\":{}}"),
     .message = "key '__metadata__' appears twice"},
    {.name = "st-metadata-array", .header = TXT("{\"__metadata__\":[]}"), .message = "'__metadata__' is no object"},
    {.name = "st-metadata-number",
     .header = TXT("{\"__metadata__\":{\"n\":1}}"),
     .message = "'__metadata__' holds 'n', which is no string"},
    {.name = "st-entry-array", .header = TXT("{\"t\":[]}"), .message = "tensor 't': entry is no object"},
    {.name = "st-dtype-missing",
     .header = TXT("{\"t\":{\"shape\":[],\"data_offsets\":[0,1]}}"),
     .data_bytes = 1,
     .message = "'dtype' is missing"},
    {.name = "st-dtype-case",
     .header = TXT(ONE("\"f32\"", "[1]", "[0,4]")),
     .data_bytes = 4,
     .message = "'dtype' is \"f32\""},
    {.name = "st-dtype-number", .header = TXT(ONE("32", "[1]", "[0,4]")), .data_bytes = 4, .message = "'dtype' is 32"},
    {.name = "st-shape-missing",
     .header = TXT("{\"t\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}"),
     .data_bytes = 1,
     .message = "'shape' is missing"},
    {.name = "st-shape-number",
     .header = TXT(ONE("\"U8\"", "4", "[0,4]")),
     .data_bytes = 4,
     .message = "'shape' is no array"},
    {.name = "st-shape-negative",
     .header = TXT(ONE("\"U8\"", "[-1]", "[0,4]")),
     .data_bytes = 4,
     .message = "'shape' has -1"},
    {.name = "st-shape-fraction",
     .header = TXT(ONE("\"U8\"", "[1.5]", "[0,4]")),
     .data_bytes = 4,
     .message = "'shape' has 1.5"},
    {.name = "st-shape-string",
     .header = TXT(ONE("\"U8\"", "[\"4\"]", "[0,4]")),
     .data_bytes = 4,
     .message = "'shape' has \"4\""},
    {.name = "st-shape-inexact",
     .header = TXT(ONE("\"U8\"", "[9007199254740993,0]", "[0,0]")),
     .message = "'shape' has 9007199254740992"},
    {.name = "st-rank",
     .header = TXT(ONE("\"U8\"", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]")),
     .data_bytes = 1,
     .message = "'shape' has more than 16 dimensions"},
    {.name = "st-product-wraps",
     .header = TXT(ONE("\"U8\"", "[4294967296,4294967296]", "[0,0]")),
     .message = "'shape' of U8 makes no whole number of bytes"},
    {.name = "st-product-wraps-zero",
     .header = TXT(ONE("\"F32\"", "[4294967296,4294967296,0]", "[0,0]")),
     .message = "'shape' of F32 makes no whole number of bytes"},
    {.name = "st-half-byte",
     .header = TXT(ONE("\"F4\"", "[3]", "[0,2]")),
     .data_bytes = 2,
     .message = "'shape' of F4 makes no whole number of bytes"},
    {.name = "st-size",
     .header = TXT(ONE("\"F32\"", "[3]", "[0,8]")),
     .data_bytes = 8,
     .message = "'shape' and 'dtype' make 12 bytes, but 'data_offsets' spans 8"},
    {.name = "st-offsets-missing",
     .header = TXT("{\"t\":{\"dtype\":\"U8\",\"shape\":[1]}}"),
     .data_bytes = 1,
     .message = "'data_offsets' is missing"},
    {.name = "st-offsets-three",
     .header = TXT(ONE("\"U8\"", "[1]", "[0,1,1]")),
     .data_bytes = 1,
     .message = "'data_offsets' is something else"},
    {.name = "st-offsets-reversed",
     .header = TXT(ONE("\"U8\"", "[1]", "[1,0]")),
     .data_bytes = 1,
     .message = "'data_offsets' is [1, 0], which ends before it begins"},
    {.name = "st-cut",
     .header = TXT(ONE("\"U8\"", "[4]", "[0,4]")),
     .data_bytes = 3,
     .message = "but the file holds 3 bytes of data: cut short?"},
    {.name = "st-offset-wraps",
     .header = TXT(ONE("\"U8\"", "[1]", "[9007199254740990,9007199254740991]")),
     .data_bytes = 1,
     .message = "'data_offsets' is [9007199254740990, 9007199254740991], but"},
    {.name = "st-overlap", .header = TXT(TWO("[0,4]", "[3,7]")), .data_bytes = 7, .message = "tensor 'u' overlaps 't'"},
    {.name = "st-alias",
     .header = TXT(TWO("[4,8]", "[4,8]")),
     .data_bytes = 8,
     .message = "4 bytes before tensor 't' belong to no tensor"},
    {.name = "st-hole",
     .header = TXT(TWO("[0,4]", "[5,9]")),
     .data_bytes = 9,
     .message = "1 bytes before tensor 'u' belong to no tensor"},
    {.name = "st-trailing-bytes",
     .header = TXT(TWO("[0,4]", "[4,8]")),
     .data_bytes = 10,
     .message = "2 bytes after the last tensor belong to no tensor"},

    /* the layer */
    {.name = "layer-missing",
     .header = TXT("{}"),
     .message = "2 of 2 experts are incomplete: tensor '" P "experts.0.w1"},
    {.name = "gate-missing", .change = 1, .new_name = "x", .message = "the router's tensor '" GATE "' is missing"},
    {.name = "expert-missing",
     .change = 6,
     .new_name = "x",
     .message = "1 of 2 experts are incomplete: tensor '" P "experts.1.w3.weight' is missing"},
    {.name = "gate-shape", .change = 1, .new_shape = "[4,2]", .message = "has shape [4, 2], expected [2, 4]"},
    {.name = "gate-dtype",
     .change = 1,
     .new_dtype = "I32",
     .message = "gate.weight' is I32, expected BF16, F16 or F32"},
    {.name = "expert-transposed",
     .change = 2,
     .new_shape = "[4,8]",
     .message = "experts.0.w1.weight' has shape [4, 8], expected [8, 4]"},
    {.name = "expert-rank",
     .change = 4,
     .new_shape = "[4,2,4]",
     .message = "experts.0.w2.weight' has shape [4, 2, 4], expected [4, 8]"},
    {.name = "expert-dtype",
     .change = 3,
     .new_dtype = "U32",
     .message = "experts.0.w3.weight' is U32, expected BF16, F16 or F32"},
    {.name = "expert-dtypes-differ",
     .change = 5,
     .new_dtype = "BF16",
     .message = "experts.1.w1.weight' is BF16, but '" P "experts.0.w1.weight' is F32, expected one dtype"},
    {.name = "two-forms",
     .change = 1,
     .new_name = "model.layers.0.mlp.experts.down_proj",
     .message = "layer 0 holds experts both one by one and stacked"},

    /* model.safetensors.index.json */
    {.name = "index-cut", .index = RAW("{\"weight_map\":{\"a\":"), .message = "index.json: not valid JSON at line 1"},
    {.name = "index-no-map", .index = RAW("{\"metadata\":{}}"), .message = "'weight_map' is missing"},
    {.name = "index-map-array", .index = RAW("{\"weight_map\":[]}"), .message = "'weight_map' is an array"},
    {.name = "index-map-empty", .index = RAW("{\"weight_map\":{}}"), .message = "'weight_map' is empty"},
    {.name = "index-number", .index = RAW("{\"weight_map\":{\"t\":1}}"), .message = "gives tensor 't' the file 1"},
    {.name = "index-absolute",
     .index = RAW("{\"weight_map\":{\"t\":\"/etc/passwd\"}}"),
     .message = "gives tensor 't' the file \"/etc/passwd\", expected a plain file name"},
    {.name = "index-parent", .index = RAW("{\"weight_map\":{\"t\":\"..\"}}"), .message = "the file \"..\", expected"},
    {.name = "index-up", .index = RAW("{\"weight_map\":{\"t\":\"../x\"}}"), .message = "the file \"../x\", expected"},
    {.name = "index-no-name", .index = RAW("{\"weight_map\":{\"t\":\"\"}}"), .message = "the file \"\", expected"},
    {.name = "index-nul",
     .index = RAW("{\"weight_map\":{\"t\":\"a\\u0000b\"}}"),
     .message = "index.json: not valid JSON "
                "at line 1, column 28: \\u0000"},
    {.name = "index-twice",
     .index = RAW("{\"weight_map\":{\"t\":\"a\",\"t\":\"b\"}}"),
     .message = "key 't' appears twice"},
    {.name = "shard-missing",
     .index = RAW("{\"weight_map\":{\"" GATE "\":\"gone\",\"" P "experts.0.w1.weight\":\"gone\",\"" P
                  "experts.0.w2.weight\":\"gone\",\"" P "experts.0.w3.weight\":\"gone\",\"" P
                  "experts.1.w1.weight\":\"gone\",\"" P "experts.1.w2.weight\":\"gone\",\"" P
                  "experts.1.w3.weight\":\"gone\"}}"),
     .message = "/gone: the shard is missing"},
    {.name = "shard-lacks-tensor",
     .index = RAW("{\"weight_map\":{\"more\":\"shard\",\"" GATE "\":\"shard\",\"" P
                  "experts.0.w1.weight\":\"shard\",\"" P "experts.0.w2.weight\":\"shard\",\"" P
                  "experts.0.w3.weight\":\"shard\",\"" P "experts.1.w1.weight\":\"shard\",\"" P
                  "experts.1.w2.weight\":\"shard\",\"" P "experts.1.w3.weight\":\"shard\"}}"),
     .message = "/shard: lacks tensor 'more', which the index puts there"},
    {.name = "shard-holds-other",
     .index = RAW("{\"weight_map\":{\"" GATE "\":\"shard\",\"" P "experts.0.w1.weight\":\"gone\",\"" P
                  "experts.0.w2.weight\":\"shard\",\"" P "experts.0.w3.weight\":\"shard\",\"" P
                  "experts.1.w1.weight\":\"shard\",\"" P "experts.1.w2.weight\":\"shard\",\"" P
                  "experts.1.w3.weight\":\"shard\"}}"),
     .message = "/shard: holds tensor '" P "experts.0.w1.weight', which the index puts in 'gone'"},
};
enum { CASES = sizeof cases / sizeof *cases };

static size_t size_of(const struct text *text)
{
    return text->length ? text->length : strlen(text->bytes);
}

/* Writes a safetensors file of header and zeroes. */
static void write_st(const char *path, const char *header, size_t header_bytes, size_t data_bytes, const char *length)
{
    size_t total = 8 + header_bytes + data_bytes;
    char *bytes = calloc(1, total);
    for (int i = 0; i < 8; i++)
        bytes[i] = length ? length[i] : (char)((uint64_t)header_bytes >> (8 * i));
    memcpy(bytes + 8, header, header_bytes);
    files_write_at(path, bytes, total);
    free(bytes);
}

/* The good layer with the change that the case asks for. */
static void write_layer(const char *path, const struct malformed *c)
{
    char header[4096];
    size_t at = 0;
    int bytes = 0;
    for (int i = 0; i < TENSORS; i++) {
        bool changed = c->change == i + 1;
        const char *dtype = changed && c->new_dtype ? c->new_dtype : "F32";
        int size = good[i].elements * (strcmp(dtype, "BF16") ? 4 : 2);
        at += (size_t)snprintf(header + at, sizeof header - at,
                               "%c\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%d,%d]}", i ? ',' : '{',
                               changed && c->new_name ? c->new_name : good[i].name, dtype,
                               changed && c->new_shape ? c->new_shape : good[i].shape, bytes, bytes + size);
        bytes += size;
    }
    header[at++] = '}';
    write_st(path, header, at, (size_t)bytes, NULL);
}

static void write_case(const char *directory, const struct malformed *c)
{
    char path[1024];
    mkdir(directory, 0755);
    snprintf(path, sizeof path, "%s/config.json", directory);
    const struct text config = c->config.bytes ? c->config : (struct text)TXT(CONFIG);
    files_write_at(path, config.bytes, size_of(&config));
    if (c->index.bytes) {
        snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
        files_write_at(path, c->index.bytes, size_of(&c->index));
    }
    snprintf(path, sizeof path, "%s/%s", directory, c->index.bytes ? "shard" : "model.safetensors");
    if (c->whole)
        files_write_at(path, c->whole, c->whole_length);
    else if (c->header.bytes)
        write_st(path, c->header.bytes, size_of(&c->header), (size_t)c->data_bytes, c->length);
    else
        write_layer(path, c);
}

static moe_status load(const char *directory, struct moe_error *err)
{
    struct moe_model *model;
    struct moe_layer_source source;
    moe_status status = moe_model_open(directory, &model, err);
    if (status == MOE_OK)
        status = moe_model_layer(model, 0, &source, err);
    if (status == MOE_OK)
        moe_layer_source_free(&source);
    moe_model_close(model);
    return status;
}

static void good_layer_loads(void **state)
{
    (void)state;
    static const struct malformed unspoiled = {.name = "good"};
    struct moe_error err = {""};
    write_case(files_path("good"), &unspoiled);
    if (load(files_path("good"), &err) != MOE_OK)
        fail_msg("%s", err.text);
}

static void each_is_refused_in_its_own_words(void **state)
{
    (void)state;
    static struct moe_error messages[CASES];
    assert_true(CASES >= 60);
    for (int i = 0; i < CASES; i++) {
        const char *directory = files_path(cases[i].name);
        write_case(directory, &cases[i]);
        moe_status status = load(directory, &messages[i]);
        const char *text = messages[i].text;
        if (status != MOE_ERROR_FILE || !strstr(text, cases[i].message))
            fail_msg("%s: status %d, '%s', expected '%s'", cases[i].name, status, text, cases[i].message);
        if (strncmp(text, directory, strlen(directory)) || strchr(text, '\n'))
            fail_msg("%s: '%s' is not one line that begins with the file", cases[i].name, text);
        /* What stands behind the directory must be new. */
        memmove(messages[i].text, text + strlen(directory), strlen(text + strlen(directory)) + 1);
        for (int j = 0; j < i; j++)
            if (!strcmp(messages[j].text, messages[i].text))
                fail_msg("%s and %s: both '%s'", cases[j].name, cases[i].name, messages[i].text);
    }
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--write")) {
        mkdir(argv[2], 0755);
        for (int i = 0; i < CASES; i++) {
            char directory[1000];
            snprintf(directory, sizeof directory, "%s/%s", argv[2], cases[i].name);
            write_case(directory, &cases[i]);
        }
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_layer_loads),
        cmocka_unit_test(each_is_refused_in_its_own_words),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
