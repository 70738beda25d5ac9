/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "runtime/session.h"
#include "tests/fuzz/fuzz.h"

static const char *const seeds[] = {
    "{\"index\":0,\"layer\":3,\"phase\":\"prefill\",\"tokens\":17,\"time\":1763759000.123456,"
    "\"file\":\"batch-000000.safetensors\"}\n"
    "{\"index\":1,\"layer\":3,\"phase\":\"decode\",\"tokens\":1,\"time\":1763759001.5,"
    "\"file\":\"batch-000001.safetensors\"}\n",
    "{\"index\":0,\"layer\":0,\"phase\":\"a_b-9\",\"tokens\":0,\"time\":0,\"file\":\"x\",\"note\":{\"a\":[1,2]}}\r\n"
    "{\"index\":1,\"layer\":1,\"phase\":\"x\",\"tokens\":4,\"time\":1e9,\"file\":\"..x\"}\n"
    "{\"index\":2,\"layer\":2,\"phase\":\"x\",\"tok",
};

static const char *const words[] = {
    "\"decode\"",
    "\"A b\"",
    "\"\"",
    "\"a/b\"",
    "\"..\"",
    "\".\"",
    "\"abcdefghijklmnopqrstuvwxyz012345\"",
    "\"abcdefghijklmnopqrstuvwxyz0123456\"",
    "\"batch-000000.safetensors\"",
    "253402300799",
    "253402300800",
    "-0.5",
    "2147483647",
    NULL,
};

static const char *const keys[] = {"index", "layer", "phase", "tokens", "time", "file", "note", NULL};

size_t fuzz_seed(size_t i, uint8_t *data, size_t max_size)
{
    return i < sizeof seeds / sizeof *seeds ? fuzz_copy(seeds[i], data, max_size) : 0;
}

/* Where the line of byte `at` begins; *end is behind its text. */
static size_t line_at(const char *text, size_t size, size_t at, size_t *end)
{
    size_t begin = at;
    while (begin > 0 && text[begin - 1] != '\n')
        begin--;
    for (*end = at; *end < size && text[*end] != '\n';)
        ++*end;
    return begin;
}

/* The members of one line, or the lines themselves: cut, joined, doubled. */
size_t fuzz_mutate(struct mutate *m, uint8_t *data, size_t size, size_t max_size)
{
    static char piece[1 << 16];
    char *text = (char *)data;
    if (size == 0)
        return 0;
    m->words = words;
    m->keys = keys;
    size_t end, begin = line_at(text, size, mutate_random(m, (uint32_t)size), &end), length = end - begin;
    uint32_t choice = mutate_random(m, 16);
    if (choice == 0) /* a writer died */
        return 1 + mutate_random(m, (uint32_t)size);
    if (length + 1 > sizeof piece)
        return size;
    memcpy(piece, text + begin, length);
    if (choice == 1 && end < size) { /* no newline */
        memmove(text + end, text + end + 1, size - end - 1);
        return size - 1;
    }
    if (choice == 2) { /* the line twice */
        piece[length++] = '\n';
        end = begin;
    } else {
        length = mutate_json(m, piece, length, sizeof piece);
    }
    if (size - (end - begin) + length > max_size)
        return size;
    memmove(text + begin + length, text + end, size - end);
    memcpy(text + begin, piece, length);
    return size - (end - begin) + length;
}

static void check_lines(const char *text, size_t length, const struct moe_session_index *index)
{
    FUZZ_CHECK(index->whole <= length);
    FUZZ_CHECK(index->whole == 0 || text[index->whole - 1] == '\n');
    for (int64_t i = 0; i < index->count; i++) {
        const struct moe_session_line *line = &index->lines[i];
        FUZZ_CHECK(line->layer >= 0 && line->tokens >= 0);
        FUZZ_CHECK(line->time >= 0 && line->time <= MOE_SESSION_MAX_TIME);
        FUZZ_CHECK(moe_session_phase_ok(line->phase));
        FUZZ_CHECK(*line->file && !strchr(line->file, '/') && strcmp(line->file, ".") && strcmp(line->file, ".."));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data;
    struct moe_session_index whole, cut;
    struct moe_error err = {""};
    moe_status status = moe_session_parse(text, size, "session.jsonl", &whole, &err);
    if (status != MOE_OK) {
        FUZZ_CHECK(status == MOE_ERROR_FILE);
        FUZZ_CHECK(!strncmp(err.text, "session.jsonl:", 14) && !strchr(err.text, '\n'));
        return 0;
    }
    check_lines(text, size, &whole);
    if (size > 0) { /* without its last byte, it has one batch less if it ended in a whole line */
        FUZZ_CHECK(moe_session_parse(text, size - 1, "session.jsonl", &cut, &err) == MOE_OK);
        FUZZ_CHECK(cut.count == whole.count - (whole.whole == size));
        moe_session_index_free(&cut);
    }
    moe_session_index_free(&whole);
    return 0;
}
