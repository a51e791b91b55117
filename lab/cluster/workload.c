/* What the containers of the cluster's test pods run: one static program that needs nothing of its image.
 *
 *   workload serve PORT...           HTTP: 200, and a line that names the pod, the port and the client
 *   workload sidecar                 stand-in of istio-proxy: 15001, 15006 lead on to where the client wanted to go,
 *                                    15021 is ready
 *   workload validate [4] [6]        stand-in of istio-validation: 0 when 127.0.0.6 (::6) is redirected, else 126
 *   workload connect ADDRESS PORT    GET / and print the body
 *   workload knock ADDRESS PORT MS   the same again and again, a line with "ok" or the error for each
 *   workload sleep                   until SIGTERM
 *   workload exit STATUS
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define ORIGINAL_DST 80 /* linux/netfilter_ipv4.h; the same for IPv6 */
#define OUTBOUND 15001
#define INBOUND 15006
#define READINESS 15021
#define PROBED 15002
#define NOT_REDIRECTED 126
#define VALIDATION_SECONDS 5
#define CONNECT_MS 3000
#define MOST_LISTENERS 64

typedef union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
} address;

static void end(int number) {
    (void)number;
    _exit(0);
}

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static address make_address(const char *text, int port) {
    address made;
    memset(&made, 0, sizeof made);
    if (inet_pton(AF_INET, text, &made.v4.sin_addr) == 1) {
        made.v4.sin_family = AF_INET;
        made.v4.sin_port = htons(port);
    } else if (inet_pton(AF_INET6, text, &made.v6.sin6_addr) == 1) {
        made.v6.sin6_family = AF_INET6;
        made.v6.sin6_port = htons(port);
    } else {
        fprintf(stderr, "%s is no address\n", text);
        exit(2);
    }
    return made;
}

static socklen_t size_of(const address *a) { return a->any.sa_family == AF_INET ? sizeof a->v4 : sizeof a->v6; }

static int port_of(const address *a) { return ntohs(a->any.sa_family == AF_INET ? a->v4.sin_port : a->v6.sin6_port); }

static const char *text_of(const address *a) {
    static char buffers[4][INET6_ADDRSTRLEN];
    static int next;
    char *buffer = buffers[next++ % 4];
    const void *raw = a->any.sa_family == AF_INET ? (const void *)&a->v4.sin_addr : (const void *)&a->v6.sin6_addr;
    inet_ntop(a->any.sa_family, raw, buffer, INET6_ADDRSTRLEN);
    return buffer;
}

/* A listening socket, or -1 with errno; one family only, so that no address is a mapped one. */
static int try_listen(const char *text, int port) {
    address at = make_address(text, port);
    int one = 1, made = socket(at.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (made < 0) return -1;
    setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(made, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    if (at.any.sa_family == AF_INET6) setsockopt(made, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (bind(made, &at.any, size_of(&at)) == 0 && listen(made, 128) == 0) return made;
    int number = errno;
    close(made);
    errno = number;
    return -1;
}

/* A connection within CONNECT_MS, or -1 with errno; from `source` unless it is null. */
static int connect_to(const address *target, const char *source) {
    int made = socket(target->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (made < 0) return -1;
    int number = 0;
    if (source) {
        address from = make_address(source, 0);
        if (bind(made, &from.any, size_of(&from)) != 0) number = errno;
    }
    if (!number && connect(made, &target->any, size_of(target)) != 0) {
        number = errno;
        struct pollfd wait = {made, POLLOUT, 0};
        if (number == EINPROGRESS) {
            socklen_t size = sizeof number;
            number = ETIMEDOUT;
            if (poll(&wait, 1, CONNECT_MS) == 1) getsockopt(made, SOL_SOCKET, SO_ERROR, &number, &size);
        }
    }
    if (!number) return made;
    close(made);
    errno = number;
    return -1;
}

static int write_all(int to, const char *data, ssize_t left) {
    while (left > 0) {
        ssize_t done = write(to, data, left);
        if (done < 0 && errno == EAGAIN) {
            struct pollfd wait = {to, POLLOUT, 0};
            poll(&wait, 1, -1);
            continue;
        }
        if (done <= 0) return -1;
        data += done;
        left -= done;
    }
    return 0;
}

/* --- servers ------------------------------------------------------------------------------------------------------ */

static void answer(int client, const address *peer, int port) {
    char name[256] = "", body[512], head[1024];
    const char *given = getenv("POD_NAME");
    if (given) snprintf(name, sizeof name, "%s", given);
    else gethostname(name, sizeof name - 1);
    struct timeval patience = {CONNECT_MS / 1000, 0};
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (read(client, head, sizeof head) <= 0) return; /* somebody who only connects, such as a TCP probe */
    int size = snprintf(body, sizeof body, "pod=%s port=%d client=%s\n", name, port, text_of(peer));
    char reply[1024];
    int all = snprintf(reply, sizeof reply,
                       "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", size,
                       body);
    write_all(client, reply, all);
    shutdown(client, SHUT_WR);
}

/* Where the client wanted to go: netfilter says it after REDIRECT, the socket itself after TPROXY. */
static address destination_of(int client) {
    address found, own;
    socklen_t size = sizeof own;
    memset(&own, 0, sizeof own);
    getsockname(client, &own.any, &size);
    size = sizeof found;
    int level = own.any.sa_family == AF_INET ? IPPROTO_IP : IPPROTO_IPV6;
    return getsockopt(client, level, ORIGINAL_DST, &found, &size) == 0 ? found : own;
}

static void copy(int one, int other) {
    struct pollfd ends[2] = {{one, POLLIN, 0}, {other, POLLIN, 0}};
    char data[65536];
    int open = 2;
    while (open > 0 && poll(ends, 2, -1) > 0) {
        for (int from = 0; from < 2; from++) {
            if (!ends[from].revents) continue;
            int to = ends[from].fd == one ? other : one;
            ssize_t size = read(ends[from].fd, data, sizeof data);
            if (size < 0 && errno == EAGAIN) continue;
            if (size > 0 && write_all(to, data, size) == 0) continue;
            if (size < 0) return;
            shutdown(to, SHUT_WR);
            ends[from].fd = -1; /* poll passes over it */
            ends[from].revents = 0;
            open--;
        }
    }
}

static void lead_on(int client, const address *peer, int port) {
    address target = destination_of(client);
    const char *direction = port == INBOUND ? "inbound" : "outbound", *source = NULL;
    if (port_of(&target) == port) { /* it was not redirected, and leading it on would be a loop */
        printf("%s direct from %s\n", direction, text_of(peer));
        return;
    }
    /* by this source the rules know the proxy's own connections to the application */
    if (port == INBOUND) source = target.any.sa_family == AF_INET ? "127.0.0.6" : "::6";
    printf("%s from %s to %s port %d\n", direction, text_of(peer), text_of(&target), port_of(&target));
    fflush(stdout);
    int onward = connect_to(&target, source);
    if (onward < 0) {
        printf("%s to %s port %d: %s\n", direction, text_of(&target), port_of(&target), strerror(errno));
        return;
    }
    copy(client, onward);
}

static void serve(int count, const int *ports, int is_sidecar) {
    struct pollfd listeners[MOST_LISTENERS];
    int used = 0, port[MOST_LISTENERS];
    for (int i = 0; i < count; i++) {
        const char *every[] = {"0.0.0.0", "::"};
        for (int family = 0; family < 2 && used < MOST_LISTENERS; family++) {
            int made = try_listen(every[family], ports[i]);
            if (made < 0 && family == 0) fail("listen");
            if (made < 0) continue; /* no IPv6 here */
            port[used] = ports[i];
            listeners[used++] = (struct pollfd){made, POLLIN, 0};
        }
    }
    printf("serving\n");
    for (;;) {
        if (poll(listeners, used, -1) < 0) continue;
        for (int i = 0; i < used; i++) {
            if (!(listeners[i].revents & POLLIN)) continue;
            address peer;
            socklen_t size = sizeof peer;
            int client = accept(listeners[i].fd, &peer.any, &size);
            if (client < 0) continue;
            if (fork() == 0) {
                if (is_sidecar && port[i] != READINESS) lead_on(client, &peer, port[i]);
                else answer(client, &peer, port[i]);
                exit(0);
            }
            close(client);
        }
    }
}

/* --- clients ------------------------------------------------------------------------------------------------------ */

/* 0, with the body printed if `show`; else the errno of what went wrong. */
static int get(const address *target, int show) {
    const char request[] = "GET / HTTP/1.0\r\n\r\n";
    char data[4096];
    size_t used = 0;
    int made = connect_to(target, NULL);
    if (made < 0) return errno;
    if (write_all(made, request, sizeof request - 1) != 0) return errno;
    struct pollfd wait = {made, POLLIN, 0};
    while (used < sizeof data - 1 && poll(&wait, 1, CONNECT_MS) == 1) {
        ssize_t size = read(made, data + used, sizeof data - 1 - used);
        if (size < 0) {
            close(made);
            return errno;
        }
        if (size == 0) break;
        used += size;
    }
    close(made);
    data[used] = 0;
    char *body = strstr(data, "\r\n\r\n");
    if (!body) return ECONNRESET; /* closed, or silent, without an answer */
    if (show) printf("%s", body + 4);
    return 0;
}

static void knock(const address *target, int milliseconds) {
    for (;;) {
        int number = get(target, 0);
        printf("%s\n", number ? strerror(number) : "ok");
        usleep(milliseconds * 1000);
    }
}

/* What istio-validation does (listen where rules lead to, dial an address that only rules lead there). */
static int is_redirected(int family) {
    const char *local = family == 4 ? "127.0.0.1" : "::1";
    address target = make_address(family == 4 ? "127.0.0.6" : "::6", PROBED);
    struct pollfd listeners[2] = {{try_listen(local, OUTBOUND), POLLIN, 0}, {try_listen(local, INBOUND), POLLIN, 0}};
    if (listeners[0].fd < 0 || listeners[1].fd < 0) fail("listen");
    for (time_t limit = time(NULL) + VALIDATION_SECONDS; time(NULL) < limit;) {
        int dialled = connect_to(&target, local);
        int found = poll(listeners, 2, 1000) > 0;
        for (int i = 0; i < 2 && found; i++) {
            if (!(listeners[i].revents & POLLIN)) continue;
            int client = accept(listeners[i].fd, NULL, NULL);
            address wanted = destination_of(client);
            close(client);
            if (port_of(&wanted) == PROBED) return 1;
        }
        if (dialled >= 0) close(dialled);
    }
    return 0;
}

static int validate(int count, char **families) {
    char *four = "4";
    if (count == 0) return validate(1, &four);
    for (int i = 0; i < count; i++) {
        if (!is_redirected(atoi(families[i]))) {
            fprintf(stderr, "validation failed: IPv%s traffic is not redirected\n", families[i]);
            return NOT_REDIRECTED;
        }
    }
    printf("validation passed\n");
    return 0;
}

int main(int count, char **words) {
    signal(SIGTERM, end); /* process 1 of a container is spared what it has no handler for */
    signal(SIGINT, end);
    signal(SIGCHLD, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *what = count > 1 ? words[1] : "sleep";
    if (!strcmp(what, "serve") && count > 2 && count - 2 <= MOST_LISTENERS / 2) {
        int ports[MOST_LISTENERS];
        for (int i = 2; i < count; i++) ports[i - 2] = atoi(words[i]);
        serve(count - 2, ports, 0);
    }
    if (!strcmp(what, "sidecar")) serve(3, (int[]){OUTBOUND, INBOUND, READINESS}, 1);
    if (!strcmp(what, "validate")) return validate(count - 2, words + 2);
    if (!strcmp(what, "exit") && count == 3) return atoi(words[2]);
    if ((!strcmp(what, "connect") && count == 4) || (!strcmp(what, "knock") && count == 5)) {
        address target = make_address(words[2], atoi(words[3]));
        if (count == 5) knock(&target, atoi(words[4]));
        errno = get(&target, 1);
        if (errno) fail("connect");
        return 0;
    }
    if (!strcmp(what, "sleep"))
        for (;;) pause();
    fprintf(stderr, "unknown order %s\n", what);
    return 2;
}
