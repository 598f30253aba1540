/* The benchmarks' work as a C program: what the path through two hops allows. Plain socket, MQTT 3.1.1, no library.
 *
 *     program port=1883 work=telemetry qos=0
 *
 * work=telemetry: readings of farm/+/reading from °C to °F; those out of -40 … 185 °F are left out; those above 104 °F are
 *   published to farm/out at once; count and mean of each device and second (by the readings' own time) to farm/<device>/mean.
 * work=relay: each reading, with °F for °C, to farm/out: one message in, one message out.
 * work=gathered: all readings that one read of the socket brought, as one message.
 *
 * Everything that has arrived is read at once, and what that leads to is written at once. */
#define _GNU_SOURCE
#include <arpa/inet.h>
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

enum { IN = 1 << 18, OUT = 1 << 20, TABLE = 4096, NAME = 64 };

typedef struct {
    char name[NAME];
    long long second; /* the window that is open */
    long n;
    double sum;
} Device;

typedef struct {
    const char *device;
    int device_length;
    double temperature, humidity;
    long long ts, seq;
} Reading;

static Device devices[TABLE];
static int used[TABLE], n_used; /* in the order they came */
static unsigned char in[IN], out[OUT];
static size_t in_to, out_to;
static int fd, qos, relay, gathered;
static long long newest; /* second */
static uint16_t identifier;

/* Numbers as sensors send them are short: the exact quotient of two whole numbers, else strtod. */
static double number(const char **at, const char *end) {
    static const double tens[] = {1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    const char *p = *at;
    int minus = p < end && *p == '-', digits = 0, after = 0;
    long long value = 0;
    for (p += minus; p < end && *p >= '0' && *p <= '9'; p++, digits++) value = value * 10 + (*p - '0');
    if (p < end && *p == '.')
        for (p++; p < end && *p >= '0' && *p <= '9'; p++, digits++, after++) value = value * 10 + (*p - '0');
    if (digits > 15 || (p < end && (*p == 'e' || *p == 'E'))) {
        char text[64];
        size_t n = (size_t)(end - *at) < sizeof text - 1 ? (size_t)(end - *at) : sizeof text - 1;
        char *stop;
        memcpy(text, *at, n), text[n] = 0;
        double slow = strtod(text, &stop);
        *at += stop - text;
        return slow;
    }
    *at = p;
    return (minus ? -value : value) / tens[after];
}

/* A flat JSON object, keys in any order, unknown ones skipped. Returns 0 if it is none. */
static int parse(const char *p, const char *end, Reading *r) {
    memset(r, 0, sizeof *r);
    while (p < end && *p != '{') p++;
    while (p < end && *p != '}') {
        const char *key = memchr(p, '"', end - p);
        if (!key++) return 0;
        const char *stop = memchr(key, '"', end - key);
        if (!stop || !(p = memchr(stop, ':', end - stop))) return 0;
        int length = stop - key;
        for (p++; p < end && *p == ' ';) p++;
        if (p < end && *p == '"') {
            const char *text = ++p;
            if (!(p = memchr(p, '"', end - p))) return 0;
            if (length == 6 && !memcmp(key, "device", 6)) r->device = text, r->device_length = p - text;
            p++;
        } else {
            const char *was = p;
            double value = number(&p, end);
            if (p == was) return 0;
            if (length == 11 && !memcmp(key, "temperature", 11)) r->temperature = value;
            else if (length == 8 && !memcmp(key, "humidity", 8)) r->humidity = value;
            else if (length == 2 && !memcmp(key, "ts", 2)) r->ts = (long long)value;
            else if (length == 3 && !memcmp(key, "seq", 3)) r->seq = (long long)value;
        }
        while (p < end && (*p == ',' || *p == ' ')) p++;
    }
    return r->device && r->device_length < NAME;
}

static void flush(void) {
    size_t from = 0;
    while (from < out_to) {
        ssize_t n = send(fd, out + from, out_to - from, MSG_NOSIGNAL);
        if (n < 0) perror("send"), exit(1);
        from += n;
    }
    out_to = 0;
}

static void publish(const char *topic, int t, const char *body, int b) {
    if (out_to + t + b + 16 > OUT) flush();
    unsigned char *o = out + out_to;
    int rest = 2 + t + (qos ? 2 : 0) + b;
    *o++ = 0x30 | qos << 1;
    for (; rest > 127; rest >>= 7) *o++ = (rest & 127) | 128;
    *o++ = rest;
    *o++ = t >> 8, *o++ = t & 255;
    memcpy(o, topic, t), o += t;
    if (qos) {
        if (!++identifier) identifier = 1;
        *o++ = identifier >> 8, *o++ = identifier & 255;
    }
    memcpy(o, body, b);
    out_to = o + b - out;
}

static int whole(char *o, long long value) {
    char text[24];
    int n = 0, k = 0;
    if (value < 0) o[k++] = '-', value = -value;
    do text[n++] = '0' + value % 10;
    while (value /= 10);
    while (n) o[k++] = text[--n];
    return k;
}

/* The digits that a sensor's tenths times 1.8 have; more where there are more. */
static int decimal(char *o, double value) {
    double scaled = value * 100;
    long long near = (long long)(scaled + (scaled < 0 ? -0.5 : 0.5));
    if (scaled - near > 1e-6 || near - scaled > 1e-6) return sprintf(o, "%.17g", value);
    int n = 0;
    if (near < 0) o[n++] = '-', near = -near;
    n += whole(o + n, near / 100);
    o[n++] = '.', o[n++] = '0' + near / 10 % 10, o[n++] = '0' + near % 10;
    return n;
}

#define TEXT(s) memcpy(o, s, sizeof s - 1), o += sizeof s - 1
static int reading(char *o, const Reading *r, double fahrenheit) {
    char *from = o;
    TEXT("{\"device\":\"");
    memcpy(o, r->device, r->device_length), o += r->device_length;
    TEXT("\",\"temperature\":");
    o += decimal(o, fahrenheit);
    TEXT(",\"humidity\":");
    o += decimal(o, r->humidity);
    TEXT(",\"ts\":");
    o += whole(o, r->ts);
    TEXT(",\"seq\":");
    o += whole(o, r->seq);
    *o++ = '}';
    return o - from;
}

static void answer(Device *d) {
    char topic[NAME + 16], body[NAME + 160];
    int t = sprintf(topic, "farm/%s/mean", d->name);
    int b = sprintf(body, "{\"device\":\"%s\",\"start\":%lld,\"n\":%ld,\"mean\":%.17g}", d->name, d->second, d->n, d->sum / d->n);
    publish(topic, t, body, b);
    d->n = 0, d->sum = 0;
}

/* Windows of seconds before this one. */
static void close_windows(long long second) {
    for (int i = 0; i < n_used; i++) {
        Device *d = &devices[used[i]];
        if (d->n && d->second < second) answer(d);
    }
    newest = second;
}

static Device *device(const char *name, int length) {
    uint32_t h = 2166136261u;
    for (int i = 0; i < length; i++) h = (h ^ (unsigned char)name[i]) * 16777619u;
    for (int i = h % TABLE, tried = 0; tried < TABLE; i = (i + 1) % TABLE, tried++) {
        Device *d = &devices[i];
        if (!d->name[0]) {
            memcpy(d->name, name, length);
            used[n_used++] = i;
            return d;
        }
        if (!memcmp(d->name, name, length) && !d->name[length]) return d;
    }
    fprintf(stderr, "too many devices\n"), exit(1);
}

static char batch[OUT / 2];
static int batch_to, batch_n;

static void handle(const char *body, size_t n) {
    Reading r;
    char text[NAME + 256];
    if (!parse(body, body + n, &r)) return;
    double f = r.temperature * 1.8 + 32;
    if (gathered) {
        if (batch_n++) batch[batch_to++] = ',';
        batch_to += reading(batch + batch_to, &r, f);
        return;
    }
    if (relay) {
        publish("farm/out", 8, text, reading(text, &r, f));
        return;
    }
    if (f < -40 || f > 185) return;
    if (f > 104) publish("farm/out", 8, text, reading(text, &r, f));
    long long second = r.ts / 1000;
    if (second > newest) close_windows(second);
    Device *d = device(r.device, r.device_length);
    d->second = second, d->n++, d->sum += f;
}

static void packets(void) {
    unsigned char *p = in, *end = in + in_to;
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
            int id = -1;
            if (*p & 6) id = b[at] << 8 | b[at + 1], at += 2;
            handle((char *)b + at, length - at);
            if (id >= 0) { /* taken over: it is in a window, or on its way */
                if (out_to + 4 > OUT) flush();
                unsigned char *o = out + out_to;
                o[0] = 0x40, o[1] = 2, o[2] = id >> 8, o[3] = id & 255;
                out_to += 4;
            }
        }
        p = b + length;
    }
    memmove(in, p, in_to = end - p);
    if (batch_n) {
        static char body[OUT / 2 + 64];
        int b = sprintf(body, "{\"n\":%d,\"readings\":[", batch_n);
        memcpy(body + b, batch, batch_to), b += batch_to;
        body[b++] = ']', body[b++] = '}';
        publish("farm/out", 8, body, b);
        batch_n = batch_to = 0;
    }
}

int main(int argc, char **argv) {
    int port = 1883, one = 1;
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "port=", 5)) port = atoi(argv[i] + 5);
        else if (!strncmp(argv[i], "qos=", 4)) qos = atoi(argv[i] + 4);
        else if (!strcmp(argv[i], "work=relay")) relay = 1;
        else if (!strcmp(argv[i], "work=gathered")) gathered = 1;
    }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&to, sizeof to)) return perror("connect"), 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    unsigned char hello[] = {0x10, 19, 0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 0, 0, 7, 'p', 'r', 'o', 'g', 'r', 'a', 'm'};
    unsigned char ask[] = {0x82, 19, 0, 1, 0, 14, 'f', 'a', 'r', 'm', '/', '+', '/', 'r', 'e', 'a', 'd', 'i', 'n', 'g', qos};
    unsigned char answer_[5];
    if (send(fd, hello, sizeof hello, 0) < 0 || recv(fd, answer_, 4, MSG_WAITALL) != 4 || answer_[3]) return 1;
    if (send(fd, ask, sizeof ask, 0) < 0 || recv(fd, answer_, 5, MSG_WAITALL) != 5 || answer_[4] & 128) return 1;
    for (;;) {
        struct pollfd in_ = {fd, POLLIN, 0};
        struct timespec clock;
        if (!relay && !gathered && !poll(&in_, 1, 1000)) { /* silence: windows end by the clock */
            clock_gettime(CLOCK_REALTIME, &clock);
            if (clock.tv_sec > newest + 1) close_windows(clock.tv_sec), flush();
            continue;
        }
        ssize_t n = recv(fd, in + in_to, IN - in_to, 0);
        if (n <= 0) return 0;
        in_to += n;
        packets();
        flush();
    }
}
