/* The clients: as many at once as asked, each sending the same request again and again.
 *
 *     load PORT KEY FILE CLIENTS SECONDS STAGGER_MS
 *
 * FILE holds the request's body; a stream is compared, byte by byte, with what the engine sends.
 * Prints one JSON object; times in microseconds. Clients begin spread over STAGGER_MS.
 */
#include "wire.h"

#define HEAD_ROOM 16384
#define ANY '#' /* in what is expected: any digit */

enum { HEAD, FIXED, SIZE, DATA, DATA_END, TRAILER, TO_CLOSE, OVER };

typedef struct {
    int fd, state, status, active, digits, first, stream, wrong;
    size_t sent, headed, line, at, left;
    int64_t began, stamp;
    char head[HEAD_ROOM], tail[16];
} Client;

typedef struct {
    uint32_t *values;
    size_t n, room;
} Times;

static struct sockaddr_in target;
static int poll_fd;
static char *request, *expected;
static size_t request_bytes, expected_bytes;
static int64_t stop_at, ended_at;
static long good, failed, differing, chunks, statuses[600];
static Times whole, first, path, every;

static void note(Times *times, int64_t ns) {
    if (times->n == times->room) {
        times->room = times->room ? 2 * times->room : 4096;
        times->values = grown(times->values, times->room * sizeof *times->values);
    }
    times->values[times->n++] = ns < 0 ? 0 : (ns > 4000000000000LL ? 4000000000U : ns / 1000);
}

static void watch(Client *client, int how, uint32_t events) {
    struct epoll_event event = {events, {.ptr = client}};
    epoll_ctl(poll_fd, how, client->fd, &event);
}

static void dial(Client *client) {
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (client->fd < 0) die("socket");
    no_delay(client->fd);
    if (connect(client->fd, (struct sockaddr *)&target, sizeof target) && errno != EINPROGRESS)
        die("connect");
    watch(client, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static void push(Client *client) {
    ssize_t n = send(client->fd, request + client->sent, request_bytes - client->sent, MSG_NOSIGNAL);
    if (n > 0) client->sent += n;
    else if (errno != EAGAIN && errno != ENOTCONN) return; /* the read that follows tells */
    watch(client, EPOLL_CTL_MOD, client->sent < request_bytes ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

static void start(Client *client) {
    client->active = 1;
    client->state = HEAD;
    client->sent = client->headed = client->line = client->at = client->left = 0;
    client->status = client->digits = client->first = client->stream = client->wrong = 0;
    memset(client->tail, 0, sizeof client->tail);
    client->began = now_ns();
    if (client->fd < 0) {
        dial(client);
        return;
    }
    ssize_t n = send(client->fd, request, request_bytes, MSG_NOSIGNAL);
    client->sent = n > 0 ? n : 0;
    if (client->sent < request_bytes) watch(client, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

static void hang_up(Client *client) {
    if (client->fd >= 0) close(client->fd);
    client->fd = -1;
}

static int finished_well(const Client *client) {
    if (client->status != 200 || client->state != OVER) return 0;
    return !client->stream || !memcmp(client->tail + 2, DONE_EVENT, sizeof DONE_EVENT - 1);
}

static void finish(Client *client, int keep) {
    int64_t now = now_ns();
    if (client->status > 0 && client->status < 600) statuses[client->status]++;
    if (finished_well(client)) {
        good++;
        note(&whole, now - client->began);
        if (client->stream && (client->wrong || client->at != expected_bytes)) differing++;
    } else {
        failed++;
        keep = 0;
    }
    if (!keep) hang_up(client);
    client->active = 0;
    ended_at = now;
    if (now < stop_at) start(client);
}

static void stamped(Client *client, int64_t now) {
    chunks++;
    note(&every, now - client->stamp);
    if (client->first++) return;
    note(&first, now - client->began);
    note(&path, now - client->stamp);
}

static void body(Client *client, const char *bytes, size_t n, int64_t now) {
    if (!client->stream) return;
    for (size_t i = 0; i < n; i++) {
        char byte = bytes[i], want = client->at < expected_bytes ? expected[client->at] : 0;
        if (byte != want && !(want == ANY && byte >= '0' && byte <= '9')) client->wrong = 1;
        client->at++;
        if (byte == '@') {
            client->digits = STAMP;
            client->stamp = 0;
        } else if (client->digits) {
            client->stamp = 10 * client->stamp + byte - '0';
            if (!--client->digits) stamped(client, now);
        }
    }
    size_t kept = n < sizeof client->tail ? n : sizeof client->tail;
    memmove(client->tail, client->tail + kept, sizeof client->tail - kept);
    memcpy(client->tail + sizeof client->tail - kept, bytes + n - kept, kept);
}

/* What the head says of the body that follows. */
static void headed(Client *client) {
    char *head = client->head, *field;
    head[client->headed] = 0;
    client->status = atoi(head + 9);
    client->stream = strcasestr(head, "text/event-stream") != NULL;
    if ((field = strcasestr(head, "\r\ncontent-length:"))) {
        client->left = strtoull(field + 17, NULL, 10);
        client->state = client->left ? FIXED : OVER;
    } else {
        client->state = strcasestr(head, "chunked") ? SIZE : TO_CLOSE;
    }
}

static size_t line(Client *client, const char *bytes, size_t n) {
    const char *end = memchr(bytes, '\n', n);
    size_t used = end ? (size_t)(end - bytes) + 1 : n;
    for (size_t i = 0; i < used && client->line < 32; i++) client->head[client->line++] = bytes[i];
    if (!end) return used;
    if (client->state == SIZE) {
        client->left = strtoull(client->head, NULL, 16);
        client->state = client->left ? DATA : TRAILER;
    } else if (client->state == DATA_END) {
        client->state = SIZE;
    } else if (client->head[0] == '\r') {
        client->state = OVER;
    }
    client->line = 0;
    return used;
}

static size_t head(Client *client, const char *bytes, size_t n) {
    size_t used = 0;
    while (used < n && client->state == HEAD && client->headed < HEAD_ROOM - 1) {
        client->head[client->headed++] = bytes[used++];
        if (client->headed > 3 && !memcmp(client->head + client->headed - 4, "\r\n\r\n", 4))
            headed(client);
    }
    return used ? used : n;
}

static size_t some(Client *client, const char *bytes, size_t n, int64_t now) {
    size_t used = client->state == TO_CLOSE || n < client->left ? n : client->left;
    body(client, bytes, used, now);
    if (client->state != TO_CLOSE && !(client->left -= used))
        client->state = client->state == FIXED ? OVER : DATA_END;
    return used;
}

static void feed(Client *client, const char *bytes, size_t n, int64_t now) {
    while (n && client->state != OVER) {
        size_t used;
        if (client->state == HEAD) used = head(client, bytes, n);
        else if (client->state == FIXED || client->state == DATA || client->state == TO_CLOSE)
            used = some(client, bytes, n, now);
        else used = line(client, bytes, n);
        bytes += used;
        n -= used;
    }
}

static void readable(Client *client) {
    static char bytes[1 << 18];
    ssize_t n = recv(client->fd, bytes, sizeof bytes, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (client->state == TO_CLOSE) client->state = OVER;
        if (client->active) finish(client, 0);
        else hang_up(client);
        return;
    }
    if (!client->active) return;
    feed(client, bytes, n, now_ns());
    if (client->state == OVER) finish(client, 1);
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, Times *times) {
    if (!times->n) return;
    qsort(times->values, times->n, sizeof *times->values, ascending);
    printf(", \"%s\": {\"n\": %zu, \"p50\": %u, \"p95\": %u, \"p99\": %u, \"max\": %u}", name, times->n,
           times->values[times->n / 2], times->values[times->n * 95 / 100],
           times->values[times->n * 99 / 100], times->values[times->n - 1]);
}

static void prepare(int port, const char *key, const char *file) {
    FILE *from = fopen(file, "rb");
    if (!from) die(file);
    char *text = grown(NULL, 1 << 25);
    size_t length = fread(text, 1, 1 << 25, from);
    fclose(from);
    request = grown(NULL, length + 1024);
    request_bytes = sprintf(request,
                            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                            "Authorization: Bearer %s\r\nContent-Type: application/json\r\n"
                            "Accept: */*\r\nUser-Agent: load\r\nContent-Length: %zu\r\n\r\n",
                            port, key, length);
    memcpy(request + request_bytes, text, length);
    request_bytes += length;
    free(text);
    expected = grown(NULL, 1 << 16);
    strcpy(expected, FIRST_EVENT);
    for (int i = 1; i < 64; i++) strcat(expected, NEXT_EVENT);
    strcat(strcat(strcat(expected, STOP_EVENT), USAGE_EVENT), DONE_EVENT);
    expected_bytes = strlen(expected);
}

static int any_active(const Client *clients, int n) {
    for (int i = 0; i < n; i++)
        if (clients[i].active) return 1;
    return 0;
}

static void report(double seconds) {
    printf("{\"good\": %ld, \"failed\": %ld, \"differing\": %ld, \"chunks\": %ld, \"seconds\": %.4f",
           good, failed, differing, chunks, seconds);
    print_times("whole", &whole);
    print_times("first", &first);
    print_times("path", &path);
    print_times("every", &every);
    printf(", \"statuses\": {");
    const char *comma = "";
    for (int i = 0; i < 600; i++)
        if (statuses[i]) printf("%s\"%d\": %ld", comma, i, statuses[i]), comma = ", ";
    printf("}}\n");
}

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    every_limit();
    target = loopback(atoi(argv[1]));
    prepare(atoi(argv[1]), argv[2], argv[3]);
    int n = atoi(argv[4]), begun = 0;
    int64_t stagger = atoll(argv[6]) * 1000000, from = now_ns();
    stop_at = from + (int64_t)(atof(argv[5]) * 1e9);
    poll_fd = epoll_create1(0);
    Client *clients = grown(NULL, n * sizeof *clients);
    memset(clients, 0, n * sizeof *clients);
    for (int i = 0; i < n; i++) clients[i].fd = -1;
    struct epoll_event events[256];
    while (begun < n || any_active(clients, n)) {
        int64_t now = now_ns(), wait = 100000000;
        while (begun < n && now >= from + begun * stagger / n) start(&clients[begun++]);
        if (begun < n) wait = from + begun * stagger / n - now;
        if (now > stop_at + 60000000000LL) break; /* it hangs */
        struct timespec spec = {wait / 1000000000, wait % 1000000000};
        int ready = epoll_pwait2(poll_fd, events, 256, &spec, NULL);
        for (int i = 0; i < ready; i++) {
            Client *client = events[i].data.ptr;
            if (client->active && client->sent < request_bytes && events[i].events & EPOLLOUT)
                push(client);
            if (client->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                readable(client);
        }
    }
    for (int i = 0; i < n; i++) failed += clients[i].active;
    report((ended_at - from) / 1e9);
    return 0;
}
