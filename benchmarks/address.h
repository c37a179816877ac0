/* Socket addresses on a command line: unix:/path/to.sock or tcp:127.0.0.1:8000 (numbers only, no names). */
#ifndef SKERRY_BENCH_ADDRESS_H
#define SKERRY_BENCH_ADDRESS_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

struct address {
    union {
        struct sockaddr any;
        struct sockaddr_un local;
        struct sockaddr_in tcp;
    } name;
    socklen_t length;
};

static inline _Noreturn void fail(const char *what, const char *detail)
{
    fprintf(stderr, "error: %s: %s\n", what, detail);
    exit(1);
}

static inline struct address parse_address(const char *text)
{
    struct address address = {0};
    if (strncmp(text, "unix:", 5) == 0) {
        struct sockaddr_un *local = &address.name.local;
        if (strlen(text + 5) >= sizeof local->sun_path)
            fail("socket path: expected at most 107 bytes", text + 5);
        local->sun_family = AF_UNIX;
        strcpy(local->sun_path, text + 5);
        address.length = sizeof *local;
        return address;
    }
    char host[16] = "";
    unsigned port = 0;
    struct sockaddr_in *tcp = &address.name.tcp;
    if (sscanf(text, "tcp:%15[0-9.]:%5u", host, &port) != 2 || port > 65535 ||
        inet_pton(AF_INET, host, &tcp->sin_addr) != 1)
        fail("address: expected unix:PATH or tcp:A.B.C.D:PORT, got", text);
    tcp->sin_family = AF_INET;
    tcp->sin_port = htons((unsigned short)port);
    address.length = sizeof *tcp;
    return address;
}

/* Both ends of a TCP connection send at once: Nagle's algorithm would measure itself. */
static inline void send_at_once(int fd, const struct address *address)
{
    int on = 1;
    if (address->name.any.sa_family == AF_INET)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static inline void pin_to_cpu(const char *text)
{
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET((size_t)strtoul(text, NULL, 10), &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus) != 0)
        fail("cannot run on CPU", text);
}

/* A whole file in memory; the caller owns it. An empty file is an error. */
static inline char *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        fail("cannot open", path);
    if (fseek(file, 0, SEEK_END) != 0)
        fail("cannot seek in", path);
    long end = ftell(file);
    if (end <= 0)
        fail("expected a file with contents, got an empty one", path);
    rewind(file);
    char *data = malloc((size_t)end);
    if (data == NULL || fread(data, 1, (size_t)end, file) != (size_t)end)
        fail("cannot read", path);
    fclose(file);
    *size = (size_t)end;
    return data;
}

#endif
