/* What the stand-in engine and the load generator both know: the clock and the bytes of a stream. */
#ifndef WIRE_H
#define WIRE_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STAMP 18 /* digits of CLOCK_MONOTONIC in nanoseconds, after an '@' */

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline void *grown(void *memory, size_t bytes) {
    void *more = realloc(memory, bytes);
    if (!more) die("realloc");
    return more;
}

#define HEAD_OF_EVENT                                                                      \
    "data: {\"id\":\"chatcmpl-7f3a9c52d1e84b06\",\"object\":\"chat.completion.chunk\","    \
    "\"created\":1760000000,\"model\":\"bench\",\"choices\":["
#define CONTENT(delta) HEAD_OF_EVENT "{\"index\":0,\"delta\":{" delta "\"content\":\"@"    \
    "##################\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n"

static const char FIRST_EVENT[] = CONTENT("\"role\":\"assistant\",");
static const char NEXT_EVENT[] = CONTENT("");
static const char STOP_EVENT[] = HEAD_OF_EVENT
    "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}]}\n\n";
static const char USAGE_EVENT[] = HEAD_OF_EVENT
    "],\"usage\":{\"prompt_tokens\":42,\"total_tokens\":106,\"completion_tokens\":64}}\n\n";
static const char DONE_EVENT[] = "data: [DONE]\n\n";

static inline void every_limit(void) {
    struct rlimit files = {65536, 65536};
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
}

static inline void no_delay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static inline struct sockaddr_in loopback(int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return at;
}

#endif
