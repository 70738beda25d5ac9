/* SPDX-License-Identifier: Apache-2.0 */
#include "config/error.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

#include "config/utf8.h"

/* Terminals act on control characters, and on the Unicode ones that break a line or turn its direction; names from a
 * hostile file must do neither. */
static bool printable(const char *text, size_t length)
{
    const unsigned char *s = (const unsigned char *)text;
    if (length == 1)
        return s[0] >= 0x20 && s[0] != 0x7F;
    if (length == 2)
        return s[0] != 0xC2 || s[1] >= 0xA0; /* U+0080 to U+009F */
    if (length == 3 && s[0] == 0xE2)         /* U+200B-200F, U+2028-202E, U+2066-2069 */
        return !(s[1] == 0x80 && ((s[2] >= 0x8B && s[2] <= 0x8F) || (s[2] >= 0xA8 && s[2] <= 0xAE))) &&
               !(s[1] == 0x81 && s[2] >= 0xA6 && s[2] <= 0xA9);
    return length != 0;
}

moe_status moe_fail(struct moe_error *err, moe_status status, const char *format, ...)
{
    if (!err)
        return status;

    /* Formatted aside, because an argument may be err->text itself. */
    char line[sizeof err->text];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (length < 0)
        length = 0;
    if ((size_t)length >= sizeof line)
        length = sizeof line - 1;

    size_t out = 0;
    for (size_t i = 0; i < (size_t)length;) {
        size_t sequence = moe_utf8_sequence(line + i, (size_t)length - i);
        if (printable(line + i, sequence)) {
            for (size_t j = 0; j < sequence; j++)
                err->text[out++] = line[i + j];
            i += sequence;
        } else {
            err->text[out++] = '?';
            i += sequence ? sequence : 1;
        }
    }
    err->text[out] = 0;
    return status;
}
