/* The load generator: one thread, one epoll, no memory allocated while it counts.
 *
 * It is C because a Python one would be slower than the servers it measures. It says how busy its own
 * core was ("load_busy"), so that a figure that it limits can be told from one that it does not; and
 * it reads the CPU clock of the server process itself, at the moments at which the counting begins and
 * ends. Each mode prints its result as one line of JSON.
 *
 *   echo       CONNECTIONS, each with DEPTH messages of SIZE bytes under way; a reply is answered with
 *              the next message. Replies may come glued or cut: bytes are counted.
 *   accept     CONNECTIONS at a time, each: connect, one message, its echo, close, and the next.
 *   hold       CONNECTIONS are opened, one echo each, and stay idle until the server closes them
 *              (a second line of JSON then) or standard input ends.
 *   broadcast  one connection sends, the server sends that to all; the next when all have it.
 *   serve      an echo server, against which the other modes show what they are able to.
 *
 * With WITH_TLS it is linked with OpenSSL, and "--tls" lets "echo" speak TLS 1.3. It encrypts and
 * decrypts in memory (OpenSSL's memory grows to what it needs in the warm-up), so that the system calls,
 * and what the server finds at once, are those of a plain run. It verifies no certificate.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

#define OPENING 128   /* connections being opened at a time: fewer than any backlog */
#define SOURCES 100   /* addresses 127.0.0.x to connect from: one has only some 28,000 ports */
#define BUFFER (256 * 1024)
#define EVENTS 1024
#define FINE 128      /* steps of the histogram between two powers of two: 0.8 % */

struct connection {
    int fd;
    int wants_out;    /* EPOLLOUT is asked for */
    long unsent;      /* bytes still to be written */
    long received;    /* bytes of the reply that is coming in */
    uint32_t oldest, newest;
    uint64_t *sent;   /* when the messages under way were sent: a ring of `depth` */
#ifdef WITH_TLS
    SSL *ssl;
    BIO *encrypted_in, *encrypted_out;
#endif
};

static int port, connections = 1, size = 64, depth = 1;
static int tls;
static const char *content = ""; /* "lines": each ends with LF; "lengths": each begins with its */
static pid_t server_pid;
static double warm = 0.2, seconds = 1.0;
static long wanted; /* messages, instead of a time; 0: a time */
static struct sockaddr_in server_address = {.sin_family = AF_INET};

static int epoll_fd;
static struct epoll_event events[EVENTS];
static char *payload, *incoming;
static struct connection *all;

static long items;
static uint32_t histogram[64 * FINE];
static uint64_t worst;
static clockid_t server_clock;

static void fail(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t))
        fail("clock_gettime");
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

/* Latencies. */

static void record(uint64_t ns)
{
    int exponent = ns < FINE ? 0 : 63 - __builtin_clzll(ns) - 6;
    histogram[exponent * FINE + (ns >> exponent)]++;
    if (ns > worst)
        worst = ns;
}

static double percentile_ms(double share)
{
    long total = 0, seen = 0;
    for (int i = 0; i < 64 * FINE; i++)
        total += histogram[i];
    for (int i = 0; i < 64 * FINE; i++) {
        seen += histogram[i];
        if (seen > 0 && seen >= share * total)
            return (double)((uint64_t)(i % FINE) << (i / FINE)) / 1e6;
    }
    return 0;
}

/* What is counted, from the end of the warm-up on. */

static struct { uint64_t wall, load, server; } began;

static uint64_t server_cpu(void) { return server_pid ? clock_ns(server_clock) : 0; }

static void begin_counting(void)
{
    items = 0;
    worst = 0;
    memset(histogram, 0, sizeof histogram);
    began.load = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    began.server = server_cpu();
    began.wall = now();
}

static void report(void)
{
    double wall = (double)(now() - began.wall) / 1e9;
    double server = (double)(server_cpu() - began.server) / 1e9;
    double load = (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - began.load) / 1e9;
    printf("{\"items\": %ld, \"seconds\": %.9f, \"server_cpu\": %.9f, \"load_cpu\": %.9f, "
           "\"p50_ms\": %.6f, \"p99_ms\": %.6f, \"max_ms\": %.6f}\n",
           items, wall, server, load, percentile_ms(0.5), percentile_ms(0.99), (double)worst / 1e6);
    fflush(stdout);
}

/* True as long as there is time; begins to count when the warm-up is over. On a machine so busy that
 * the server did not run meanwhile, it goes on until each connection has had two replies. With a number
 * of messages all of them are counted, and no time. */
static int goes_on(void)
{
    static uint64_t warm_until, until;
    uint64_t t = now();
    if (wanted)
        return items < wanted;
    if (!warm_until) {
        warm_until = t + (uint64_t)(warm * 1e9);
    } else if (!until && t >= warm_until) {
        begin_counting();
        until = began.wall + (uint64_t)(seconds * 1e9);
    }
    return !until || t < until || items < 2L * connections * depth;
}

/* Connections. */

static void ask(struct connection *c, int operation, int out)
{
    struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &e))
        fail("epoll_ctl");
    c->wants_out = out;
}

#ifdef WITH_TLS

static SSL_CTX *tls_context;
static char *scratch;

static void fail_tls(const char *what)
{
    fprintf(stderr, "load: %s: ", what);
    ERR_print_errors_fp(stderr);
    exit(1);
}

static void prepare_tls(void)
{
    if (!(tls_context = SSL_CTX_new(TLS_client_method())) || !(scratch = malloc(BUFFER)) ||
        !SSL_CTX_set_min_proto_version(tls_context, TLS1_3_VERSION))
        fail_tls("OpenSSL");
    SSL_CTX_set_mode(tls_context,
                     SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
}

static void begin_tls(struct connection *c)
{
    c->encrypted_in = BIO_new(BIO_s_mem());
    c->encrypted_out = BIO_new(BIO_s_mem());
    if (!(c->ssl = SSL_new(tls_context)) || !c->encrypted_in || !c->encrypted_out)
        fail_tls("OpenSSL");
    SSL_set_bio(c->ssl, c->encrypted_in, c->encrypted_out);
    SSL_set_connect_state(c->ssl);
}

/* Goes on with the handshake, too. Returns whether something waits for the kernel. */
static int flush_tls(struct connection *c)
{
    char *data;
    long left;
    int n;
    ERR_clear_error();
    while (c->unsent && (n = SSL_write(c->ssl, payload, (int)c->unsent)) > 0)
        c->unsent -= n;
    if (c->unsent && SSL_get_error(c->ssl, n) != SSL_ERROR_WANT_READ)
        fail_tls("SSL_write");
    while ((left = BIO_get_mem_data(c->encrypted_out, &data)) > 0) {
        ssize_t sent = send(c->fd, data, (size_t)left, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN)
                fail("send");
            return 1;
        }
        for (; sent > 0; sent -= n)
            n = BIO_read(c->encrypted_out, scratch, (int)(sent < BUFFER ? sent : BUFFER));
    }
    return 0;
}

/* Decrypts the `count` bytes that came in: how many bytes of replies that makes, -1: the end. */
static ssize_t decrypt(struct connection *c, int count)
{
    ssize_t total = 0;
    int n, error;
    ERR_clear_error();
    if (BIO_write(c->encrypted_in, incoming, count) != count)
        fail_tls("BIO_write");
    while ((n = SSL_read(c->ssl, scratch, BUFFER)) > 0)
        total += n;
    error = SSL_get_error(c->ssl, n);
    if (error == SSL_ERROR_ZERO_RETURN)
        return -1;
    if (error != SSL_ERROR_WANT_READ)
        fail_tls("SSL_read");
    return total;
}

#else

static void begin_tls(struct connection *c) { (void)c; }
static int flush_tls(struct connection *c) { return c->unsent > 0; }
static ssize_t decrypt(struct connection *c, int count) { return c ? count : -1; }

#endif

static int flush_plain(struct connection *c)
{
    while (c->unsent) {
        ssize_t n = send(c->fd, payload, (size_t)c->unsent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN)
                fail("send");
            return 1;
        }
        c->unsent -= n;
    }
    return 0;
}

static void flush(struct connection *c)
{
    int waits = tls ? flush_tls(c) : flush_plain(c);
    if (waits != c->wants_out)
        ask(c, EPOLL_CTL_MOD, waits);
}

static void add_message(struct connection *c)
{
    c->sent[c->newest++ % (uint32_t)depth] = now();
    c->unsent += size;
}

static void open_connection(struct connection *c)
{
    static int count;
    struct sockaddr_in source = {.sin_family = AF_INET};
    int one = 1;
    uint64_t t = now();
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0)
        fail("socket");
    source.sin_addr.s_addr = htonl(0x7f000002 + (uint32_t)(count++ % SOURCES));
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(c->fd, (void *)&source, sizeof source))
        fail("bind");
    if (connect(c->fd, (void *)&server_address, sizeof server_address) && errno != EINPROGRESS)
        fail("connect");
    ask(c, EPOLL_CTL_ADD, 0);
    if (tls)
        begin_tls(c);
    c->received = c->unsent = 0;
    c->oldest = c->newest = 0;
    add_message(c);
    c->sent[0] = t;
    flush(c);
}

/* Reads once. Returns the messages that are complete now, -1 at the server's FIN. */
static long take(struct connection *c)
{
    long complete = 0;
    ssize_t n = recv(c->fd, incoming, BUFFER, 0);
    if (n == 0)
        return -1;
    if (n < 0) {
        if (errno == EAGAIN)
            return 0;
        fail("recv");
    }
    if (tls && (n = decrypt(c, (int)n)) < 0)
        return -1;
    for (c->received += n; c->received >= size; c->received -= size) {
        if (c->oldest == c->newest) {
            errno = EPROTO;
            fail("more bytes than were sent");
        }
        record(now() - c->sent[c->oldest++ % (uint32_t)depth]);
        complete++;
    }
    return complete;
}

/* The next event's connection; NULL for standard input, or when there is none for a while. */
static struct connection *next_event(uint32_t *what)
{
    static int count, at;
    if (at == count) {
        at = 0;
        count = epoll_wait(epoll_fd, events, EVENTS, 100);
        if (count <= 0) {
            count = 0;
            *what = 0;
            return NULL;
        }
    }
    *what = events[at].events;
    return events[at++].data.ptr;
}

static void open_all(void)
{
    int opened = 0, ready = 0;
    uint32_t what;
    for (int i = 0; i < connections; i++)
        all[i].sent = calloc((size_t)depth, sizeof(uint64_t));
    begin_counting();
    while (ready < connections) {
        while (opened < connections && opened - ready < OPENING)
            open_connection(&all[opened++]);
        struct connection *c = next_event(&what);
        if (!c)
            continue;
        long complete = what & ~(uint32_t)EPOLLOUT ? take(c) : 0;
        if (complete < 0) {
            errno = ECONNRESET;
            fail("the server closed a connection");
        }
        flush(c);
        ready += (int)complete;
        items += complete;
    }
}

/* Modes. */

static void run_echo(void)
{
    open_all();
    for (int i = 0; i < connections; i++) {
        for (int k = 0; k < depth; k++)
            add_message(&all[i]);
        flush(&all[i]);
    }
    while (goes_on()) {
        uint32_t what;
        struct connection *c = next_event(&what);
        if (!c)
            continue;
        long complete = what & ~(uint32_t)EPOLLOUT ? take(c) : 0;
        if (complete < 0) {
            errno = ECONNRESET;
            fail("the server closed a connection");
        }
        items += complete;
        while (complete--)
            add_message(c);
        flush(c);
    }
    report();
}

static void run_accept(void)
{
    for (int i = 0; i < connections; i++) {
        all[i].sent = calloc((size_t)depth, sizeof(uint64_t));
        open_connection(&all[i]);
    }
    while (goes_on()) {
        uint32_t what;
        struct connection *c = next_event(&what);
        if (!c)
            continue;
        flush(c);
        long complete = what & ~(uint32_t)EPOLLOUT ? take(c) : 0;
        if (!complete)
            continue;
        if (complete < 0) {
            errno = ECONNRESET;
            fail("the server closed a connection");
        }
        items++;
        close(c->fd);
        open_connection(c);
    }
    report();
}

static void run_hold(void)
{
    struct epoll_event input = {.events = EPOLLIN, .data.ptr = NULL};
    int open = connections;
    open_all();
    report();
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &input))
        fail("standard input");
    while (open) {
        uint32_t what;
        struct connection *c = next_event(&what);
        if (!c) {
            if (what)
                return;
            continue;
        }
        if (open == connections)
            begin_counting();
        /* A reset ends it too, and is counted as not closed properly. */
        ssize_t n = recv(c->fd, incoming, BUFFER, 0);
        if (n > 0)
            continue;
        items += n == 0;
        close(c->fd);
        open--;
    }
    report();
}

static void run_broadcast(void)
{
    open_all();
    payload[0] = '.';
    long left = 0;
    uint64_t sent_at = 0;
    while (goes_on()) {
        if (!left) {
            left = (long)connections * size;
            sent_at = now();
            all[0].unsent = size;
            flush(&all[0]);
        }
        uint32_t what;
        struct connection *c = next_event(&what);
        if (!c)
            continue;
        ssize_t n = recv(c->fd, incoming, BUFFER, 0);
        if (n <= 0)
            fail("recv");
        left -= n;
        if (!left) {
            items += connections;
            record(now() - sent_at);
        }
    }
    report();
}

static void answer(int fd)
{
    ssize_t n = recv(fd, incoming, BUFFER, 0);
    if (n <= 0) {
        close(fd);
        return;
    }
    for (ssize_t done = 0, k; done < n; done += k) {
        k = send(fd, incoming + done, (size_t)(n - done), MSG_NOSIGNAL);
        if (k < 0) {
            struct pollfd p = {.fd = fd, .events = POLLOUT};
            if (errno != EAGAIN)
                return;
            poll(&p, 1, -1);
            k = 0;
        }
    }
}

static void run_serve(void)
{
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    socklen_t length = sizeof server_address;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(listener, (void *)&server_address, sizeof server_address) || listen(listener, 1024) ||
        getsockname(listener, (void *)&server_address, &length))
        fail("listen");
    printf("{\"port\": %d}\n", ntohs(server_address.sin_port));
    fflush(stdout);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.fd != listener) {
                answer(events[i].data.fd);
                continue;
            }
            int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
            if (fd < 0)
                continue;
            e.data.fd = fd;
            epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
        }
    }
}

/* The command line. */

static void prepare(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nothing is left running when the benchmark is killed */
    server_address.sin_port = htons((uint16_t)port);
    server_address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (server_pid && clock_getcpuclockid(server_pid, &server_clock))
        fail("no such server process");
#ifdef WITH_TLS
    if (tls)
        prepare_tls();
#endif
    epoll_fd = epoll_create1(0);
    all = calloc((size_t)connections, sizeof *all);
    incoming = malloc(BUFFER);
    payload = malloc((size_t)size * (size_t)depth);
    if (epoll_fd < 0 || !all || !incoming || !payload)
        fail("no memory");
    memset(payload, 'x', (size_t)size * (size_t)depth);
    for (int i = 0; i < depth; i++) {
        char *message = payload + (size_t)size * (size_t)i;
        uint32_t length = htonl((uint32_t)size - 4);
        if (strcmp(content, "lines") == 0)
            message[size - 1] = '\n';
        else if (strcmp(content, "lengths") == 0)
            memcpy(message, &length, 4);
    }
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"port", 1, NULL, 'p'},       {"connections", 1, NULL, 'c'}, {"size", 1, NULL, 's'},
        {"depth", 1, NULL, 'd'},      {"warm", 1, NULL, 'w'},        {"seconds", 1, NULL, 't'},
        {"server-pid", 1, NULL, 'P'}, {"content", 1, NULL, 'C'},     {"tls", 0, NULL, 'T'},
        {"items", 1, NULL, 'n'},      {NULL, 0, NULL, 0},
    };
    static const struct { const char *name; void (*run)(void); } modes[] = {
        {"echo", run_echo}, {"accept", run_accept},       {"hold", run_hold},
        {"serve", run_serve}, {"broadcast", run_broadcast},
    };
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'c': connections = atoi(optarg); break;
        case 's': size = atoi(optarg); break;
        case 'd': depth = atoi(optarg); break;
        case 'w': warm = atof(optarg); break;
        case 't': seconds = atof(optarg); break;
        case 'n': wanted = atol(optarg); break;
        case 'P': server_pid = atoi(optarg); break;
        case 'C': content = optarg; break;
#ifdef WITH_TLS
        case 'T': tls = 1; break;
#endif
        default: return 2;
        }
    }
    if (tls && (optind == argc || strcmp(argv[optind], "echo") != 0)) {
        fprintf(stderr, "load: only echo speaks TLS\n");
        return 2;
    }
    for (size_t i = 0; optind < argc && i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(argv[optind], modes[i].name) == 0) {
            prepare();
            modes[i].run();
            return 0;
        }
    }
    fprintf(stderr, "usage: load echo|accept|hold|broadcast|serve [options]\n");
    return 2;
}
