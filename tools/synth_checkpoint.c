/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/synth_checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "config/file.h"
#include "config/output.h"

static const char *shard_name(const struct synth_checkpoint *c, size_t shard, char *buffer, size_t bytes)
{
    if (c->plan->shard_count == 1)
        snprintf(buffer, bytes, "model.safetensors");
    else
        snprintf(buffer, bytes, "model-%05zu-of-%05zu.safetensors", shard + 1, c->plan->shard_count);
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

static int claim_directory(struct synth_checkpoint *c)
{
    const char *directory = c->directory;
    struct moe_error err = {{0}};
    if (mkdir(directory, 0777) == 0) {
        c->made_directory = true;
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
    if (!empty && !c->force)
        code = cli_fail(CLI_EXIT_USAGE, "%s: the directory is not empty; --force replaces the checkpoint in it",
                        directory);
    else if (!empty && remove_checkpoint(directory, entries, &err) != MOE_OK)
        code = cli_fail_error(MOE_ERROR_WRITE, &err);
    closedir(entries);
    return code;
}

/* A full disk is better met before minutes of writing than after. */
static int check_space(const struct synth_checkpoint *c)
{
    struct statvfs fs;
    char need[32], have[32];
    if (statvfs(c->directory, &fs) != 0)
        return CLI_GO;
    double available = (double)fs.f_bavail * (double)fs.f_frsize;
    if (available >= (double)c->plan->bytes)
        return CLI_GO;
    return cli_fail(CLI_EXIT_CANNOT, "%s: No space left on device: the checkpoint has %s, %s are free", c->directory,
                    cli_show_bytes((double)c->plan->bytes, need, sizeof need),
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

static moe_status write_index(const struct synth_checkpoint *c, struct moe_error *err)
{
    cJSON *root = cli_json_object(NULL, NULL);
    cli_json_number(cli_json_object(root, "metadata"), "total_size", (double)c->plan->bytes);
    cJSON *map = cli_json_object(root, "weight_map");
    bool complete = map != NULL;
    char name[64];
    for (size_t shard = 0; shard < c->plan->shard_count; shard++) {
        shard_name(c, shard, name, sizeof name);
        for (size_t i = c->plan->shards[shard]; complete && i < c->plan->shards[shard + 1]; i++)
            complete = cJSON_AddStringToObject(map, c->plan->tensors[i].name, name) != NULL;
    }
    moe_status status = write_json(c->directory, "model.safetensors.index.json", complete ? root : NULL, err);
    cJSON_Delete(root);
    return status;
}

/* Shards, then the index, then config.json: the directory is a checkpoint once all of it is there. */
static moe_status write_files(struct synth_checkpoint *c, struct moe_error *err)
{
    moe_status status = MOE_OK;
    for (size_t shard = 0; status == MOE_OK && shard < c->plan->shard_count; shard++) {
        char name[64];
        char *path = moe_file_join(c->directory, shard_name(c, shard, name, sizeof name));
        if (!path)
            return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s", moe_status_string(MOE_ERROR_OUT_OF_MEMORY));
        size_t first = c->plan->shards[shard];
        status = synth_fill_file(c->fill, path, c->plan->tensors + first, c->plan->streams + first,
                                 c->plan->shards[shard + 1] - first, err);
        c->files_written += status == MOE_OK;
        free(path);
    }
    if (status == MOE_OK && c->plan->shard_count > 1)
        status = write_index(c, err);
    return status == MOE_OK ? write_json(c->directory, "config.json", c->config, err) : status;
}

/* Takes back what a failed run has written. */
static void remove_files(const struct synth_checkpoint *c)
{
    char name[64];
    for (size_t i = 0; i < c->files_written + 2; i++) {
        const char *file = i < c->files_written    ? shard_name(c, i, name, sizeof name)
                           : i == c->files_written ? "model.safetensors.index.json"
                                                   : "config.json";
        char *path = moe_file_join(c->directory, file);
        if (path)
            unlink(path);
        free(path);
    }
    if (c->made_directory)
        rmdir(c->directory);
}

int synth_checkpoint_write(struct synth_checkpoint *c)
{
    struct moe_error err = {{0}};
    int code = claim_directory(c);
    if (code != CLI_GO)
        return code;
    code = check_space(c);
    if (code == CLI_GO) {
        moe_status status = write_files(c, &err);
        cli_progress_end(&c->fill->progress);
        code = status == MOE_OK ? CLI_GO : cli_fail_error(status, &err);
    }
    if (code != CLI_GO)
        remove_files(c);
    return code;
}
