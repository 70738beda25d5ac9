/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The text is first checked against the grammar of RFC 8259, byte for byte; cJSON then only builds the tree. So cJSON
 * never sees text that it would read past or take for something else, and when it fails, memory is short.
 */
#include "config/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config/file.h"
#include "config/utf8.h"

#define MAX_DEPTH  128
#define MAX_NUMBER 63 /* cJSON copies a number into 64 bytes and stops there */

struct scan {
    const char *start, *at, *end;
    const char *why; /* the first fault, found at `at` */
};

static bool fault(struct scan *s, const char *why)
{
    s->why = why;
    return false;
}

static char peek(const struct scan *s)
{
    return s->at < s->end ? *s->at : 0;
}

static void skip_space(struct scan *s)
{
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\r' || *s->at == '\t'))
        s->at++;
}

static bool scan_hex4(struct scan *s, unsigned *value)
{
    *value = 0;
    for (int i = 0; i < 4; i++) {
        char c = peek(s);
        unsigned digit = c >= '0' && c <= '9'   ? (unsigned)(c - '0')
                         : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10
                         : c >= 'A' && c <= 'F' ? (unsigned)(c - 'A') + 10
                                                : 16;
        if (digit == 16)
            return fault(s, "expected four hexadecimal digits after \\u");
        *value = *value * 16 + digit;
        s->at++;
    }
    return true;
}

static bool scan_escape(struct scan *s)
{
    s->at++;
    char c = peek(s);
    if (!c || !strchr("\"\\/bfnrtu", c))
        return fault(s, "unknown escape in a string");
    s->at++;
    if (c != 'u')
        return true;

    unsigned code, low;
    if (!scan_hex4(s, &code))
        return false;
    if (code == 0)
        return fault(s, "\\u0000 in a string");
    if (code < 0xD800 || code > 0xDFFF)
        return true;
    if (code > 0xDBFF || s->end - s->at < 2 || s->at[0] != '\\' || s->at[1] != 'u')
        return fault(s, "half of a surrogate pair in a string");
    s->at += 2;
    if (!scan_hex4(s, &low))
        return false;
    if (low < 0xDC00 || low > 0xDFFF)
        return fault(s, "half of a surrogate pair in a string");
    return true;
}

static bool scan_string(struct scan *s)
{
    if (peek(s) != '"')
        return fault(s, "expected a key in double quotes");
    s->at++;
    while (s->at < s->end) {
        unsigned char c = (unsigned char)*s->at;
        if (c == '"') {
            s->at++;
            return true;
        }
        if (c < 0x20)
            return fault(s, "raw control character in a string");
        if (c == '\\') {
            if (!scan_escape(s))
                return false;
            continue;
        }
        size_t length = moe_utf8_sequence(s->at, (size_t)(s->end - s->at));
        if (!length)
            return fault(s, "bytes that are not UTF-8");
        s->at += length;
    }
    return fault(s, "the text ends inside a string");
}

static bool scan_digits(struct scan *s)
{
    if (peek(s) < '0' || peek(s) > '9')
        return fault(s, "expected a digit");
    while (peek(s) >= '0' && peek(s) <= '9')
        s->at++;
    return true;
}

static bool scan_number(struct scan *s)
{
    const char *first = s->at;
    if (peek(s) == '-')
        s->at++;
    if (peek(s) == '0' && s->end - s->at > 1 && s->at[1] >= '0' && s->at[1] <= '9')
        return fault(s, "number with a leading zero");
    if (!scan_digits(s))
        return false;
    if (peek(s) == '.') {
        s->at++;
        if (!scan_digits(s))
            return false;
    }
    if (peek(s) == 'e' || peek(s) == 'E') {
        s->at++;
        if (peek(s) == '+' || peek(s) == '-')
            s->at++;
        if (!scan_digits(s))
            return false;
    }
    if (s->at - first > MAX_NUMBER)
        return fault(s, "number of more than 63 characters");
    return true;
}

static bool scan_word(struct scan *s, const char *word)
{
    size_t length = strlen(word);
    if ((size_t)(s->end - s->at) < length || memcmp(s->at, word, length))
        return fault(s, "expected a value");
    s->at += length;
    return true;
}

/* An object or an array of `depth` levels around it. */
static bool scan_value(struct scan *s, int depth)
{
    skip_space(s);
    char open = peek(s);
    if (open == '"')
        return scan_string(s);
    if (open == '-' || (open >= '0' && open <= '9'))
        return scan_number(s);
    if (open != '{' && open != '[')
        return scan_word(s, open == 't' ? "true" : open == 'f' ? "false" : "null");

    if (depth == MAX_DEPTH)
        return fault(s, "nested more than 128 levels deep");
    char close = open == '{' ? '}' : ']';
    s->at++;
    skip_space(s);
    if (peek(s) == close) {
        s->at++;
        return true;
    }
    for (;;) {
        if (open == '{') {
            skip_space(s);
            if (!scan_string(s))
                return false;
            skip_space(s);
            if (peek(s) != ':')
                return fault(s, "expected ':' after a key");
            s->at++;
        }
        if (!scan_value(s, depth + 1))
            return false;
        skip_space(s);
        char c = peek(s);
        if (c != ',' && c != close)
            return fault(s, s->at == s->end ? "the text ends inside an object or array"
                            : open == '{'   ? "expected ',' or '}'"
                                            : "expected ',' or ']'");
        s->at++;
        if (c == close)
            return true;
    }
}

static bool scan_document(struct scan *s)
{
    if (s->start == s->end)
        return fault(s, "is empty");
    if (s->end - s->start >= 3 && !memcmp(s->start, "\xEF\xBB\xBF", 3))
        return fault(s, "begins with a byte-order mark");
    skip_space(s);
    if (peek(s) != '{')
        return fault(s, "expected a JSON object");
    if (!scan_value(s, 0))
        return false;
    const char *object_end = s->at;
    skip_space(s);
    if (s->at < s->end)
        return fault(s, "text after the end of the object");
    s->end = object_end;
    return true;
}

static int compare_keys(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Sorting rather than hashing: a hostile file can choose colliding keys, but it cannot make this slow. */
static moe_status check_duplicates(const cJSON *item, const char *name, struct moe_error *err)
{
    const char *few[16], **keys = few;
    size_t count = 0, capacity = sizeof few / sizeof *few;
    moe_status status = MOE_OK;

    for (const cJSON *child = item->child; child && status == MOE_OK; child = child->next) {
        if (child->child)
            status = check_duplicates(child, name, err);
        count++;
    }
    if (status != MOE_OK || !cJSON_IsObject(item) || count < 2)
        return status;

    if (count > capacity && !(keys = malloc(count * sizeof *keys)))
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %zu keys", name, count);
    count = 0;
    for (const cJSON *child = item->child; child; child = child->next)
        keys[count++] = child->string;
    qsort(keys, count, sizeof *keys, compare_keys);
    for (size_t i = 1; i < count && status == MOE_OK; i++)
        if (!strcmp(keys[i - 1], keys[i]))
            status = moe_fail(err, MOE_ERROR_FILE, "%s: key '%.200s' appears twice in one object", name, keys[i]);
    if (keys != few)
        free(keys);
    return status;
}

moe_status moe_json_parse(const char *text, size_t length, const char *name, cJSON **root, struct moe_error *err)
{
    *root = NULL;
    struct scan s = {.start = text, .at = text, .end = text + length};
    if (!scan_document(&s)) {
        size_t line = 1;
        const char *line_start = s.start;
        for (const char *p = s.start; p < s.at; p++)
            if (*p == '\n') {
                line++;
                line_start = p + 1;
            }
        return moe_fail(err, MOE_ERROR_FILE, "%s: not valid JSON at line %zu, column %zu: %s", name, line,
                        (size_t)(s.at - line_start) + 1, s.why);
    }

    cJSON *tree = cJSON_ParseWithLength(s.start, (size_t)(s.end - s.start));
    if (!tree)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %zu bytes of JSON", name, length);
    moe_status status = check_duplicates(tree, name, err);
    if (status != MOE_OK) {
        cJSON_Delete(tree);
        return status;
    }
    *root = tree;
    return MOE_OK;
}

moe_status moe_json_load(const char *path, size_t limit, cJSON **root, struct moe_error *err)
{
    int fd;
    uint64_t size;
    *root = NULL;
    moe_status status = moe_file_open(path, &fd, &size, err);
    if (status != MOE_OK)
        return status;

    char *text = NULL;
    if (size > limit)
        status = moe_fail(err, MOE_ERROR_FILE, "%s: has %llu bytes, expected at most %zu", path,
                          (unsigned long long)size, limit);
    else if (!(text = malloc((size_t)size + 1)))
        status =
            moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %llu bytes", path, (unsigned long long)size);
    if (status == MOE_OK)
        status = moe_file_read(fd, path, 0, text, size, err);
    if (status == MOE_OK)
        status = moe_json_parse(text, (size_t)size, path, root, err);
    free(text);
    close(fd);
    return status;
}

const cJSON *moe_json_get(const cJSON *object, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(object, key);
}

bool moe_json_integer(const cJSON *item, int64_t low, int64_t high, int64_t *value)
{
    const double exact = 9007199254740991.0; /* 2^53 - 1: the next double could stand for two integers */
    if (!cJSON_IsNumber(item))
        return false;
    double number = item->valuedouble;
    if (!(number >= -exact && number <= exact) || number != floor(number))
        return false;
    int64_t integer = (int64_t)number;
    if (integer < low || integer > high)
        return false;
    *value = integer;
    return true;
}

const char *moe_json_show(const cJSON *item, char *buffer, size_t bytes)
{
    if (!item)
        snprintf(buffer, bytes, "missing");
    else if (cJSON_IsString(item))
        snprintf(buffer, bytes, strlen(item->valuestring) > 60 ? "\"%.60s...\"" : "\"%s\"", item->valuestring);
    else if (cJSON_IsNumber(item)) /* integers up to 2^53 whole, the rest without the digits that a double adds */
        snprintf(buffer, bytes, fabs(item->valuedouble) < 1e17 && fmod(item->valuedouble, 1) == 0 ? "%.0f" : "%.15g",
                 item->valuedouble);
    else
        snprintf(buffer, bytes, "%s",
                 cJSON_IsTrue(item)    ? "true"
                 : cJSON_IsFalse(item) ? "false"
                 : cJSON_IsNull(item)  ? "null"
                 : cJSON_IsArray(item) ? "an array"
                                       : "an object");
    return buffer;
}
