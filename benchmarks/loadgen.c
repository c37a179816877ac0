/*
 * A closed-loop load generator for HTTP/1.1 with keep-alive.
 *
 *     loadgen ADDRESS REQUEST_FILE [-c CONNECTIONS] [-d SECONDS] [-w WARM_UP_SECONDS] [-n MAX_REQUESTS]
 *                                  [-p CPU] [-s SEQUENCE_OFFSET]
 *
 * Each connection sends REQUEST_FILE, waits for the whole answer, and sends it again: N connections are N clients that
 * each wait for their answer. One thread and one epoll serve them all. What finishes during warm-up is not counted.
 * -s writes a number of eight digits over the request at that offset, a new one for each request, so that no two are equal.
 *
 * Prints one line of JSON. Latency runs from just before the request's first write to the last byte of its answer. An error is
 * an answer other than 200 or a connection that ended early; errors have no part in the latencies. Leaves out: pipelining, chunked
 * answers, TLS, open-loop rates.
 */
#define _GNU_SOURCE
#include "address.h"

#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_CONNECTIONS = 1024,
    MAX_HEAD_BYTES = 16 * 1024,
    BODY_BUFFER_BYTES = 256 * 1024,
    SEQUENCE_DIGITS = 8,
    MAX_LOST_CONNECTIONS = 1000, /* a server that closes every connection is not worth more time */
};

/* ---- Latencies: a histogram with 2^8 steps per power of two, so a value is known to 0.4 % in fixed memory. */

enum { STEP_BITS = 8, STEPS = 1 << STEP_BITS, OCTAVES = 64 - STEP_BITS };

static struct {
    uint64_t counts[OCTAVES][STEPS];
    uint64_t total, sum_ns, max_ns;
} latencies;

static void record_latency(uint64_t ns)
{
    int octave = 0;
    uint64_t step = ns;
    if (ns >= STEPS) {
        octave = 64 - STEP_BITS - __builtin_clzll(ns);
        step = (ns >> (octave - 1)) - STEPS;
    }
    latencies.counts[octave][step]++;
    latencies.total++;
    latencies.sum_ns += ns;
    if (ns > latencies.max_ns)
        latencies.max_ns = ns;
}

/* The latency in microseconds that a share of `quantile` of the requests stayed within; 0 if there were none. */
static double latency_us(double quantile)
{
    uint64_t wanted = (uint64_t)(quantile * (double)latencies.total), seen = 0;
    for (int octave = 0; octave < OCTAVES; octave++)
        for (uint64_t step = 0; step < STEPS; step++) {
            seen += latencies.counts[octave][step];
            if (seen > wanted || (seen == latencies.total && seen > 0)) {
                uint64_t ns = octave == 0 ? step : (step + STEPS) << (octave - 1);
                return (double)ns / 1000.0;
            }
        }
    return 0;
}

/* ---- Connections */

struct connection {
    int fd;
    char *request;        /* its own copy: a sequence number is written into it */
    size_t sent;          /* bytes of the request that are out */
    uint64_t started_ns;
    char head[MAX_HEAD_BYTES + 1];
    size_t head_size;     /* bytes of the head that are in; the head is complete once body_left is set */
    int head_complete;
    int status;
    uint64_t body_left;
};

static struct {
    struct address address;
    const char *address_text;
    char *request;
    size_t request_size;
    long sequence_offset; /* -1: none */
    uint64_t sequence;
    long connections, max_requests;
    double seconds, warm_up_seconds;
} plan = {.sequence_offset = -1, .connections = 1, .max_requests = 0, .seconds = 1, .warm_up_seconds = 0.2};

static int poller;
static uint64_t counted_from_ns;
static uint64_t errors;
static int lost_connections;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void watch(struct connection *connection, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(poller, operation, connection->fd, &event) != 0)
        fail("epoll_ctl", strerror(errno));
}

static void open_connection(struct connection *connection)
{
    int family = plan.address.name.any.sa_family;
    connection->fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* Connecting blocks: it happens before the first request or after a loss, never inside a latency. */
    if (connection->fd < 0 || connect(connection->fd, &plan.address.name.any, plan.address.length) != 0)
        fail("cannot connect to", plan.address_text);
    send_at_once(connection->fd, &plan.address);
    watch(connection, EPOLL_CTL_ADD, EPOLLIN);
}

static int would_block(ssize_t n)
{
    return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
}

static void start_request(struct connection *connection, uint64_t now);

static void reconnect(struct connection *connection)
{
    if (now_ns() >= counted_from_ns)
        errors++;
    if (++lost_connections > MAX_LOST_CONNECTIONS)
        fail("the server keeps closing connections", plan.address_text);
    close(connection->fd);
    open_connection(connection);
    start_request(connection, now_ns());
}

/* Send what the socket takes; the rest goes when it says that it takes more. */
static void send_request(struct connection *connection)
{
    int waited = connection->sent > 0;
    while (connection->sent < plan.request_size) {
        ssize_t n = send(connection->fd, connection->request + connection->sent,
                         plan.request_size - connection->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (would_block(n)) {
            watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            return;
        }
        if (n <= 0) {
            reconnect(connection);
            return;
        }
        connection->sent += (size_t)n;
    }
    if (waited)
        watch(connection, EPOLL_CTL_MOD, EPOLLIN);
}

static void start_request(struct connection *connection, uint64_t now)
{
    if (plan.sequence_offset >= 0) {
        uint64_t number = plan.sequence++;
        for (int i = SEQUENCE_DIGITS - 1; i >= 0; i--, number /= 10)
            connection->request[plan.sequence_offset + i] = (char)('0' + number % 10);
    }
    connection->sent = 0;
    connection->head_size = 0;
    connection->head_complete = 0;
    connection->started_ns = now;
    send_request(connection);
}

/* Returns the bytes of body that came with the head, -1 if the head is not complete yet. */
static ssize_t parse_head(struct connection *connection)
{
    char *head = connection->head;
    head[connection->head_size] = '\0';
    char *end = strstr(head, "\r\n\r\n");
    if (end == NULL) {
        if (connection->head_size == MAX_HEAD_BYTES)
            fail("answer: expected a head of at most 16 KiB, got more", plan.address_text);
        return -1;
    }
    *end = '\0';
    if (sscanf(head, "HTTP/1.1 %d", &connection->status) != 1)
        fail("answer: expected HTTP/1.1, got", head);
    connection->body_left = 0;
    for (char *line = head; (line = strstr(line, "\r\n")) != NULL;) {
        line += 2;
        if (strncasecmp(line, "content-length:", 15) == 0)
            connection->body_left = strtoull(line + 15, NULL, 10);
    }
    connection->head_complete = 1;
    return connection->head + connection->head_size - (end + 4);
}

static void finish_request(struct connection *connection)
{
    uint64_t now = now_ns();
    if (now >= counted_from_ns) {
        if (connection->status == 200)
            record_latency(now - connection->started_ns);
        else
            errors++;
    }
    start_request(connection, now);
}

static void receive(struct connection *connection)
{
    static char discarded[BODY_BUFFER_BYTES];
    char *into = connection->head_complete ? discarded : connection->head + connection->head_size;
    size_t room = connection->head_complete ? sizeof discarded : MAX_HEAD_BYTES - connection->head_size;
    ssize_t n = recv(connection->fd, into, room, MSG_DONTWAIT);
    if (would_block(n))
        return;
    if (n <= 0) {
        reconnect(connection);
        return;
    }
    if (!connection->head_complete) {
        connection->head_size += (size_t)n;
        n = parse_head(connection);
        if (n < 0)
            return;
    }
    if ((uint64_t)n > connection->body_left)
        fail("answer: expected one per request, got more bytes than its length", plan.address_text);
    connection->body_left -= (uint64_t)n;
    if (connection->body_left > 0)
        return;
    if (connection->sent < plan.request_size)
        reconnect(connection); /* refused before all of it was sent: what is left would be taken for a new request */
    else
        finish_request(connection);
}

/* ---- The run */

static void run(struct connection *connections)
{
    uint64_t started_ns = now_ns();
    counted_from_ns = started_ns + (uint64_t)(plan.warm_up_seconds * 1e9);
    uint64_t end_ns = counted_from_ns + (uint64_t)(plan.seconds * 1e9), now = started_ns;

    for (long i = 0; i < plan.connections; i++)
        open_connection(&connections[i]);
    for (long i = 0; i < plan.connections; i++)
        start_request(&connections[i], now_ns());
    struct epoll_event events[128];
    while ((now = now_ns()) < end_ns) {
        if (plan.max_requests > 0 && latencies.total + errors >= (uint64_t)plan.max_requests)
            break;
        int ready = epoll_wait(poller, events, 128, (int)((end_ns - now) / 1000000u) + 1);
        for (int i = 0; i < ready; i++) {
            struct connection *connection = events[i].data.ptr;
            if (events[i].events & EPOLLOUT)
                send_request(connection);
            else
                receive(connection);
        }
    }
    double seconds = now > counted_from_ns ? (double)(now - counted_from_ns) / 1e9 : 0;
    uint64_t requests = latencies.total;
    printf("{\"connections\": %ld, \"seconds\": %.4f, \"requests\": %llu, \"errors\": %llu, \"rps\": %.1f, "
           "\"mean_us\": %.2f, \"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f}\n",
           plan.connections, seconds, (unsigned long long)requests, (unsigned long long)errors,
           seconds > 0 ? (double)requests / seconds : 0,
           requests > 0 ? (double)latencies.sum_ns / (double)requests / 1000.0 : 0, latency_us(0.5),
           latency_us(0.9), latency_us(0.99), (double)latencies.max_ns / 1000.0);
}

static void parse_arguments(int argc, char **argv)
{
    for (int option; (option = getopt(argc, argv, "c:d:w:n:p:s:")) != -1;)
        switch (option) {
        case 'c': plan.connections = strtol(optarg, NULL, 10); break;
        case 'd': plan.seconds = strtod(optarg, NULL); break;
        case 'w': plan.warm_up_seconds = strtod(optarg, NULL); break;
        case 'n': plan.max_requests = strtol(optarg, NULL, 10); break;
        case 'p': pin_to_cpu(optarg); break;
        case 's': plan.sequence_offset = strtol(optarg, NULL, 10); break;
        default: exit(2);
        }
    if (argc - optind != 2)
        fail("usage", "loadgen ADDRESS REQUEST_FILE [-c N] [-d SECONDS] [-w SECONDS] [-n N] [-p CPU] [-s OFFSET]");
    plan.address_text = argv[optind];
    plan.address = parse_address(plan.address_text);
    plan.request = read_file(argv[optind + 1], &plan.request_size);
    if (plan.connections < 1 || plan.connections > MAX_CONNECTIONS)
        fail("connections", "expected 1 to 1024");
    if (plan.sequence_offset > (long)plan.request_size - SEQUENCE_DIGITS)
        fail("sequence offset", "expected eight bytes of the request behind it");
}

int main(int argc, char **argv)
{
    parse_arguments(argc, argv);
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct connection *connections = calloc((size_t)plan.connections, sizeof *connections);
    if (poller < 0 || connections == NULL)
        fail("cannot start", strerror(errno));
    for (long i = 0; i < plan.connections; i++) {
        connections[i].request = malloc(plan.request_size);
        if (connections[i].request == NULL)
            fail("out of memory", "requests");
        memcpy(connections[i].request, plan.request, plan.request_size);
    }
    run(connections);
    return latencies.total > 0 ? 0 : 1;
}
