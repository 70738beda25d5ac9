/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/fuzz/mutate.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"

enum { MAX_VALUES = 1024, MAX_SCAN_DEPTH = 200, MAX_PIECE = 4096 };

/* Where a value stands in the text, and its key if it is a member. */
struct span {
    size_t key, begin, end; /* key == begin without one */
};

struct scan {
    const char *text;
    size_t at, size, count;
    struct span spans[MAX_VALUES];
};

uint32_t mutate_random(struct mutate *m, uint32_t n)
{
    /* splitmix64 */
    uint64_t z = m->random += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ (z >> 31)) >> 32) % n;
}

/* ---- Finding the values ---- */

static void skip_space(struct scan *s)
{
    while (s->at < s->size && strchr(" \t\r\n", s->text[s->at]) && s->text[s->at])
        s->at++;
}

static char peek(const struct scan *s)
{
    return s->at < s->size ? s->text[s->at] : 0;
}

static bool skip_string(struct scan *s)
{
    for (s->at++; s->at < s->size; s->at++) {
        if (s->text[s->at] == '\\')
            s->at++;
        else if (s->text[s->at] == '"') {
            s->at++;
            return true;
        }
    }
    return false;
}

/* Records the value at `at` and those in it; false where the text makes no sense. */
static bool scan_value(struct scan *s, size_t key, int depth)
{
    struct span *span = NULL;
    size_t begin = s->at;
    if (s->count < MAX_VALUES) {
        span = &s->spans[s->count++];
        *span = (struct span){key, begin, begin};
    }
    char open = peek(s);
    if (open == '"') {
        if (!skip_string(s))
            return false;
    } else if (open == '{' || open == '[') {
        if (depth == MAX_SCAN_DEPTH)
            return false;
        s->at++;
        skip_space(s);
        while (peek(s) && peek(s) != '}' && peek(s) != ']') {
            size_t member = s->at;
            if (open == '{') {
                if (peek(s) != '"' || !skip_string(s))
                    return false;
                skip_space(s);
                if (peek(s) != ':')
                    return false;
                s->at++;
                skip_space(s);
            }
            if (!scan_value(s, open == '{' ? member : s->at, depth + 1))
                return false;
            skip_space(s);
            if (peek(s) == ',')
                s->at++;
            skip_space(s);
        }
        if (!peek(s))
            return false;
        s->at++;
    } else {
        while (peek(s) && !strchr(" \t\r\n,]}", peek(s)))
            s->at++;
        if (s->at == begin)
            return false;
    }
    if (span)
        span->end = s->at;
    return true;
}

/* ---- Changing them ---- */

/* Replaces text[begin, end) by `length` bytes; the size stays if there is no room. */
static size_t splice(char *text, size_t size, size_t max_size, size_t begin, size_t end, const char *piece,
                     size_t length)
{
    if (size - (end - begin) + length > max_size)
        return size;
    memmove(text + begin + length, text + end, size - end);
    memcpy(text + begin, piece, length);
    return size - (end - begin) + length;
}

static const char *const edge_values[] = {
    "0",
    "1",
    "-1",
    "2",
    "3",
    "8",
    "64",
    "65",
    "4096",
    "4097",
    "1048576",
    "1048577",
    "0.5",
    "1.0",
    "1e3",
    "01",
    "-0",
    "1e999",
    "-1e999",
    "2147483648",
    "4294967296",
    "4611686018427387904",
    "9007199254740991",
    "9007199254740992",
    "9007199254740993",
    "18446744073709551616",
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud83d\\ude00\"",
    "\"\\ud83d\"",
    "\"\xC3\xA9\"",
    "\"\xFF\"",
    "\"\\n\\\"\\\\\"",
    "1.",
    "1e",
    "-",
    "\"\\x\"",
    "\"\x01\"",
    "NaN",
    "tru",
    "[[[[]]]]",
    "{\"a\":{\"a\":1,\"a\":2}}",
    "\"../x\"",
    "1000000000000000000000000000000000000000000000000000000000000000000",
    NULL,
};

static const char *pick(struct mutate *m, const char *const *list)
{
    uint32_t count = 0;
    while (list && list[count])
        count++;
    return count ? list[mutate_random(m, count)] : "0";
}

/* A new value in `piece`, of at most MAX_PIECE bytes; returns its length. */
static size_t new_value(struct mutate *m, const struct scan *s, const struct span *old, char *piece)
{
    const struct span *other = &s->spans[mutate_random(m, (uint32_t)s->count)];
    size_t length = old->end - old->begin;
    char *end;
    switch (mutate_random(m, 8)) {
    case 0: /* another value of the document */
        length = other->end - other->begin;
        if (length > MAX_PIECE)
            return 0;
        memcpy(piece, s->text + other->begin, length);
        return length;
    case 1:
    case 2: { /* a number near this one */
        static const long long steps[] = {1, -1, 2, -2, 4, 8, -8, 100};
        char digits[32] = "";
        memcpy(digits, s->text + old->begin, length < 31 ? length : 31);
        long long number = strtoll(digits, &end, 10);
        if (end == digits || number > 1ll << 60 || number < -(1ll << 60))
            break;
        number = mutate_random(m, 3) ? number + steps[mutate_random(m, 8)] : number * 2;
        return (size_t)snprintf(piece, MAX_PIECE, "%lld", number);
    }
    case 3:
    case 4:
        return (size_t)snprintf(piece, MAX_PIECE, "%s", pick(m, m->words));
    default:
        break;
    }
    return (size_t)snprintf(piece, MAX_PIECE, "%s", pick(m, edge_values));
}

static size_t nest(struct mutate *m, const struct scan *s, const struct span *v, char *text, size_t size,
                   size_t max_size)
{
    static const uint32_t depths[] = {1, 2, 20, 125, 130};
    char piece[MAX_PIECE];
    uint32_t depth = depths[mutate_random(m, 5)];
    size_t length = v->end - v->begin, at = 0;
    bool object = mutate_random(m, 2);
    if (length + depth * 6 > MAX_PIECE)
        return size;
    for (uint32_t i = 0; i < depth; i++)
        at += (size_t)sprintf(piece + at, object ? "{\"a\":" : "[");
    memcpy(piece + at, s->text + v->begin, length);
    at += length;
    for (uint32_t i = 0; i < depth; i++)
        piece[at++] = object ? '}' : ']';
    return splice(text, size, max_size, v->begin, v->end, piece, at);
}

size_t mutate_json(struct mutate *m, char *text, size_t size, size_t max_size)
{
    static struct scan s;
    char piece[MAX_PIECE + 64];
    s.text = text, s.size = size, s.at = 0, s.count = 0;
    skip_space(&s);
    if (!scan_value(&s, s.at, 0))
        return size;

    const struct span *v = &s.spans[mutate_random(m, (uint32_t)s.count)];
    size_t length = v->end - v->key;
    switch (mutate_random(m, 8)) {
    case 0: { /* delete, with the comma behind or before it */
        size_t begin = v->key, end = v->end;
        if (end < size && text[end] == ',')
            end++;
        else if (begin && text[begin - 1] == ',')
            begin--;
        return splice(text, size, max_size, begin, end, "", 0);
    }
    case 1: /* double, here or behind another value */
        if (length > MAX_PIECE)
            return size;
        piece[0] = ',';
        memcpy(piece + 1, text + v->key, length);
        if (mutate_random(m, 2))
            v = &s.spans[mutate_random(m, (uint32_t)s.count)];
        return splice(text, size, max_size, v->end, v->end, piece, length + 1);
    case 2: /* rename */
        if (v->key == v->begin)
            break;
        length = (size_t)snprintf(piece, MAX_PIECE, "\"%s\":", pick(m, m->keys));
        return splice(text, size, max_size, v->key, v->begin, piece, length);
    case 3: /* add a member before another one */
        if (v->key == v->begin)
            break;
        length = (size_t)snprintf(piece, MAX_PIECE, "\"%s\":%s,", pick(m, m->keys), pick(m, m->words));
        return splice(text, size, max_size, v->key, v->key, piece, length);
    case 4:
        if (mutate_random(m, 4) == 0)
            return nest(m, &s, v, text, size, max_size);
        break;
    default:
        break;
    }
    length = new_value(m, &s, v, piece);
    return splice(text, size, max_size, v->begin, v->end, piece, length);
}

/* ---- What is the same for all targets ---- */

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
    struct mutate m = {.random = seed};
    uint32_t choice = mutate_random(&m, 32);
    if (size < 2 || choice == 0) {
        uint32_t seeds = 0;
        while (fuzz_seed(seeds, data, max_size))
            seeds++;
        size = fuzz_seed(mutate_random(&m, seeds), data, max_size);
    }
    if (choice == 1)
        return LLVMFuzzerMutate(data, size, max_size);
    for (uint32_t rounds = 1 + mutate_random(&m, 3); rounds; rounds--)
        size = fuzz_mutate(&m, data, size, max_size);
    return size;
}

bool fuzz_file(const uint8_t *data, size_t size, const char **path)
{
    static char name[64];
    static int fd = -1;
    uint32_t hash = 0;
    for (size_t i = 0; i < size; i++)
        hash = hash * 31 + data[i];
    if (hash % 64)
        return false;
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    }
    if (ftruncate(fd, 0) || pwrite(fd, data, size, 0) != (ssize_t)size)
        return false;
    *path = name;
    return true;
}

size_t fuzz_copy(const char *text, uint8_t *data, size_t max_size)
{
    size_t size = strlen(text);
    if (size > max_size)
        size = max_size;
    memcpy(data, text, size);
    return size;
}

void fuzz_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: %s does not hold\n", file, line, condition);
    abort();
}
