/* SPDX-License-Identifier: Apache-2.0 */
/* moe synth: a random checkpoint in the on-disk form of a model family, and random hidden states. */
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "config/file.h"
#include "config/json.h"
#include "config/output.h"
#include "kernels/cpu/pool.h"
#include "models/names.h"
#include "models/safetensors.h"
#include "tools/cli.h"
#include "tools/normal.h"
#include "tools/synth_config.h"

static const struct cli_usage usage = {
    .command = "synth",
    .summary = "write a random checkpoint in the on-disk form of a model family",
    .examples = "  moe synth --like mixtral-8x7b --output model\n"
                "  moe synth --like tiny-mixtral --output model --hidden-states x.safetensors --tokens 16\n"
                "  moe synth --like qwen3-30b-a3b --output model --experts 32 --layers 2 --shard-size 500MB\n"
                "  moe synth --config Mixtral-8x7B-v0.1/config.json --output model --seed 7\n"
                "  moe synth --model Mixtral-8x7B-v0.1 --hidden-states x.safetensors --tokens 512\n",
    .notes =
        "The checkpoint holds the tensors of the MoE layers and no others, under the names of the family. Weights\n"
        "are normal with standard deviation 1/sqrt(columns), hidden states with 1: so logits vary by about 1 and\n"
        "activations keep their size. Same options, same bytes, whatever the number of threads.\n"
        "Models: mixtral-8x7b, mixtral-8x22b, qwen3-30b-a3b, qwen3-235b-a22b, olmoe-1b-7b, and for tests\n"
        "tiny-mixtral, tiny-qwen3-moe.\n",
};

struct synth_options {
    int like; /* -1: not given */
    const char *config, *model, *output, *hidden_states;
    struct synth_changes changes;
    int64_t seed, shard_size, tokens, threads;
    bool force, json;
};

/* Standard deviations differ by the number of columns, and each needs a table. */
enum stream { STREAM_HIDDEN, STREAM_INTERMEDIATE, STREAM_UNIT, STREAMS };

/* Tensors to write, in file order; the two arrays run in parallel. */
struct tensor_list {
    struct moe_st_write_tensor *tensors; /* own their names */
    enum stream *streams;
    size_t count, room;
};

struct synth {
    struct synth_options o;
    struct moe_config config;
    cJSON *json; /* the config.json to write */
    struct moe_pool *pool;
    struct normal *streams[STREAMS];
    struct tensor_list list;
    size_t *shards; /* first tensor of each shard, then the end */
    size_t shard_count;
    size_t files_written; /* shards under their names */
    bool made_directory;
    void *buffer;
    struct cli_progress progress;
    uint64_t bytes, bytes_total;
    double seconds;
};

enum { BUFFER_BYTES = 16 << 20, FILL_ELEMENTS = 1 << 16, MAX_CONFIG_BYTES = 16 << 20 };

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
    interrupted = number;
}

/* ---- Options ---- */

static int parse(int argc, char **argv, struct synth_options *o)
{
    *o = (struct synth_options){.like = -1, .seed = 1, .shard_size = 5000000000, .changes.layers = 0};
    const struct cli_option options[] = {
        {.name = "like",
         .kind = CLI_CHOICE,
         .value = &o->like,
         .argument = "NAME",
         .help = "shape and form of a released model, see below",
         .choices = synth_models},
        {.name = "config",
         .kind = CLI_STRING,
         .value = &o->config,
         .argument = "FILE",
         .help = "shape and form of this config.json"},
        {.name = "model",
         .kind = CLI_STRING,
         .value = &o->model,
         .argument = "DIR",
         .help = "a checkpoint to write hidden states for"},
        {.name = "output",
         .letter = 'o',
         .kind = CLI_STRING,
         .value = &o->output,
         .argument = "DIR",
         .help = "write the checkpoint here"},
        {.name = "layers",
         .kind = CLI_INTEGER,
         .value = &o->changes.layers,
         .argument = "N",
         .help = "layers (default 1)",
         .low = 1,
         .high = 100000},
        {.name = "dtype",
         .kind = CLI_DTYPE,
         .value = &o->changes.dtype,
         .argument = "D",
         .help = "bf16, f16 or f32 (default: the model's)"},
        {.name = "seed",
         .kind = CLI_INTEGER,
         .value = &o->seed,
         .argument = "S",
         .help = "default 1",
         .low = 0,
         .high = INT64_MAX},
        {.name = "hidden",
         .kind = CLI_INTEGER,
         .value = &o->changes.hidden,
         .argument = "N",
         .help = "change hidden_size",
         .low = 1,
         .high = MOE_MAX_SIZE},
        {.name = "intermediate",
         .kind = CLI_INTEGER,
         .value = &o->changes.intermediate,
         .argument = "N",
         .help = "change the experts' intermediate size",
         .low = 1,
         .high = MOE_MAX_SIZE},
        {.name = "experts",
         .kind = CLI_INTEGER,
         .value = &o->changes.experts,
         .argument = "N",
         .help = "change the number of experts",
         .low = 1,
         .high = MOE_MAX_EXPERTS},
        {.name = "top-k",
         .kind = CLI_INTEGER,
         .value = &o->changes.top_k,
         .argument = "N",
         .help = "change the experts per token",
         .low = 1,
         .high = MOE_MAX_TOP_K},
        {.name = "shard-size",
         .kind = CLI_BYTES,
         .value = &o->shard_size,
         .argument = "BYTES",
         .help = "largest file, if a tensor fits (default 5GB)",
         .low = 1,
         .high = INT64_MAX},
        {.name = "force",
         .kind = CLI_FLAG,
         .value = &o->force,
         .help = "replace the checkpoint that the directory holds"},
        {.name = "hidden-states",
         .kind = CLI_STRING,
         .value = &o->hidden_states,
         .argument = "FILE",
         .help = "write random hidden_states [tokens, hidden] here"},
        {.name = "tokens",
         .kind = CLI_INTEGER,
         .value = &o->tokens,
         .argument = "T",
         .help = "how many tokens of hidden states",
         .low = 0,
         .high = INT32_MAX},
        {.name = "threads",
         .kind = CLI_INTEGER,
         .value = &o->threads,
         .argument = "N",
         .help = "CPU threads (default: as many as the process may use)",
         .low = 1,
         .high = 4096},
        {.name = "json", .kind = CLI_FLAG, .value = &o->json, .help = "report as JSON"},
        {.name = NULL},
    };
    o->tokens = -1;
    int code = cli_parse(&usage, options, argc, argv);
    if (code != CLI_GO)
        return code;
    if ((o->like >= 0) + !!o->config + !!o->model != 1)
        return cli_fail(CLI_EXIT_USAGE, "synth: expected one of --like, --config and --model");
    if (o->model && o->output)
        return cli_fail(CLI_EXIT_USAGE, "synth: --output takes its form from --like or --config, not from --model");
    if (o->model &&
        (o->changes.layers || o->changes.hidden || o->changes.intermediate || o->changes.experts || o->changes.top_k))
        return cli_fail(CLI_EXIT_USAGE, "synth: the sizes of --model are fixed, only --dtype and --tokens go with it");
    if (!o->output && !o->hidden_states)
        return cli_fail(CLI_EXIT_USAGE, "synth: --output or --hidden-states is required");
    if (!o->hidden_states != (o->tokens < 0))
        return cli_fail(CLI_EXIT_USAGE, "synth: --hidden-states and --tokens belong together");
    return CLI_GO;
}

/* The description, from wherever it comes, with the changes applied. What a file says wrong is an error in the file,
 * what the changes make of it is one of usage. */
static int read_config(struct synth *s)
{
    struct synth_options *o = &s->o;
    struct moe_error err = {{0}};
    moe_status status = MOE_OK;
    const char *name = "the config";
    char path[4096];
    if (o->like >= 0) {
        s->json = synth_config_like(o->like);
        if (!s->json)
            return cli_fail_memory();
        name = synth_models[o->like];
    } else {
        snprintf(path, sizeof path, "%s%s", o->config ? o->config : o->model, o->config ? "" : "/config.json");
        name = path;
        status = moe_config_load(path, &s->config, &err);
        if (status == MOE_OK && s->config.layer.dtype == MOE_DTYPE_NONE && o->changes.dtype == MOE_DTYPE_NONE)
            o->changes.dtype = MOE_BF16;
        moe_config_free(&s->config);
        if (status == MOE_OK)
            status = moe_json_load(path, MAX_CONFIG_BYTES, &s->json, &err);
        if (status != MOE_OK)
            return cli_fail_error(status, &err);
    }
    if (o->changes.layers == 0 && !o->model)
        o->changes.layers = 1;
    status = synth_config_change(s->json, &o->changes, name, &s->config, &err);
    if (status == MOE_ERROR_FILE)
        return cli_fail(CLI_EXIT_USAGE, "%s", err.text);
    return status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
}

/* ---- What to write ---- */

static uint64_t tensor_bytes(const struct moe_st_write_tensor *tensor)
{
    return (uint64_t)tensor->shape[0] * (uint64_t)tensor->shape[1] * moe_dtype_size(tensor->dtype);
}

static bool add_tensor(struct synth *s, enum stream stream, int64_t rows, int64_t columns, enum moe_role role,
                       int32_t layer, int32_t expert)
{
    struct tensor_list *list = &s->list;
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        void *tensors = realloc(list->tensors, room * sizeof list->tensors[0]);
        if (tensors)
            list->tensors = tensors;
        void *streams = realloc(list->streams, room * sizeof list->streams[0]);
        if (streams)
            list->streams = streams;
        if (!tensors || !streams)
            return false;
        list->room = room;
    }
    char name[MOE_MAX_TENSOR_NAME];
    moe_tensor_name(s->config.family->naming, MOE_FORM_PER_EXPERT, role, layer, expert, name);
    struct moe_st_write_tensor *tensor = &list->tensors[list->count];
    *tensor = (struct moe_st_write_tensor){strdup(name), s->config.layer.dtype, 2, {rows, columns}, NULL};
    list->streams[list->count] = stream;
    if (!tensor->name)
        return false;
    list->count++;
    return true;
}

static bool add_layer(struct synth *s, int32_t layer)
{
    const moe_layer_desc *desc = &s->config.layer;
    int64_t h = desc->hidden_size, i = desc->intermediate_size;
    bool ok = add_tensor(s, STREAM_HIDDEN, desc->num_experts, h, MOE_ROLE_GATE, layer, 0);
    for (int32_t e = 0; ok && e < desc->num_experts; e++)
        ok = add_tensor(s, STREAM_HIDDEN, i, h, MOE_ROLE_W1, layer, e) &&
             add_tensor(s, STREAM_INTERMEDIATE, h, i, MOE_ROLE_W2, layer, e) &&
             add_tensor(s, STREAM_HIDDEN, i, h, MOE_ROLE_W3, layer, e);
    return ok;
}

/* Fills shards up to the limit; a tensor beyond it gets one of its own. */
static bool plan_shards(struct synth *s)
{
    s->shards = calloc(s->list.count + 1, sizeof s->shards[0]);
    if (!s->shards)
        return false;
    uint64_t used = 0;
    s->shard_count = 1;
    for (size_t i = 0; i < s->list.count; i++) {
        uint64_t bytes = tensor_bytes(&s->list.tensors[i]);
        if (used > 0 && used + bytes > (uint64_t)s->o.shard_size) {
            s->shards[s->shard_count++] = i;
            used = 0;
        }
        used += bytes;
        s->bytes_total += bytes;
    }
    s->shards[s->shard_count] = s->list.count;
    return true;
}

static int plan_checkpoint(struct synth *s)
{
    /* Checked first, because the list of tensors alone could be larger than memory. */
    const moe_layer_desc *desc = &s->config.layer;
    uint64_t total;
    if (__builtin_mul_overflow(cli_layer_bytes(desc), (uint64_t)s->config.num_layers, &total) || total > INT64_MAX ||
        (uint64_t)s->config.num_layers * (uint64_t)desc->num_experts > 10000000)
        return cli_fail(CLI_EXIT_USAGE, "synth: %d layers of %d experts are more than can be written",
                        s->config.num_layers, desc->num_experts);
    for (int32_t layer = 0; layer < s->config.num_layers; layer++) {
        if (moe_config_layer_is_sparse(&s->config, layer) && !add_layer(s, layer))
            return cli_fail_memory();
    }
    if (s->list.count == 0)
        return cli_fail(CLI_EXIT_USAGE,
                        "synth: none of the first %d layers is an MoE layer (decoder_sparse_step is %d), expected more "
                        "--layers",
                        s->config.num_layers, s->config.sparse_step);
    return plan_shards(s) ? CLI_GO : cli_fail_memory();
}

/* ---- Writing a file of random tensors ---- */

struct fill {
    struct moe_pool *pool;
    const struct normal *stream;
    uint64_t first;
    int64_t count;
    char *to;
};

static void fill_thread(void *argument, int32_t thread, int32_t threads)
{
    const struct fill *fill = argument;
    size_t element = moe_dtype_size(fill->stream->dtype);
    (void)thread;
    (void)threads;
    for (;;) {
        int64_t at = moe_pool_next(fill->pool, FILL_ELEMENTS);
        if (at >= fill->count)
            return;
        int64_t n = fill->count - at < FILL_ELEMENTS ? fill->count - at : FILL_ELEMENTS;
        normal_fill(fill->stream, fill->first + (uint64_t)at, n, fill->to + (size_t)at * element);
    }
}

/* The tables of the streams in use, and memory for one piece. */
static bool prepare(struct synth *s)
{
    const moe_layer_desc *desc = &s->config.layer;
    const double deviations[STREAMS] = {1 / sqrt((double)desc->hidden_size), 1 / sqrt((double)desc->intermediate_size),
                                        1};
    for (int i = 0; i < STREAMS; i++) {
        s->streams[i] = malloc(sizeof *s->streams[i]);
        if (!s->streams[i])
            return false;
        normal_init(s->streams[i], desc->dtype, deviations[i]);
    }
    s->buffer = malloc(BUFFER_BYTES);
    return s->buffer && moe_pool_create((int32_t)s->o.threads, &s->pool) == MOE_OK;
}

static moe_status write_tensor(struct synth *s, struct moe_st_writer *writer, const struct moe_st_write_tensor *tensor,
                               enum stream which, struct moe_error *err)
{
    struct normal *stream = s->streams[which];
    size_t element = moe_dtype_size(tensor->dtype);
    int64_t count = tensor->shape[0] * tensor->shape[1], room = (int64_t)(BUFFER_BYTES / element);
    normal_seek(stream, (uint64_t)s->o.seed, tensor->name);
    for (int64_t at = 0; at < count; at += room) {
        struct fill fill = {s->pool, stream, (uint64_t)at, count - at < room ? count - at : room, s->buffer};
        moe_pool_run(s->pool, fill_thread, &fill);
        size_t bytes = (size_t)fill.count * element;
        moe_status status = moe_st_writer_data(writer, s->buffer, bytes, err);
        if (status == MOE_OK && interrupted)
            status = moe_fail(err, MOE_ERROR_WRITE, "interrupted");
        if (status != MOE_OK)
            return status;
        s->bytes += bytes;
        cli_progress_update(&s->progress, s->bytes, s->bytes_total);
    }
    return MOE_OK;
}

static moe_status write_file(struct synth *s, const char *path, const struct moe_st_write_tensor *tensors,
                             const enum stream *streams, size_t count, struct moe_error *err)
{
    struct moe_st_writer *writer = NULL;
    moe_status status = moe_st_writer_open(path, tensors, count, &writer, err);
    if (status != MOE_OK)
        return status;
    for (size_t i = 0; status == MOE_OK && i < count; i++)
        status = write_tensor(s, writer, &tensors[i], streams[i], err);
    if (status == MOE_OK)
        return moe_st_writer_commit(writer, err);
    moe_st_writer_abort(writer);
    return status;
}

/* ---- The checkpoint directory ---- */

static const char *shard_name(const struct synth *s, size_t shard, char *buffer, size_t bytes)
{
    if (s->shard_count == 1)
        snprintf(buffer, bytes, "model.safetensors");
    else
        snprintf(buffer, bytes, "model-%05zu-of-%05zu.safetensors", shard + 1, s->shard_count);
    return buffer;
}

static bool is_checkpoint_file(const char *name)
{
    unsigned a, b;
    int end = 0;
    if (strcmp(name, "config.json") == 0 || strcmp(name, "model.safetensors") == 0 ||
        strcmp(name, "model.safetensors.index.json") == 0)
        return true;
    return sscanf(name, "model-%u-of-%u.safetensors%n", &a, &b, &end) == 2 && end > 0 && name[end] == 0;
}

/* Removes the checkpoint that is there, config.json first: what is left halfway is no checkpoint. */
static moe_status remove_checkpoint(const char *directory, DIR *entries, struct moe_error *err)
{
    char *config = moe_file_join(directory, "config.json");
    if (!config)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s", moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
    unlink(config);
    free(config);
    rewinddir(entries);
    for (const struct dirent *entry; (entry = readdir(entries));) {
        if (is_checkpoint_file(entry->d_name) && unlinkat(dirfd(entries), entry->d_name, 0) != 0)
            return moe_fail(err, MOE_ERROR_WRITE, "%s/%s: cannot remove: %s", directory, entry->d_name,
                            strerror(errno));
    }
    return MOE_OK;
}

static int claim_directory(struct synth *s)
{
    const char *directory = s->o.output;
    struct moe_error err = {{0}};
    if (mkdir(directory, 0777) == 0) {
        s->made_directory = true;
        return CLI_GO;
    }
    if (errno != EEXIST)
        return cli_fail(CLI_EXIT_CANNOT, "%s: cannot make the directory: %s", directory, strerror(errno));
    DIR *entries = opendir(directory);
    if (!entries)
        return cli_fail(CLI_EXIT_CANNOT, "%s: cannot open the directory: %s", directory, strerror(errno));
    bool empty = true;
    for (const struct dirent *entry; empty && (entry = readdir(entries));)
        empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
    int code = CLI_GO;
    if (!empty && !s->o.force)
        code = cli_fail(CLI_EXIT_USAGE, "%s: the directory is not empty; --force replaces the checkpoint in it",
                        directory);
    else if (!empty && remove_checkpoint(directory, entries, &err) != MOE_OK)
        code = cli_fail_error(MOE_ERROR_WRITE, &err);
    closedir(entries);
    return code;
}

/* A full disk is better met before minutes of writing than after. */
static int check_space(const struct synth *s)
{
    struct statvfs fs;
    char need[32], have[32];
    if (statvfs(s->o.output, &fs) != 0)
        return CLI_GO;
    double available = (double)fs.f_bavail * (double)fs.f_frsize;
    if (available >= (double)s->bytes_total)
        return CLI_GO;
    return cli_fail(CLI_EXIT_CANNOT, "%s: No space left on device: the checkpoint has %s, %s are free", s->o.output,
                    cli_show_bytes((double)s->bytes_total, need, sizeof need),
                    cli_show_bytes(available, have, sizeof have));
}

static moe_status write_json(const char *directory, const char *name, const cJSON *json, struct moe_error *err)
{
    char *path = moe_file_join(directory, name), *text = json ? cJSON_Print(json) : NULL;
    moe_status status = path && text
                            ? moe_output_put(path, text, strlen(text), err)
                            : moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s", moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
    free(path);
    cJSON_free(text);
    return status;
}

static moe_status write_index(const struct synth *s, struct moe_error *err)
{
    cJSON *root = cli_json_object(NULL, NULL);
    cli_json_number(cli_json_object(root, "metadata"), "total_size", (double)s->bytes_total);
    cJSON *map = cli_json_object(root, "weight_map");
    bool complete = map != NULL;
    char name[64];
    for (size_t shard = 0; shard < s->shard_count; shard++) {
        shard_name(s, shard, name, sizeof name);
        for (size_t i = s->shards[shard]; complete && i < s->shards[shard + 1]; i++)
            complete = cJSON_AddStringToObject(map, s->list.tensors[i].name, name) != NULL;
    }
    moe_status status = write_json(s->o.output, "model.safetensors.index.json", complete ? root : NULL, err);
    cJSON_Delete(root);
    return status;
}

/* Shards, then the index, then config.json: the directory is a checkpoint once all of it is there. */
static moe_status write_files(struct synth *s, struct moe_error *err)
{
    moe_status status = MOE_OK;
    for (size_t shard = 0; status == MOE_OK && shard < s->shard_count; shard++) {
        char name[64];
        char *path = moe_file_join(s->o.output, shard_name(s, shard, name, sizeof name));
        if (!path)
            return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s", moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
        size_t first = s->shards[shard];
        status =
            write_file(s, path, s->list.tensors + first, s->list.streams + first, s->shards[shard + 1] - first, err);
        s->files_written += status == MOE_OK;
        free(path);
    }
    if (status == MOE_OK && s->shard_count > 1)
        status = write_index(s, err);
    return status == MOE_OK ? write_json(s->o.output, "config.json", s->json, err) : status;
}

/* Takes back what a failed run has written. */
static void remove_files(const struct synth *s)
{
    char name[64];
    for (size_t i = 0; i < s->files_written + 2; i++) {
        const char *file = i < s->files_written    ? shard_name(s, i, name, sizeof name)
                           : i == s->files_written ? "model.safetensors.index.json"
                                                   : "config.json";
        char *path = moe_file_join(s->o.output, file);
        if (path)
            unlink(path);
        free(path);
    }
    if (s->made_directory)
        rmdir(s->o.output);
}

static int write_checkpoint(struct synth *s)
{
    struct moe_error err = {{0}};
    int code = plan_checkpoint(s);
    if (code == CLI_GO)
        code = claim_directory(s);
    if (code != CLI_GO)
        return code;
    code = check_space(s);
    if (code == CLI_GO) {
        moe_status status = write_files(s, &err);
        cli_progress_end(&s->progress);
        code = status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
    }
    if (code != CLI_GO)
        remove_files(s);
    return code;
}

static int write_hidden_states(struct synth *s)
{
    struct moe_error err = {{0}};
    const moe_layer_desc *desc = &s->config.layer;
    struct moe_st_write_tensor tensor = {"hidden_states", desc->dtype, 2, {s->o.tokens, desc->hidden_size}, NULL};
    enum stream stream = STREAM_UNIT;
    s->bytes = 0;
    s->bytes_total = tensor_bytes(&tensor);
    moe_status status = write_file(s, s->o.hidden_states, &tensor, &stream, 1, &err);
    cli_progress_end(&s->progress);
    return status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
}

/* ---- The command ---- */

static int report(const struct synth *s, uint64_t checkpoint_bytes)
{
    const struct synth_options *o = &s->o;
    if (o->json) {
        cJSON *root = cli_json_object(NULL, NULL);
        cli_json_string(root, "model_type", s->config.model_type);
        cli_json_desc(cli_json_object(root, "shape"), &s->config.layer);
        cli_json_number(root, "seed", (double)o->seed);
        if (o->output) {
            cli_json_string(root, "output", o->output);
            cli_json_number(root, "layers", s->config.num_layers);
            cli_json_number(root, "files", (double)s->shard_count);
            cli_json_number(root, "bytes", (double)checkpoint_bytes);
        }
        if (o->hidden_states) {
            cli_json_string(root, "hidden_states", o->hidden_states);
            cli_json_number(root, "tokens", (double)o->tokens);
        }
        cli_json_number(root, "seconds", s->seconds);
        return cli_json_print(root);
    }
    char a[256], b[32];
    if (o->output)
        printf("model          %s: %s, %d layer%s, %s\n", o->output, s->config.model_type, s->config.num_layers,
               s->config.num_layers == 1 ? "" : "s", cli_show_desc(&s->config.layer, a, sizeof a));
    if (o->output)
        printf("wrote          %s in %zu file%s\n", cli_show_bytes((double)checkpoint_bytes, a, sizeof a),
               s->shard_count, s->shard_count == 1 ? "" : "s");
    if (o->hidden_states)
        printf("hidden states  %s: %lld tokens of %lld, %s\n", o->hidden_states, (long long)o->tokens,
               (long long)s->config.layer.hidden_size, moe_dtype_name(s->config.layer.dtype));
    printf("time           %s\n", cli_show_seconds(s->seconds, b, sizeof b));
    return CLI_EXIT_OK;
}

static int synth(struct synth *s)
{
    double start = cli_now();
    int code = read_config(s);
    if (code == CLI_GO && !prepare(s))
        code = cli_fail_memory();
    if (code == CLI_GO && s->o.output)
        code = write_checkpoint(s);
    uint64_t checkpoint_bytes = s->bytes;
    if (code == CLI_GO && s->o.hidden_states)
        code = write_hidden_states(s);
    s->seconds = cli_now() - start;
    return code == CLI_GO ? report(s, checkpoint_bytes) : code;
}

int moe_cmd_synth(int argc, char **argv)
{
    struct synth s = {.progress.what = "writing"};
    int code = parse(argc, argv, &s.o);
    /* Without SA_RESTART: a write that waits returns, and the loop ends. */
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, &action, NULL);
    if (code == CLI_GO)
        code = synth(&s);
    for (size_t i = 0; i < s.list.count; i++)
        free((char *)s.list.tensors[i].name);
    free(s.list.tensors);
    free(s.list.streams);
    free(s.shards);
    for (int i = 0; i < STREAMS; i++)
        free(s.streams[i]);
    free(s.buffer);
    moe_pool_destroy(s.pool);
    moe_config_free(&s.config);
    cJSON_Delete(s.json);
    if (interrupted)
        raise(interrupted); /* its default action by now: the caller sees what ended the command */
    return code;
}
