/* The pause container: holds the sandbox's namespaces and waits to be told to end. */
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static void end(int number) {
    (void)number;
    _exit(0);
}

int main(void) {
    signal(SIGTERM, end);
    signal(SIGINT, end);
    for (;;) pause();
}
