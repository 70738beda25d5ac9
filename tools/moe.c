/* SPDX-License-Identifier: Apache-2.0 */
/* The moe command: finds the subcommand, runs it, and makes sure that what it printed has arrived. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tools/cli.h"

static const struct command {
    const char *name;
    const char *summary;
    int (*run)(int argc, char **argv);
} commands[] = {
    {"forward", "run one layer of a model on hidden states from a file", moe_cmd_forward},
    {"inspect", "what a checkpoint holds, and which paths can run it here", moe_cmd_inspect},
    {"synth", "write a random checkpoint in the on-disk form of a model family", moe_cmd_synth},
    {"bench", "time layers and stages over token counts and paths", moe_cmd_bench},
    {"tune", "measure this device, and write the table that auto chooses by", moe_cmd_tune},
    {"replay", "rerun captured batches, and compare with the recorded outputs", moe_cmd_replay},
    {"doctor", "what this machine has, and why a path is unavailable", moe_cmd_doctor},
};
enum { COMMANDS = sizeof commands / sizeof commands[0] };

static void print_help(void)
{
    fputs("moe: run the mixture-of-experts layers of a transformer\n"
          "\n"
          "Examples:\n"
          "  moe synth --like tiny-mixtral --output model --hidden-states x.safetensors --tokens 16\n"
          "  moe inspect --model model\n"
          "  moe forward --model model --layer 0 --input x.safetensors --output y.safetensors\n"
          "\n"
          "Commands:\n",
          stdout);
    for (int i = 0; i < COMMANDS; i++)
        printf("  %-10s %s\n", commands[i].name, commands[i].summary);
    fputs("\n"
          "'moe COMMAND --help' shows the options of a command, 'moe --version' the version.\n"
          "\n"
          "Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 this machine or build cannot,\n"
          "4 an input file is wrong or of an unknown kind, 5 device error.\n",
          stdout);
}

static int unknown(const char *word)
{
    const char *names[COMMANDS + 3];
    for (int i = 0; i < COMMANDS; i++)
        names[i] = commands[i].name;
    names[COMMANDS] = "--help";
    names[COMMANDS + 1] = "--version";
    names[COMMANDS + 2] = NULL;
    char hint[128];
    return cli_fail(CLI_EXIT_USAGE, "unknown %s '%s'%s", word[0] == '-' ? "option" : "command", word,
                    cli_did_you_mean(word, "", names, hint, sizeof hint));
}

static int dispatch(int argc, char **argv)
{
    if (argc < 2)
        return cli_fail(CLI_EXIT_USAGE, "no command given; 'moe --help' lists them");
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_help();
        return CLI_EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        int version = moe_version();
        printf("moe %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
        return CLI_EXIT_OK;
    }
    for (int i = 0; i < COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    }
    return unknown(argv[1]);
}

/* Standard streams that the caller has closed: their numbers must not go to files that the command opens, which would
 * then get what is printed. Open for reading only, so that printing fails as before. */
static void hold_standard_streams(void)
{
    int fd;
    do
        fd = open("/dev/null", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

int main(int argc, char **argv)
{
    hold_standard_streams();
    /* A file size limit then makes write() fail, which is reported and cleaned up after like a full disk. */
    signal(SIGXFSZ, SIG_IGN);
    int code = dispatch(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        if (code == CLI_EXIT_OK)
            code = cli_fail(CLI_EXIT_CANNOT, "standard output: %s", strerror(errno));
    }
    return code;
}
