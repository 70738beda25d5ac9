/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Strict JSON on top of cJSON: what config.json, the shard index, safetensors headers and session lines are read with.
 * cJSON alone accepts duplicate keys (first wins), bytes that are not UTF-8, "\u0000" in names, trailing text and a
 * byte-order mark; readers that disagree on those disagree on what a file says, so all of them are errors here.
 */
#ifndef MOE_CONFIG_JSON_H
#define MOE_CONFIG_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>

#include "config/error.h"

/* Parses `length` bytes that must be one JSON object. `name` is the file for messages. *root belongs to the caller
 * (cJSON_Delete). Status: MOE_ERROR_FILE, MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe_json_parse(const char *text, size_t length, const char *name, cJSON **root, struct moe_error *err);

/* Reads and parses a whole file of at most `limit` bytes. */
moe_status moe_json_load(const char *path, size_t limit, cJSON **root, struct moe_error *err);

/* The member of that exact name, or NULL. */
const cJSON *moe_json_get(const cJSON *object, const char *key);

/* True, and the value in *value, if item is a number that is exactly an integer in [low, high], |bounds| < 2^53. */
bool moe_json_integer(const cJSON *item, int64_t low, int64_t high, int64_t *value);

/* Writes a short printable form of a value ("-3", "\"abc\"", "an array") for messages; returns buffer. */
const char *moe_json_show(const cJSON *item, char *buffer, size_t bytes);

#endif
