/* Load for an MQTT broker: publishers and subscribers on raw sockets in one thread, packets written whole buffers at a time.
 *
 *     cc -O2 -o broker_load broker_load.c
 *     ./broker_load HOST PORT key=value ...
 *
 *   version=5 (or 4 for 3.1.1)   qos=0      payload=64    count=100000 (messages of all publishers together)
 *   publishers=1  subscribers=1 (each gets everything)    topics=1 (of each publisher, in turn)
 *   window=1000   messages that may be on their way: published, and not yet at every subscriber
 *   kept=0        1: the subscribers' sessions are to outlive their connections (they end with the run; MQTT 5)
 *   vary=0        payloads differ in length by up to that many bytes, as readings do
 *
 * Prints one line of JSON: {"seconds": ..., "published": ..., "received": ..., "cpu": seconds of this process}. Nothing is lost when it
 * ends well; when nothing moves for ten seconds it ends with code 1.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, ROOM = 1 << 20 };

typedef struct {
    int fd;
    unsigned char *in, *out;
    size_t in_at, in_end, in_room, out_at, out_end, out_room;
    size_t skip;           /* bytes of a packet that is being received and has been counted */
    long received;         /* PUBLISH packets */
    long unanswered;       /* publications with QoS 1 */
    long sent;
    unsigned next_id;
} Client;

static int version = 5, qos = 0, payload = 64, publishers = 1, subscribers = 1, topics = 1, kept = 0, vary = 0;
static long count = 100000, window = 1000;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static unsigned char *put_length(unsigned char *at, size_t n) {
    do {
        unsigned char byte = n & 0x7F;
        n >>= 7;
        *at++ = byte | (n ? 0x80 : 0);
    } while (n);
    return at;
}

static unsigned char *put_text(unsigned char *at, const char *text) {
    size_t n = strlen(text);
    *at++ = n >> 8;
    *at++ = n & 0xFF;
    memcpy(at, text, n);
    return at + n;
}

static void write_all(int fd, const unsigned char *data, size_t n) {
    while (n) {
        ssize_t done = write(fd, data, n);
        if (done < 0) die("write");
        data += done;
        n -= done;
    }
}

static void read_packet(int fd, unsigned char kind) {
    unsigned char head[2], body[256];
    if (recv(fd, head, 2, MSG_WAITALL) != 2 || head[0] >> 4 != kind || head[1] > 127) {
        fprintf(stderr, "the broker answered 0x%02X\n", head[0]);
        exit(1);
    }
    if (recv(fd, body, head[1], MSG_WAITALL) != head[1]) die("read");
    /* CONNACK: flags, code, ...; SUBACK: the code is the last byte */
    unsigned char code = kind == 2 ? body[1] : body[head[1] - 1];
    if (code >= 0x80 || (kind == 2 && code)) {
        fprintf(stderr, "refused with 0x%02X\n", code);
        exit(1);
    }
}

static void client_open(Client *c, const char *host, int port, const char *id, int keeps) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &to.sin_addr);
    memset(c, 0, sizeof *c);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to)) die("connect");
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    unsigned char body[256], packet[300], *at = put_text(body, "MQTT");
    *at++ = version;
    *at++ = keeps ? 0 : 2;
    *at++ = 0;
    *at++ = 0;
    if (version == 5) {
        static const unsigned char expires[] = {5, 0x11, 0, 0, 0x0E, 0x10};
        if (keeps) {
            memcpy(at, expires, sizeof expires);
            at += sizeof expires;
        } else {
            *at++ = 0;
        }
    }
    at = put_text(at, id);
    packet[0] = 0x10;
    unsigned char *end = put_length(packet + 1, at - body);
    memcpy(end, body, at - body);
    write_all(c->fd, packet, end - packet + (at - body));
    read_packet(c->fd, 2);
    c->in_room = c->out_room = ROOM;
    c->in = malloc(c->in_room);
    c->out = malloc(c->out_room);
    c->next_id = 1;
}

static void subscribe(Client *c) {
    unsigned char body[64], packet[70], *at = body;
    *at++ = 0;
    *at++ = 1;
    if (version == 5) *at++ = 0;
    at = put_text(at, "load/#");
    *at++ = qos;
    packet[0] = 0x82;
    packet[1] = at - body;
    memcpy(packet + 2, body, at - body);
    write_all(c->fd, packet, 2 + (at - body));
    read_packet(c->fd, 9);
}

/* Appends PUBLISH packets while the window and the buffer have room. */
static void fill(Client *c, int who, long may, const unsigned char *bytes) {
    char topic[64];
    if (c->out_at == c->out_end) c->out_at = c->out_end = 0;
    size_t most = (size_t)payload + vary + 128;
    for (; may > 0 && (!qos || c->unanswered < 1000) && c->out_room - c->out_end > most && c->out_end < 65536 + most; may--) {
        int size = payload + (vary ? (int)(c->sent * 7 % (vary + 1)) : 0);
        int n = sprintf(topic, "load/%d/%ld/reading", who, c->sent % topics);
        size_t rest = 2 + n + (qos ? 2 : 0) + (version == 5) + size;
        unsigned char *at = c->out + c->out_end;
        *at++ = 0x30 | qos << 1;
        at = put_length(at, rest);
        at = put_text(at, topic);
        if (qos) {
            *at++ = c->next_id >> 8;
            *at++ = c->next_id & 0xFF;
            c->next_id = c->next_id % 65535 + 1;
            c->unanswered++;
        }
        if (version == 5) *at++ = 0;
        memcpy(at, bytes, size);
        c->out_end = at + size - c->out;
        c->sent++;
    }
}

/* Reads once; counts PUBLISH packets, answers those of QoS 1, counts PUBACK. */
static int take(Client *c) {
    ssize_t got = read(c->fd, c->in + c->in_end, c->in_room - c->in_end);
    if (got <= 0) {
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
        fprintf(stderr, "the broker closed a connection\n");
        exit(1);
    }
    c->in_end += got;
    for (;;) {
        size_t have = c->in_end - c->in_at;
        if (c->skip) {
            size_t part = have < c->skip ? have : c->skip;
            c->in_at += part;
            c->skip -= part;
            if (c->skip) break;
            c->received++;
            continue;
        }
        unsigned char *p = c->in + c->in_at;
        size_t length = 0, n = 1;
        int shift = 0, whole = 0;
        for (; n < have && n < 5; shift += 7) {
            length |= (size_t)(p[n] & 0x7F) << shift;
            if (p[n++] < 0x80) {
                whole = 1;
                break;
            }
        }
        if (!whole) break;
        unsigned char kind = p[0] >> 4;
        if (kind == 3) {
            if (have < n + 2) break;
            size_t name = p[n] << 8 | p[n + 1];
            if (p[0] & 6) {
                if (have < n + 4 + name) break;
                if (c->out_room - c->out_end < 4) {
                    if (!c->out_at) break; /* the answers do not leave; it is taken up when they do */
                    memmove(c->out, c->out + c->out_at, c->out_end - c->out_at);
                    c->out_end -= c->out_at;
                    c->out_at = 0;
                }
                unsigned char *ack = c->out + c->out_end;
                ack[0] = 0x40;
                ack[1] = 2;
                ack[2] = p[n + 2 + name];
                ack[3] = p[n + 3 + name];
                c->out_end += 4;
            }
            c->skip = n + length;
            continue;
        }
        if (have < n + length) break;
        if (kind == 4) {
            if (length > 2 && p[n + 2] >= 0x80) {
                fprintf(stderr, "a publication was refused with 0x%02X\n", p[n + 2]);
                exit(1);
            }
            c->unanswered--;
        } else if (kind == 14) {
            fprintf(stderr, "the broker disconnects\n");
            exit(1);
        }
        c->in_at += n + length;
    }
    if (c->in_at == c->in_end) {
        c->in_at = c->in_end = 0;
    } else if (c->in_at > c->in_room / 2) {
        memmove(c->in, c->in + c->in_at, c->in_end - c->in_at);
        c->in_end -= c->in_at;
        c->in_at = 0;
    }
    return 1;
}

static void give(Client *c) {
    if (c->out_at == c->out_end) return;
    ssize_t done = write(c->fd, c->out + c->out_at, c->out_end - c->out_at);
    if (done >= 0) c->out_at += done;
    else if (errno != EAGAIN && errno != EINTR) die("write");
}

int main(int argc, char **argv) {
    struct { const char *name; int *number; long *big; } options[] = {
        {"version", &version, 0}, {"qos", &qos, 0}, {"payload", &payload, 0}, {"publishers", &publishers, 0},
        {"subscribers", &subscribers, 0}, {"topics", &topics, 0}, {"kept", &kept, 0}, {"vary", &vary, 0},
        {"count", 0, &count}, {"window", 0, &window},
    };
    if (argc < 3) {
        fprintf(stderr, "usage: broker_load HOST PORT key=value ...\n");
        return 2;
    }
    for (int i = 3; i < argc; i++) {
        int found = 0;
        for (size_t o = 0; o < sizeof options / sizeof *options; o++) {
            size_t n = strlen(options[o].name);
            if (strncmp(argv[i], options[o].name, n) || argv[i][n] != '=') continue;
            found = 1;
            if (options[o].number) *options[o].number = atoi(argv[i] + n + 1);
            else *options[o].big = atol(argv[i] + n + 1);
        }
        if (!found) {
            fprintf(stderr, "unknown: %s\n", argv[i]);
            return 2;
        }
    }
    if (publishers < 1 || subscribers < 1 || publishers + subscribers > MOST || payload + vary > ROOM / 2) {
        fprintf(stderr, "too much or too little of something\n");
        return 2;
    }
    static Client clients[MOST];
    static struct pollfd polls[MOST];
    int all = publishers + subscribers;
    char id[64];
    for (int i = 0; i < all; i++) {
        int subscribes = i >= publishers;
        snprintf(id, sizeof id, "load-%d-%d", (int)getpid(), i);
        client_open(&clients[i], argv[1], atoi(argv[2]), id, kept && subscribes);
        if (subscribes) subscribe(&clients[i]);
        fcntl(clients[i].fd, F_SETFL, O_NONBLOCK);
        polls[i].fd = clients[i].fd;
    }
    unsigned char *bytes = malloc(payload + vary + 1);
    for (int i = 0; i < payload + vary; i++) bytes[i] = 'a' + i % 26;
    double began = now(), moved = began, ended;
    for (;;) {
        long published = 0, least = count, answered = 1;
        for (int i = 0; i < publishers; i++) published += clients[i].sent;
        for (int i = publishers; i < all; i++)
            if (clients[i].received < least) least = clients[i].received;
        for (int i = 0; i < publishers; i++) answered &= !clients[i].unanswered;
        ended = now();
        if (least >= count && published >= count && answered) break;
        if (ended - moved > 10) {
            fprintf(stderr, "stuck: %ld published, %ld at every subscriber\n", published, least);
            return 1;
        }
        for (int i = 0; i < all; i++) {
            Client *c = &clients[i];
            if (i < publishers) {
                long may = window - (published - least), left = count - published;
                if (publishers > 1) may = (may + publishers - 1) / publishers;
                may = may < left ? may : left;
                if (may > 0 && c->out_end - c->out_at < 32768) {
                    long before = c->sent;
                    fill(c, i, may, bytes);
                    published += c->sent - before;
                }
            } else if (c->out_at == c->out_end) {
                c->out_at = c->out_end = 0;
            }
            polls[i].events = POLLIN;
            give(c);
            if (c->out_at != c->out_end) polls[i].events |= POLLOUT;
        }
        if (poll(polls, all, 1000) < 0 && errno != EINTR) die("poll");
        for (int i = 0; i < all; i++)
            if (polls[i].revents & ~POLLOUT && take(&clients[i])) moved = ended;
    }
    for (int i = publishers; i < all; i++)
        if (clients[i].received > count) {
            fprintf(stderr, "%ld messages came twice\n", clients[i].received - count);
            return 1;
        }
    if (kept && version == 5) { /* DISCONNECT with session expiry 0: what is kept ends here, and gets nothing of later runs */
        static const unsigned char leave[] = {0xE0, 7, 0, 5, 0x11, 0, 0, 0, 0};
        for (int i = publishers; i < all; i++) {
            fcntl(clients[i].fd, F_SETFL, 0);
            write_all(clients[i].fd, leave, sizeof leave);
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"seconds\": %.6f, \"published\": %ld, \"received\": %ld, \"cpu\": %.3f}\n", ended - began, count,
           count * subscribers, cpu);
    return 0;
}
