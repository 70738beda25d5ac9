/* SPDX-License-Identifier: Apache-2.0 */
/* What strict JSON takes and refuses, how values are shown, and that messages are printable. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "config/json.h"
#include "tests/unit/files.h"

/* A literal that may hold NUL bytes. */
#define TEXT(s) s, sizeof(s) - 1

static void accepts(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t length;
    } cases[] = {
        {TEXT("{}")},
        {TEXT(" \t\r\n{ } \n")},
        {TEXT("{\"\":\"\"}")},
        {TEXT("{\"a\":[],\"b\":[1,2],\"c\":{\"a\":null},\"A\":true,\"d\":false}")},
        {TEXT("{\"n\":[0,-0,1.5,-1e3,1E+2,2e-2,0.0,10,1e999]}")},
        {TEXT("{\"s\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\uD83D\\uDE00\"}")},
        {TEXT("{\"\xC3\xA9\":\"\xE2\x82\xAC\xF0\x9F\x98\x80\xEF\xBF\xBD\xF4\x8F\xBF\xBF\x7F\"}")},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_error err = {""};
        cJSON *root;
        if (moe_json_parse(cases[i].text, cases[i].length, "x", &root, &err) != MOE_OK)
            fail_msg("%s: %s", cases[i].text, err.text);
        cJSON_Delete(root);
    }
}

static void rejects(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        size_t length;
        const char *message;
    } cases[] = {
        {TEXT(""), "is empty"},
        {TEXT("  "), "expected a JSON object"},
        {TEXT("[]"), "expected a JSON object"},
        {TEXT("\xEF\xBB\xBF{}"), "byte-order mark"},
        {TEXT("{}x"), "column 3: text after"},
        {TEXT("{}\0"), "text after"},
        {TEXT("{}{}"), "text after"},
        {TEXT("{\n\"a\":1,\n}"), "line 3, column 1: expected a key"},
        {TEXT("{\"a\" 1}"), "expected ':'"},
        {TEXT("{\"a\":1 \"b\":2}"), "expected ',' or '}'"},
        {TEXT("{\"a\":[1 2]}"), "expected ',' or ']'"},
        {TEXT("{\"a\":[1,]}"), "expected a value"},
        {TEXT("{\"a\":}"), "expected a value"},
        {TEXT("{a:1}"), "expected a key"},
        {TEXT("{'a':1}"), "expected a key"},
        {TEXT("{\"a\":1"), "ends inside an object"},
        {TEXT("{\"a"), "ends inside a string"},
        {TEXT("{\"a\":01}"), "leading zero"},
        {TEXT("{\"a\":-01}"), "leading zero"},
        {TEXT("{\"a\":+1}"), "expected a value"},
        {TEXT("{\"a\":.5}"), "expected a value"},
        {TEXT("{\"a\":1.}"), "expected a digit"},
        {TEXT("{\"a\":1e}"), "expected a digit"},
        {TEXT("{\"a\":-}"), "expected a digit"},
        {TEXT("{\"a\":0x10}"), "expected ',' or '}'"},
        {TEXT("{\"a\":NaN}"), "expected a value"},
        {TEXT("{\"a\":nul}"), "expected a value"},
        {TEXT("{\"a\":1234567890123456789012345678901234567890123456789012345678901234}"), "63 characters"},
        {TEXT("{\"a\":\"\n\"}"), "control character"},
        {TEXT("{\"a\":\"\0\"}"), "control character"},
        {TEXT("{\"a\":\"\\x\"}"), "unknown escape"},
        {TEXT("{\"a\":\"\\u12g4\"}"), "hexadecimal"},
        {TEXT("{\"a\\u0000b\":1}"), "\\u0000"},
        {TEXT("{\"a\":\"\\uD800\"}"), "surrogate"},
        {TEXT("{\"a\":\"\\uD800\\u0041\"}"), "surrogate"},
        {TEXT("{\"a\":\"\\uDC00\"}"), "surrogate"},
        {TEXT("{\"a\":\"\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xC0\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xE0\x80\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xED\xA0\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xF0\x80\x80\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xF4\x90\x80\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xF5\x80\x80\x80\"}"), "not UTF-8"},
        {TEXT("{\"a\":\"\xE2\x82"), "not UTF-8"},
        {TEXT("{\"a\":1,\"a\":1}"), "'a' appears twice"},
        {TEXT("{\"a\":1,\"\\u0061\":1}"), "'a' appears twice"},
        {TEXT("{\"a\":{\"b\":[{\"c\":1,\"d\":2,\"c\":3}]}}"), "'c' appears twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_error err = {""};
        cJSON *root = (cJSON *)&err;
        /* An exact copy, so that ASan sees a read past the end. */
        char *copy = malloc(cases[i].length + !cases[i].length);
        memcpy(copy, cases[i].text, cases[i].length);
        assert_int_equal(moe_json_parse(copy, cases[i].length, "file.json", &root, &err), MOE_ERROR_FILE);
        free(copy);
        assert_null(root);
        if (!strstr(err.text, cases[i].message) || strncmp(err.text, "file.json: ", 11))
            fail_msg("'%s' gave '%s', expected '%s'", cases[i].text, err.text, cases[i].message);
    }
}

static void limits_depth(void **state)
{
    (void)state;
    for (int depth = 127; depth <= 129; depth++) {
        char text[600] = "{\"a\":";
        size_t at = strlen(text);
        for (int i = 1; i < depth; i++)
            text[at++] = '[';
        for (int i = 1; i < depth; i++)
            text[at++] = ']';
        text[at++] = '}';
        struct moe_error err;
        cJSON *root;
        assert_int_equal(moe_json_parse(text, at, "x", &root, &err), depth <= 128 ? MOE_OK : MOE_ERROR_FILE);
        cJSON_Delete(root);
    }
}

static void finds_duplicate_among_many(void **state)
{
    (void)state;
    const int count = 20000;
    char *text = malloc(count * 16);
    size_t at = (size_t)sprintf(text, "{");
    for (int i = 0; i < count; i++)
        at += (size_t)sprintf(text + at, "\"k%d\":1,", i);
    struct moe_error err = {""};
    cJSON *root;
    text[at - 1] = '}';
    assert_int_equal(moe_json_parse(text, at, "x", &root, &err), MOE_OK);
    assert_non_null(moe_json_get(root, "k19999"));
    assert_null(moe_json_get(root, "K19999"));
    cJSON_Delete(root);
    at += (size_t)sprintf(text + at - 1, ",\"k777\":2}") - 1;
    assert_int_equal(moe_json_parse(text, at, "x", &root, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "'k777' appears twice"));
    free(text);
}

static void reads_integers(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool ok;
        int64_t value;
    } cases[] = {
        {"{\"v\":0}", true, 0},
        {"{\"v\":-7}", true, -7},
        {"{\"v\":4294967296}", true, 4294967296},
        {"{\"v\":9007199254740991}", true, 9007199254740991},
        {"{\"v\":9007199254740993}", false, 0}, /* reads as 2^53 */
        {"{\"v\":-9007199254740993}", false, 0},
        {"{\"v\":1.5}", false, 0},
        {"{\"v\":1e999}", false, 0},
        {"{\"v\":\"1\"}", false, 0},
        {"{\"v\":true}", false, 0},
        {"{}", false, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cJSON *root;
        int64_t value = 12345;
        assert_int_equal(moe_json_parse(cases[i].text, strlen(cases[i].text), "x", &root, NULL), MOE_OK);
        bool ok = moe_json_integer(moe_json_get(root, "v"), -(1ll << 53), 1ll << 53, &value);
        if (ok != cases[i].ok || value != (ok ? cases[i].value : 12345))
            fail_msg("%s gave %d, %lld", cases[i].text, ok, (long long)value);
        if (ok) {
            assert_false(moe_json_integer(moe_json_get(root, "v"), value + 1, 1ll << 53, &value));
            assert_false(moe_json_integer(moe_json_get(root, "v"), -(1ll << 53), value - 1, &value));
        }
        cJSON_Delete(root);
    }
}

static void shows_values(void **state)
{
    (void)state;
    static const char text[] = "{\"a\":-3,\"b\":\"x\",\"c\":null,\"d\":true,\"e\":false,\"f\":[],\"g\":{},\"h\":0.1,"
                               "\"i\":9007199254740992,"
                               "\"j\":\"0123456789012345678901234567890123456789012345678901234567890123456789\"}";
    static const char *const expected[] = {"-3",
                                           "\"x\"",
                                           "null",
                                           "true",
                                           "false",
                                           "an array",
                                           "an object",
                                           "0.1",
                                           "9007199254740992",
                                           "\"012345678901234567890123456789012345678901234567890123456789...\""};
    cJSON *root;
    char buffer[128], small[4];
    assert_int_equal(moe_json_parse(text, sizeof text - 1, "x", &root, NULL), MOE_OK);
    const cJSON *item = root->child;
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++, item = item->next)
        assert_string_equal(moe_json_show(item, buffer, sizeof buffer), expected[i]);
    assert_string_equal(moe_json_show(NULL, buffer, sizeof buffer), "missing");
    assert_string_equal(moe_json_show(root->child->next, small, sizeof small), "\"x\"");
    cJSON_Delete(root);
}

static void loads_files(void **state)
{
    (void)state;
    struct moe_error err = {""};
    cJSON *root;
    assert_int_equal(moe_json_load(files_write("good.json", "{\"a\":1}", 7), 7, &root, &err), MOE_OK);
    cJSON_Delete(root);

    mkfifo(files_path("fifo"), 0600);
    static const struct {
        const char *name, *message;
    } cases[] = {
        {"good.json", "has 7 bytes, expected at most 6"},
        {"absent.json", "cannot open: No such file or directory"},
        {".", "is a directory"},
        {"fifo", "is not a regular file"},
        {"empty.json", "is empty"},
    };
    files_write("empty.json", "", 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *path = files_path(cases[i].name);
        assert_int_equal(moe_json_load(path, 6, &root, &err), MOE_ERROR_FILE);
        assert_null(root);
        if (!strstr(err.text, cases[i].message) || strncmp(err.text, path, strlen(path)))
            fail_msg("%s: '%s', expected '%s'", cases[i].name, err.text, cases[i].message);
    }
}

static void messages_are_printable(void **state)
{
    (void)state;
    struct moe_error err;
    assert_int_equal(moe_fail(&err, MOE_ERROR_WRITE, "%s", "a\x1b[31m\n\x7f\xc3\xa9\xff\xc2\x9b\xe2\x80\xae."),
                     MOE_ERROR_WRITE);
    assert_string_equal(err.text, "a?[31m??\xc3\xa9???.");
    assert_int_equal(moe_fail(&err, MOE_ERROR_FILE, "again: %s", err.text), MOE_ERROR_FILE);
    assert_memory_equal(err.text, "again: a?[31m", 13);
    assert_int_equal(moe_fail(NULL, MOE_ERROR_FILE, "nobody hears"), MOE_ERROR_FILE);

    char *huge = malloc(100001);
    memset(huge, 'x', 100000);
    huge[100000] = 0;
    moe_fail(&err, MOE_ERROR_FILE, "%s", huge);
    assert_int_equal(strlen(err.text), sizeof err.text - 1);
    free(huge);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(accepts),        cmocka_unit_test(rejects),
        cmocka_unit_test(limits_depth),   cmocka_unit_test(finds_duplicate_among_many),
        cmocka_unit_test(reads_integers), cmocka_unit_test(shows_values),
        cmocka_unit_test(loads_files),    cmocka_unit_test(messages_are_printable),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
