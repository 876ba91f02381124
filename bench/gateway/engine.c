/* A stand-in for vLLM that costs next to nothing: one thread, epoll, keep-alive.
 *
 *     engine PORT [reset]
 *
 * A chat completion is answered at once, or as a stream of 64 chunks, one every 20 ms, each with
 * the time at which it was written. Words in the prompt ask for more: "[wait MS]" before the answer
 * begins, "[tell ID]" prints `got ID NS`, then `closed ID NS` where the client left too early; with
 * `reset` such requests get a TCP reset once they are read, and `reset ID NS` is printed.
 */
#include "wire.h"

#define CHUNKS 64
#define EVERY 20000000LL
#define KEPT 4096 /* bytes of a request that are looked at, beside its length */
#define MOST 65536

static const char WHOLE[] =
    "{\"id\":\"chatcmpl-7f3a9c52d1e84b06\",\"object\":\"chat.completion\",\"created\":1760000000,"
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
    "\"A queue holds what has arrived and not yet been served; its length tells how late you are, "
    "and its growth tells how late you are going to be.\",\"refusal\":null,\"tool_calls\":[]},"
    "\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":42,"
    "\"total_tokens\":74,\"completion_tokens\":32,\"prompt_tokens_details\":null}}";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1760000000,"
    "\"owned_by\":\"vllm\",\"max_model_len\":1048576}]}";
static const char METRICS[] =
    "vllm:num_requests_running{model_name=\"bench\"} 0.0\n"
    "vllm:num_requests_waiting{model_name=\"bench\"} 0.0\n"
    "vllm:generation_tokens_total{model_name=\"bench\"} 0.0\n";

typedef struct {
    char kept[KEPT + 1];
    size_t seen, head, length; /* bytes seen, of the head, of the whole request */
    int open, busy, stream, sent;
    unsigned turn; /* timers of an earlier turn are stale */
    char id[32];
} Peer;

typedef struct {
    int64_t due;
    int fd;
    unsigned turn;
} Timer;

static Peer *peers[MOST];
static Timer *heap;
static size_t timers, room;
static int resets;

static void later(int64_t due, int fd) {
    if (timers == room) heap = grown(heap, (room = room ? 2 * room : 1024) * sizeof *heap);
    size_t at = timers++;
    for (; at && heap[(at - 1) / 2].due > due; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = (Timer){due, fd, peers[fd]->turn};
}

static Timer earliest(void) {
    Timer top = heap[0], last = heap[--timers];
    size_t at = 0, below;
    while ((below = 2 * at + 1) < timers) {
        if (below + 1 < timers && heap[below + 1].due < heap[below].due) below++;
        if (heap[below].due >= last.due) break;
        heap[at] = heap[below];
        at = below;
    }
    heap[at] = last;
    return top;
}

static void tell(const char *what, Peer *peer) {
    char line[96];
    if (!peer->id[0]) return;
    int n = snprintf(line, sizeof line, "%s %s %lld\n", what, peer->id, (long long)now_ns());
    if (write(1, line, n) != n) exit(1); /* who started us is gone */
}

static void hang_up(int fd) {
    Peer *peer = peers[fd];
    if (peer->busy) tell("closed", peer);
    peer->open = peer->busy = 0;
    peer->turn++;
    close(fd);
}

static void say(int fd, const char *bytes, size_t n) {
    if (send(fd, bytes, n, MSG_NOSIGNAL) != (ssize_t)n) hang_up(fd);
}

static void answered(Peer *peer) {
    peer->seen = peer->length = peer->head = 0;
    peer->busy = peer->stream = peer->sent = 0;
    peer->id[0] = 0;
    peer->turn++;
}

static void whole(int fd, const char *type, const char *body) {
    char out[4096];
    int n = snprintf(out, sizeof out,
                     "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n%s",
                     type, strlen(body), body);
    answered(peers[fd]);
    say(fd, out, n);
}

static size_t chunk(char *out, const char *event) {
    size_t length = strlen(event), n = sprintf(out, "%zx\r\n", length);
    memcpy(out + n, event, length);
    memcpy(out + n + length, "\r\n", 2);
    char *mark = memchr(out + n, '@', length);
    if (mark) {
        int64_t ns = now_ns();
        for (int digit = STAMP; digit; digit--, ns /= 10) mark[digit] = '0' + ns % 10;
    }
    return n + length + 2;
}

static void tick(int fd, int64_t now) {
    Peer *peer = peers[fd];
    char out[4096];
    if (!peer->stream) {
        whole(fd, "application/json", WHOLE);
        return;
    }
    size_t n = chunk(out, peer->sent ? NEXT_EVENT : FIRST_EVENT);
    if (++peer->sent < CHUNKS) {
        later(now + EVERY, fd);
    } else {
        n += chunk(out + n, STOP_EVENT);
        n += chunk(out + n, USAGE_EVENT);
        n += chunk(out + n, DONE_EVENT);
        n += sprintf(out + n, "0\r\n\r\n");
        answered(peer);
    }
    say(fd, out, n);
}

static int64_t asked_wait(const char *body) {
    const char *word = strstr(body, "[wait ");
    return word ? atoll(word + 6) * 1000000LL : 0;
}

static void reset(int fd) {
    struct linger now = {1, 0};
    tell("reset", peers[fd]);
    peers[fd]->busy = 0;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    hang_up(fd);
}

static void answer(int fd) {
    static const char STREAM[] =
        "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        "transfer-encoding: chunked\r\n\r\n";
    Peer *peer = peers[fd];
    char *body = peer->kept + peer->head;
    if (!strncmp(peer->kept, "GET ", 4)) {
        if (!strncmp(peer->kept + 4, "/metrics", 8)) whole(fd, "text/plain", METRICS);
        else whole(fd, "application/json", strncmp(peer->kept + 4, "/v1", 3) ? "{}" : MODELS);
        return;
    }
    peer->busy = 1;
    peer->stream = strstr(body, "\"stream\":true") || strstr(body, "\"stream\": true");
    const char *word = strstr(body, "[tell ");
    if (word) sscanf(word + 6, "%31[^]]", peer->id);
    tell("got", peer);
    if (resets && word) {
        reset(fd);
        return;
    }
    int64_t wait = asked_wait(body), now = now_ns();
    if (peer->stream) say(fd, STREAM, sizeof STREAM - 1);
    if (!peer->open) return;
    if (peer->stream || wait) later(now + (wait ? wait : EVERY), fd);
    else whole(fd, "application/json", WHOLE);
}

/* The length of the request once its head is there, else 0. */
static void measure(Peer *peer) {
    char *end = strstr(peer->kept, "\r\n\r\n");
    if (!end) return;
    char *field = strcasestr(peer->kept, "\r\ncontent-length:");
    peer->head = end + 4 - peer->kept;
    peer->length = peer->head + (field && field < end ? strtoull(field + 17, NULL, 10) : 0);
}

static void readable(int fd) {
    static char scratch[1 << 18];
    Peer *peer = peers[fd];
    ssize_t n = recv(fd, scratch, sizeof scratch, 0);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) hang_up(fd);
        return;
    }
    if (peer->seen < KEPT) {
        size_t kept = (size_t)n < KEPT - peer->seen ? (size_t)n : KEPT - peer->seen;
        memcpy(peer->kept + peer->seen, scratch, kept);
        peer->kept[peer->seen + kept] = 0;
    }
    peer->seen += n;
    if (!peer->length) measure(peer);
    if (peer->length && peer->seen >= peer->length && !peer->busy) answer(fd);
}

static void arrived(int listener, int poll) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MOST) exit(1);
        unsigned turn = peers[fd] ? peers[fd]->turn + 1 : 0;
        if (!peers[fd]) peers[fd] = grown(NULL, sizeof(Peer));
        *peers[fd] = (Peer){.open = 1, .turn = turn};
        no_delay(fd);
        struct epoll_event event = {EPOLLIN | EPOLLRDHUP, {.fd = fd}};
        epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
    }
}

static int listening(int port) {
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in at = loopback(port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) die("listen");
    return fd;
}

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    every_limit();
    resets = argc > 2 && !strcmp(argv[2], "reset");
    int poll = epoll_create1(0), listener = listening(atoi(argv[1]));
    struct epoll_event event = {EPOLLIN, {.fd = listener}}, events[256];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int64_t left = timers ? heap[0].due - now_ns() : -1;
        if (timers && left < 0) left = 0;
        struct timespec wait = {left / 1000000000, left % 1000000000};
        int ready = epoll_pwait2(poll, events, 256, timers ? &wait : NULL, NULL);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) arrived(listener, poll);
            else if (peers[fd]->open) readable(fd);
        }
        for (int64_t now = now_ns(); timers && heap[0].due <= now;) {
            Timer due = earliest();
            if (peers[due.fd]->open && peers[due.fd]->turn == due.turn) tick(due.fd, now);
        }
    }
}
