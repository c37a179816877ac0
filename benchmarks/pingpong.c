/*
 * The floor: what the same bytes over the same kind of socket cost when nothing is done with them.
 *
 *     pingpong ADDRESS REQUEST_BYTES RESPONSE_FILE [-p CPU]
 *
 * One blocking thread per connection reads exactly REQUEST_BYTES, looks at none of them, and writes RESPONSE_FILE. Driven by
 * loadgen with a recorded answer of the server under test, both do the same work on the client's side.
 * Prints "listening" when it listens; SIGTERM ends it.
 */
#define _GNU_SOURCE
#include "address.h"

#include <pthread.h>
#include <unistd.h>

static size_t request_size;
static char *response;
static size_t response_size;

static int read_request(int fd, char *buffer)
{
    for (size_t done = 0; done < request_size;) {
        ssize_t n = read(fd, buffer + done, request_size - done);
        if (n <= 0)
            return 0;
        done += (size_t)n;
    }
    return 1;
}

static int write_response(int fd)
{
    for (size_t done = 0; done < response_size;) {
        /* MSG_NOSIGNAL: a client that has gone ends this thread, not the process. */
        ssize_t n = send(fd, response + done, response_size - done, MSG_NOSIGNAL);
        if (n <= 0)
            return 0;
        done += (size_t)n;
    }
    return 1;
}

static void *serve(void *argument)
{
    int fd = (int)(long)argument;
    char *buffer = malloc(request_size);
    if (buffer != NULL)
        while (read_request(fd, buffer) && write_response(fd))
            continue;
    free(buffer);
    close(fd);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 4 && !(argc == 6 && strcmp(argv[4], "-p") == 0))
        fail("usage", "pingpong ADDRESS REQUEST_BYTES RESPONSE_FILE [-p CPU]");
    if (argc == 6)
        pin_to_cpu(argv[5]);
    struct address address = parse_address(argv[1]);
    request_size = strtoul(argv[2], NULL, 10);
    if (request_size == 0)
        fail("request bytes: expected a positive number, got", argv[2]);
    response = read_file(argv[3], &response_size);

    int listener = socket(address.name.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (listener < 0 || bind(listener, &address.name.any, address.length) != 0 || listen(listener, 1024) != 0)
        fail("cannot listen on", argv[1]);
    puts("listening");
    fflush(stdout);

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        send_at_once(fd, &address);
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(long)fd) != 0) {
            close(fd);
            continue;
        }
        pthread_detach(thread);
    }
}
