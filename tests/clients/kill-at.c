/*
 * Kills the process that it is preloaded into when it makes a certain system call, so that a test can kill it at a certain point.
 *
 * KILL_AT=CALL:WHEN:COUNT
 *   CALL   accept, remap (an IOTLB message of type 7), or the number of an ioctl, in hexadecimal
 *   WHEN   before or after the call
 *   COUNT  1 for the first such call
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void here(const char *call, const char *when)
{
    static int calls;
    const char *at = getenv("KILL_AT");
    size_t length = strlen(call);

    if (!at || strncmp(at, call, length) != 0 || at[length] != ':') {
        return;
    }
    at += length + 1;
    length = strlen(when);
    if (strncmp(at, when, length) == 0 && at[length] == ':' && ++calls == atoi(at + length + 1)) {
        kill(getpid(), SIGKILL);
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    static const char digits[] = "0123456789abcdef";
    char name[9];
    va_list list;
    void *argument;
    long result;

    for (int i = 0; i < 8; i++) {
        name[i] = digits[(request >> (28 - 4 * i)) & 15];
    }
    name[8] = 0;
    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);
    here(name, "before");
    result = syscall(SYS_ioctl, fd, request, argument);
    here(name, "after");
    return result;
}

int accept4(int fd, struct sockaddr *address, socklen_t *length, int flags)
{
    long result;

    here("accept", "before");
    result = syscall(SYS_accept4, fd, address, length, flags);
    if (result >= 0) {
        here("accept", "after");
    }
    return result;
}

ssize_t write(int fd, const void *data, size_t size)
{
    uint32_t type = 0;
    uint8_t kind = 0;
    long result;
    int remap;

    /* A message of version 2: its type, and the kind after address, size, address and permission. */
    if (size == 72) {
        memcpy(&type, data, 4);
        memcpy(&kind, (const char *)data + 8 + 25, 1);
    }
    remap = type == 2 && kind == 7;
    if (remap) {
        here("remap", "before");
    }
    result = syscall(SYS_write, fd, data, size);
    if (remap) {
        here("remap", "after");
    }
    return result;
}
