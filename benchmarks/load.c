/* Generator and collector of the telemetry and relay benchmarks: one thread, two plain sockets, MQTT 3.1.1.
 *
 *     load port=1883 mode=telemetry qos=0 window=4000 seconds=3
 *
 * Arguments (benchmarks/load.py has them with their meaning): port, mode (telemetry, relay, gathered, direct), qos, window,
 * rate (0: as fast as the window allows), hot (every how manieth reading is above the alarm), warm, seconds, patience.
 *
 * A reading is {"device":"dev-017","temperature":21.5,"humidity":48.2,"ts":1732200000123,"seq":1000000017}. Packets are
 * prebuilt, only time, number and packet identifier are written into them. Lines on stdout: ready, begin, end, and a result
 * as JSON. What is under way never exceeds `window`: readings that were sent and for which, or for a later one, nothing has
 * come back. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { DEVICES = 200, VARIANTS = 16, PACKET = 192, RING = 1 << 20, BURST = 1 << 16, SAMPLES = 1 << 22, IN = 1 << 20 };
enum { NORMAL, HOT, FAULT, KINDS };
#define FIRST 2000000000LL /* number of the first reading: all numbers have ten digits */

typedef struct {
    unsigned char bytes[PACKET];
    int length, id, ts, seq; /* where packet identifier, time and number stand */
    double fahrenheit;
} Packet;

typedef struct {
    int fd;
    unsigned char *out, *in;
    size_t out_from, out_to, in_to;
} Link;

static Packet packets[KINDS][DEVICES][VARIANTS], probe;
static int64_t sent_at[RING];
static uint32_t latencies[SAMPLES];
static size_t samples;
static Link up, down;

static int port = 1883, qos, hot_every = 64, telemetry, gathered, direct;
static long window = 4000;
static double rate, warm = 1, lasts = 3, patience = 8;

static long long sent, expected, received, counted, answered;
static double sum_sent, sum_seen;
static int probed, measuring;
static uint16_t identifier;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long clock_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "the broker closed the connection");
    exit(1);
}

static void digits(unsigned char *at, int n, long long value) {
    while (n--) {
        at[n] = '0' + value % 10;
        value /= 10;
    }
}

static void build(Packet *p, const char *device, double celsius, double humidity) {
    char topic[64], body[128];
    int t = sprintf(topic, "farm/%s/reading", device);
    int b = sprintf(body, "{\"device\":\"%s\",\"temperature\":%.1f,\"humidity\":%.1f,\"ts\":0000000000000,\"seq\":0000000000}",
                    device, celsius, humidity);
    int rest = 2 + t + (qos ? 2 : 0) + b, at = 0;
    unsigned char *o = p->bytes;
    o[at++] = 0x30 | qos << 1;
    if (rest > 127) o[at++] = (rest & 127) | 128, o[at++] = rest >> 7;
    else o[at++] = rest;
    o[at++] = 0, o[at++] = t;
    memcpy(o + at, topic, t), at += t;
    p->id = at;
    if (qos) at += 2;
    memcpy(o + at, body, b);
    p->ts = at + (int)(strstr(body, "\"ts\":") - body) + 5;
    p->seq = at + (int)(strstr(body, "\"seq\":") - body) + 6;
    p->length = at + b;
    p->fahrenheit = celsius * 1.8 + 32;
}

static void build_all(void) {
    char device[16];
    for (int d = 0; d < DEVICES; d++) {
        sprintf(device, "dev-%03d", d);
        for (int v = 0; v < VARIANTS; v++) {
            build(&packets[NORMAL][d][v], device, 15 + (d * 7 + v * 13) % 200 / 10.0, 40 + (d + v) % 30);
            build(&packets[HOT][d][v], device, 45 + (d + v) % 50 / 10.0, 30 + v);
            build(&packets[FAULT][d][v], device, 850, 0);
        }
    }
    build(&probe, "probe", 45, 50);
}

static Link dial(const char *name) {
    Link link = {.fd = socket(AF_INET, SOCK_STREAM, 0), .out = malloc(4 * BURST), .in = malloc(IN)};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    unsigned char c[64] = {0x10, 0, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 0, 0}, answer[4];
    if (connect(link.fd, (void *)&to, sizeof to)) die("connect");
    setsockopt(link.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int n = sprintf((char *)c + 14, "%s-%d", name, getpid());
    c[13] = n, c[1] = 12 + n;
    if (write(link.fd, c, 14 + n) < 0) die("connect");
    if (recv(link.fd, answer, 4, MSG_WAITALL) != 4 || answer[3]) die("connack");
    return link;
}

static void subscribe(Link *link, const char *filter) {
    unsigned char c[64] = {0x82, 0, 0, 1, 0}, answer[5];
    int n = strlen(filter);
    c[1] = 5 + n, c[5] = n;
    memcpy(c + 6, filter, n);
    c[6 + n] = qos;
    if (write(link->fd, c, 7 + n) < 0) die("subscribe");
    if (recv(link->fd, answer, 5, MSG_WAITALL) != 5 || answer[4] == 0x80) die("suback");
}

static void flush(Link *link) {
    while (link->out_from < link->out_to) {
        ssize_t n = send(link->fd, link->out + link->out_from, link->out_to - link->out_from, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN || errno == EINTR) return;
            die("send");
        }
        link->out_from += n;
    }
    link->out_from = link->out_to = 0;
}

static int room(Link *link) { return link->out_to + PACKET < BURST; }

static void put(const Packet *p, long long number, long long ms) {
    unsigned char *o = up.out + up.out_to;
    memcpy(o, p->bytes, p->length);
    if (qos) {
        if (!++identifier) identifier = 1;
        o[p->id] = identifier >> 8, o[p->id + 1] = identifier & 255;
    }
    digits(o + p->ts, 13, ms);
    digits(o + p->seq, 10, number);
    up.out_to += p->length;
}

/* The next reading. Faults are filtered by the program; only telemetry has them. */
static void next(int64_t at, long long ms) {
    int device = sent % DEVICES, variant = sent / DEVICES % VARIANTS, kind = NORMAL;
    if (telemetry && sent % hot_every == 0) kind = HOT;
    else if (telemetry && sent % 50 == 7) kind = FAULT;
    const Packet *p = &packets[kind][device][variant];
    put(p, FIRST + sent, ms);
    sent_at[sent % RING] = at;
    sent++;
    if (kind != FAULT) expected++, sum_sent += p->fahrenheit;
}

/* The number behind "key": in a body, or nan. */
static double number_of(const char *body, size_t n, const char *key) {
    const char *at = memmem(body, n, key, strlen(key));
    return at ? strtod(at + strlen(key), NULL) : NAN;
}

static void seen(const char *topic, size_t t, const char *body, size_t n) {
    if (telemetry && t > 5 && !memcmp(topic + t - 5, "/mean", 5)) {
        if (t >= 11 && !memcmp(topic + t - 11, "/probe/", 7)) return;
        double k = number_of(body, n, "\"n\":"), mean = number_of(body, n, "\"mean\":");
        if (!isnan(k)) counted += (long long)k, sum_seen += k * mean;
        return;
    }
    if (gathered) {
        double k = number_of(body, n, "\"n\":");
        if (memmem(body, n, "\"probe\"", 7)) {
            probed = 1;
            return;
        }
        if (!isnan(k)) received += (long long)k, counted = answered = received;
        return;
    }
    double number = number_of(body, n, "\"seq\":");
    if (isnan(number)) return;
    long long i = (long long)number - FIRST;
    if (i < 0) {
        probed = 1;
        return;
    }
    received++;
    if (telemetry) answered = i + 1 > answered ? i + 1 : answered;
    else {
        answered = counted = received;
        double f = number_of(body, n, "\"temperature\":");
        sum_seen += direct ? f * 1.8 + 32 : f;
    }
    if (measuring && samples < SAMPLES && i < sent) latencies[samples++] = (now() - sent_at[i % RING]) / 100; /* 0.1 us */
}

/* Everything that has arrived. */
static void take(Link *link) {
    for (;;) {
        ssize_t got = recv(link->fd, link->in + link->in_to, IN - link->in_to - 1, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (got <= 0) errno = got ? errno : 0, die("recv");
        link->in_to += got;
        unsigned char *p = link->in, *end = p + link->in_to;
        while (end - p >= 2) {
            size_t length = 0, head = 1, shift = 0;
            while (head < 5 && p + head < end) {
                length |= (size_t)(p[head] & 127) << shift, shift += 7;
                if (!(p[head++] & 128)) break;
            }
            if (p[head - 1] & 128 || (size_t)(end - p) < head + length) break;
            unsigned char *b = p + head;
            if ((*p & 0xf0) == 0x30) {
                size_t t = b[0] << 8 | b[1], at = 2 + t;
                if (*p & 6) {
                    unsigned char *o = link->out + link->out_to;
                    o[0] = 0x40, o[1] = 2, o[2] = b[at], o[3] = b[at + 1], at += 2;
                    link->out_to += 4;
                    if (link->out_to > 3 * BURST) flush(link);
                }
                unsigned char after = b[length];
                b[length] = 0; /* numbers are read up to here */
                seen((char *)b + 2, t, (char *)b + at, length - at);
                b[length] = after;
            }
            p = b + length;
        }
        memmove(link->in, p, link->in_to = end - p);
        if ((size_t)got < IN / 2) break;
    }
    flush(link);
}

static void wait_for(int milliseconds, long microseconds) {
    struct pollfd both[2] = {{up.fd, POLLIN | (up.out_to ? POLLOUT : 0), 0}, {down.fd, POLLIN | (down.out_to ? POLLOUT : 0), 0}};
    struct timespec t = {milliseconds / 1000, milliseconds % 1000 * 1000000L + microseconds * 1000};
    if (ppoll(both, 2, &t, NULL) < 0 && errno != EINTR) die("poll");
    if (both[0].revents) take(&up);
    take(&down);
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile(double q) { return samples ? latencies[(size_t)(q * (samples - 1))] / 1e7 : 0; }

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (!value) return fprintf(stderr, "load: expected name=value, got %s\n", argv[i]), 2;
        *value++ = 0;
        if (!strcmp(argv[i], "port")) port = atoi(value);
        else if (!strcmp(argv[i], "mode"))
            telemetry = !strcmp(value, "telemetry"), gathered = !strcmp(value, "gathered"), direct = !strcmp(value, "direct");
        else if (!strcmp(argv[i], "qos")) qos = atoi(value);
        else if (!strcmp(argv[i], "window")) window = atol(value);
        else if (!strcmp(argv[i], "rate")) rate = atof(value);
        else if (!strcmp(argv[i], "hot")) hot_every = atoi(value);
        else if (!strcmp(argv[i], "warm")) warm = atof(value);
        else if (!strcmp(argv[i], "seconds")) lasts = atof(value);
        else if (!strcmp(argv[i], "patience")) patience = atof(value);
        else return fprintf(stderr, "load: unknown argument %s\n", argv[i]), 2;
    }
    build_all();
    up = dial("generator"), down = dial("collector");
    if (direct) subscribe(&down, "farm/+/reading");
    else {
        subscribe(&down, "farm/out");
        if (telemetry) subscribe(&down, "farm/+/mean");
    }
    fcntl(up.fd, F_SETFL, O_NONBLOCK), fcntl(down.fd, F_SETFL, O_NONBLOCK);

    /* Until the program answers: one reading of a device that is not counted. */
    int64_t began = now(), asked = 0;
    while (!probed) {
        if (now() - began > 60e9) return fprintf(stderr, "load: nothing answers\n"), 1;
        if (now() - asked > 50000000) put(&probe, FIRST / 2, clock_ms()), flush(&up), asked = now();
        wait_for(20, 0);
    }
    for (began = now(); now() - began < 300000000;) wait_for(20, 0); /* what else was asked is answered too */
    printf("ready\n"), fflush(stdout);

    int64_t start = now(), begin = start + (int64_t)(warm * 1e9), end = begin + (int64_t)(lasts * 1e9), t;
    int64_t measured_from = 0, measured_to = 0, progress = start;
    long long from = 0, last = 0;
    long least = window / 8 > 0 ? window / 8 : 1;
    if (!rate && !telemetry) { /* not woken for each message of many */
        int few = 2048;
        setsockopt(down.fd, SOL_SOCKET, SO_RCVLOWAT, &few, sizeof few);
    }
    while ((t = now()) < end) {
        if (!measuring && t >= begin) {
            measuring = 1, measured_from = t, from = answered;
            printf("begin\n"), fflush(stdout);
        }
        long long ms = clock_ms();
        if (rate) {
            long long due = (long long)((t - start) / 1e9 * rate) + 1;
            while (sent < due && room(&up)) next(now(), ms);
        } else if (window - (sent - answered) >= least) {
            while (sent - answered < window && room(&up)) next(t, ms);
        }
        if (up.out_to) flush(&up);
        if (answered != last) last = answered, progress = t;
        if (t - progress > patience * 1e9) break; /* something is lost, or the program is gone */
        if (rate) {
            int64_t due = start + (int64_t)(sent / rate * 1e9), left = (due - now()) / 1000;
            wait_for(0, left > 0 ? left < 900000 ? left : 900000 : 0);
        } else
            wait_for(up.out_to ? 10 : sent - answered < window ? 1 : 2, 0);
    }
    measured_to = now();
    long long answers = answered - from;
    measuring = 0;
    printf("end\n"), fflush(stdout);

    /* A reading of a later second ends all windows. */
    int one = 1;
    setsockopt(down.fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof one);
    if (telemetry) {
        while (up.out_to) flush(&up), wait_for(1, 0);
        put(&probe, FIRST / 2, clock_ms() + 1000);
        flush(&up);
    }
    long long seen_last = -1;
    for (progress = now(); counted < expected && now() - progress < patience * 1e9;) {
        wait_for(10, 0);
        if (counted != seen_last || received != last) seen_last = counted, last = received, progress = now();
    }
    for (began = now(); now() - began < 100000000;) wait_for(20, 0); /* whatever comes twice */
    qsort(latencies, samples, sizeof *latencies, by_size);
    double seconds = (measured_to - measured_from) / 1e9;
    double off = expected && counted == expected && !gathered ? fabs(sum_seen - sum_sent) / fabs(sum_sent) : 0;
    printf("{\"rate\": %.3f, \"seconds\": %.6f, \"sent\": %lld, \"expected\": %lld, \"counted\": %lld, \"answers\": %lld, "
           "\"off\": %.3g, \"samples\": %zu, \"p50\": %.7f, \"p99\": %.7f, \"worst\": %.7f}\n",
           measured_from ? answers / seconds : 0.0, seconds, sent, expected, counted, answers, off, samples, percentile(0.5),
           percentile(0.99), percentile(1));
    return 0;
}
