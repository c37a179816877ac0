/*
 * A load generator for HTTP/1.1 with keep-alive: closed loop, or open loop with -r.
 *
 *     loadgen [OPTION]... ADDRESS REQUEST_FILE
 *
 *     -c CONNECTIONS     1
 *     -d SECONDS         counted, after -w SECONDS of warm-up; SIGTERM ends it earlier
 *     -n REQUESTS        ends after so many
 *     -r RATE            open loop: RATE requests a second on average, at random moments; -g SEED chooses them
 *     -s OFFSET          writes a number of eight decimal digits there, a new one for each request (repeatable)
 *     -v OFFSET,STRIDE   writes the number as four bytes, STRIDE apart: other values in a tensor
 *     -y CYCLE           the numbers begin again after so many
 *     -m FILE            maps FILE, the memory that a request refers to: -v writes there
 *     -k                 copies all of that memory's content there before each request
 *     -u UID:GID         becomes that user before it connects
 *     -l CONNECTIONS     gives up when the server has closed so many, 1000
 *     -p CPU             runs there
 *
 * Closed loop: each connection sends REQUEST_FILE, waits for the whole answer, and sends it again, so N connections are
 * N clients that each wait for their answer. Latency runs from just before the request's first write to the answer's
 * last byte. Open loop: requests are due at moments that do not depend on answers, and latency runs from that moment,
 * whether or not a connection was free then; a server that stops for a while is charged for every request that was
 * due meanwhile. `late_*` is how late this program itself was with a free connection at hand.
 *
 * One thread and one epoll serve all connections. What happens during warm-up is not counted. Prints one line of JSON.
 * An error is an answer other than 200, a connection that ended early, or a request that was due and not answered
 * within DRAIN_S of the end; errors have no part in the latencies. Leaves out: pipelining, chunked answers, TLS.
 */
#define _GNU_SOURCE
#include "address.h"
#include "arrivals.h"
#include "latencies.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_CONNECTIONS = 1024,
    MAX_HEAD_BYTES = 16 * 1024,
    BODY_BUFFER_BYTES = 256 * 1024,
    SEQUENCE_DIGITS = 8,
    SEQUENCE_BYTES = 4,
    MAX_SEQUENCES = 4,
    DRAIN_S = 2,
};

struct connection {
    int fd;
    char *request;        /* its own copy: numbers are written into it */
    size_t sent;          /* bytes of the request that are out */
    uint64_t started_ns;  /* when it was sent, or ought to have been */
    int is_idle;          /* open loop: it waits for the next request that is due */
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
    long digits_at[MAX_SEQUENCES];
    int digit_sequences;
    long bytes_at, bytes_stride; /* bytes_at -1: none */
    uint64_t cycle;
    const char *region_file;
    int copy_region;
    long connections, max_requests;
    long most_lost_connections; /* a server that closes every connection is not worth more time */
    double seconds, warm_up_seconds, rate;
    uint64_t seed;
    long uid, gid; /* uid -1: stay */
} plan = {
    .bytes_at = -1,
    .cycle = 100000000,
    .connections = 1,
    .most_lost_connections = 1000,
    .seconds = 1,
    .warm_up_seconds = 0.2,
    .seed = 1,
    .uid = -1,
};

static struct latencies latencies, lateness;
static struct arrivals arrivals;
static struct connection *idle[MAX_CONNECTIONS]; /* open loop: those without a request */
static long idle_count;
static char *region, *region_content;
static size_t region_size;
static int poller;
static uint64_t sequence, counted_from_ns, end_ns, errors;
static long lost_connections;
static volatile sig_atomic_t told_to_stop;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* ---- Connections */

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

/* ---- Requests */

static void vary(char *request)
{
    uint64_t number = sequence++ % plan.cycle;
    for (int i = 0; i < plan.digit_sequences; i++) {
        uint64_t rest = number;
        for (int digit = SEQUENCE_DIGITS - 1; digit >= 0; digit--, rest /= 10)
            request[plan.digits_at[i] + digit] = (char)('0' + rest % 10);
    }
    if (plan.copy_region)
        memcpy(region, region_content, region_size);
    char *tensor = region != NULL ? region : request;
    if (plan.bytes_at >= 0)
        for (int i = 0; i < SEQUENCE_BYTES; i++)
            tensor[plan.bytes_at + i * plan.bytes_stride] = (char)(number >> (8 * i));
}

static void next_request(struct connection *connection);

static void reconnect(struct connection *connection)
{
    if (++lost_connections > plan.most_lost_connections)
        fail("the server keeps closing connections", plan.address_text);
    close(connection->fd);
    open_connection(connection);
    if (connection->is_idle)
        return; /* no request was lost with it */
    if (now_ns() >= counted_from_ns)
        errors++;
    next_request(connection);
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

static void start_request(struct connection *connection, uint64_t started_ns)
{
    connection->sent = 0;
    connection->head_size = 0;
    connection->head_complete = 0;
    connection->started_ns = started_ns;
    send_request(connection);
}

/* Send what is due on connections that are free. `woken`: by the clock, so that lateness is this program's own. */
static void send_due(uint64_t now, int woken)
{
    while (idle_count > 0 && arrivals.next_ns <= (double)now && arrivals.next_ns < (double)end_ns) {
        uint64_t due_ns = (uint64_t)arrivals.next_ns;
        advance(&arrivals);
        if (woken && due_ns >= counted_from_ns)
            record_latency(&lateness, now - due_ns);
        struct connection *connection = idle[--idle_count];
        connection->is_idle = 0;
        vary(connection->request);
        start_request(connection, due_ns);
    }
}

static void next_request(struct connection *connection)
{
    if (plan.rate > 0) {
        connection->is_idle = 1;
        idle[idle_count++] = connection;
        return; /* the main loop sends what is due; sending from here could recurse without end */
    }
    vary(connection->request);
    start_request(connection, now_ns());
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
    /* What counts is when a request finished in a closed loop, and when it was due in an open one. */
    if ((plan.rate > 0 ? connection->started_ns : now) >= counted_from_ns) {
        if (connection->status == 200)
            record_latency(&latencies, now - connection->started_ns);
        else
            errors++;
    }
    next_request(connection);
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

static void stop(int signal)
{
    (void)signal;
    told_to_stop = 1;
}

/* Handle what happens until `until_ns`, or until something did. */
static void handle_events(uint64_t now, uint64_t until_ns)
{
    struct epoll_event events[128];
    uint64_t wait_ns = until_ns > now ? until_ns - now : 0;
    struct timespec timeout = {(time_t)(wait_ns / 1000000000u), (long)(wait_ns % 1000000000u)};
    int ready = epoll_pwait2(poller, events, 128, &timeout, NULL);
    for (int i = 0; i < ready; i++) {
        struct connection *connection = events[i].data.ptr;
        if (events[i].events & EPOLLOUT)
            send_request(connection);
        else
            receive(connection);
    }
    if (plan.rate > 0)
        send_due(now_ns(), ready == 0);
}

/* Open loop: what was due before the end gets its answer, or is an error. */
static void drain(void)
{
    uint64_t give_up_ns = end_ns + DRAIN_S * 1000000000ull;
    for (uint64_t now; (now = now_ns()) < give_up_ns;) {
        send_due(now, 0);
        if (idle_count == plan.connections)
            return;
        handle_events(now, give_up_ns);
    }
    errors += (uint64_t)(plan.connections - idle_count);
    for (; arrivals.next_ns < (double)end_ns; advance(&arrivals))
        errors++;
}

static void print_results(double seconds, double cpu)
{
    printf("{\"connections\": %ld, \"seconds\": %.4f, \"requests\": %llu, \"errors\": %llu, \"rps\": %.1f, "
           "\"mean_us\": %.2f, \"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f, "
           "\"late_mean_us\": %.2f, \"late_p99_us\": %.2f, \"cpu_s\": %.6f}\n",
           plan.connections, seconds, (unsigned long long)latencies.total, (unsigned long long)errors,
           seconds > 0 ? (double)latencies.total / seconds : 0, mean_us(&latencies), latency_us(&latencies, 0.5),
           latency_us(&latencies, 0.9), latency_us(&latencies, 0.99), (double)latencies.max_ns / 1000.0,
           mean_us(&lateness), latency_us(&lateness, 0.99), cpu);
}

static void run(struct connection *connections)
{
    for (long i = 0; i < plan.connections; i++)
        open_connection(&connections[i]);
    uint64_t started_ns = now_ns(), now = started_ns;
    counted_from_ns = started_ns + (uint64_t)(plan.warm_up_seconds * 1e9);
    end_ns = counted_from_ns + (uint64_t)(plan.seconds * 1e9);
    if (plan.rate > 0)
        arrivals = arrive(plan.seed, plan.rate, started_ns);
    for (long i = 0; i < plan.connections; i++)
        next_request(&connections[i]);

    double cpu_before = cpu_seconds();
    int counting = 0;
    while ((now = now_ns()) < end_ns && !told_to_stop) {
        if (plan.max_requests > 0 && latencies.total + errors >= (uint64_t)plan.max_requests)
            break;
        if (!counting && now >= counted_from_ns) {
            counting = 1;
            cpu_before = cpu_seconds();
        }
        uint64_t until_ns = end_ns;
        if (plan.rate > 0 && idle_count > 0 && arrivals.next_ns < (double)end_ns)
            until_ns = (uint64_t)arrivals.next_ns + 1;
        handle_events(now, until_ns);
    }
    double cpu = cpu_seconds() - cpu_before;
    if (now < end_ns)
        end_ns = now;
    if (plan.rate > 0)
        drain();
    print_results(now > counted_from_ns ? (double)(now - counted_from_ns) / 1e9 : 0, cpu);
}

/* ---- Command line */

static void map_region(void)
{
    int fd = open(plan.region_file, O_RDWR | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0 || status.st_size == 0)
        fail("cannot open", plan.region_file);
    region_size = (size_t)status.st_size;
    region = mmap(NULL, region_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    region_content = malloc(region_size);
    if (region == MAP_FAILED || region_content == NULL)
        fail("cannot map", plan.region_file);
    close(fd);
    memcpy(region_content, region, region_size);
}

static void become(long uid, long gid)
{
    gid_t group = (gid_t)gid;
    if (setgroups(1, &group) != 0 || setgid(group) != 0 || setuid((uid_t)uid) != 0)
        fail("cannot become the user of -u", strerror(errno));
}

static void check_offsets(void)
{
    for (int i = 0; i < plan.digit_sequences; i++)
        if (plan.digits_at[i] < 0 || (size_t)plan.digits_at[i] + SEQUENCE_DIGITS > plan.request_size)
            fail("sequence offset", "expected eight bytes of the request behind it");
    size_t room = region != NULL ? region_size : plan.request_size;
    size_t last_byte = (size_t)plan.bytes_at + (SEQUENCE_BYTES - 1) * (size_t)plan.bytes_stride;
    if (plan.bytes_at >= 0 && (plan.bytes_stride < 1 || last_byte >= room))
        fail("-v", "expected OFFSET,STRIDE with four such bytes inside the request or the region");
    if (plan.copy_region && region == NULL)
        fail("-k", "expected -m with it");
}

static void parse_option(int option, const char *value)
{
    switch (option) {
    case 'c': plan.connections = strtol(value, NULL, 10); break;
    case 'd': plan.seconds = strtod(value, NULL); break;
    case 'w': plan.warm_up_seconds = strtod(value, NULL); break;
    case 'n': plan.max_requests = strtol(value, NULL, 10); break;
    case 'r': plan.rate = strtod(value, NULL); break;
    case 'g': plan.seed = strtoull(value, NULL, 10); break;
    case 'p': pin_to_cpu(value); break;
    case 's':
        if (plan.digit_sequences == MAX_SEQUENCES)
            fail("-s", "expected at most four of them");
        plan.digits_at[plan.digit_sequences++] = strtol(value, NULL, 10);
        break;
    case 'v':
        if (sscanf(value, "%ld,%ld", &plan.bytes_at, &plan.bytes_stride) != 2 || plan.bytes_at < 0)
            fail("-v: expected OFFSET,STRIDE, got", value);
        break;
    case 'y': plan.cycle = strtoull(value, NULL, 10); break;
    case 'm': plan.region_file = value; break;
    case 'k': plan.copy_region = 1; break;
    case 'u':
        if (sscanf(value, "%ld:%ld", &plan.uid, &plan.gid) != 2 || plan.uid < 0 || plan.gid < 0)
            fail("-u: expected UID:GID, got", value);
        break;
    case 'l': plan.most_lost_connections = strtol(value, NULL, 10); break;
    default: exit(2);
    }
}

static void parse_arguments(int argc, char **argv)
{
    for (int option; (option = getopt(argc, argv, "c:d:w:n:r:g:p:s:v:y:m:ku:l:")) != -1;)
        parse_option(option, optarg);
    if (argc - optind != 2)
        fail("usage", "loadgen [OPTION]... ADDRESS REQUEST_FILE");
    plan.address_text = argv[optind];
    plan.address = parse_address(plan.address_text);
    plan.request = read_file(argv[optind + 1], &plan.request_size);
    if (plan.connections < 1 || plan.connections > MAX_CONNECTIONS)
        fail("connections", "expected 1 to 1024");
    if (plan.cycle < 1 || plan.rate < 0 || plan.seconds < 0 || plan.warm_up_seconds < 0)
        fail("usage", "expected a cycle of at least 1 and no negative rate or time");
}

int main(int argc, char **argv)
{
    parse_arguments(argc, argv);
    if (plan.region_file != NULL)
        map_region();
    check_offsets();
    if (plan.uid >= 0)
        become(plan.uid, plan.gid);
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    prctl(PR_SET_TIMERSLACK, 1); /* ns; the default lets an open loop's requests leave 50 us late */
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
    return 0;
}
