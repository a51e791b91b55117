/* peak PROGRAM [ARGUMENT...]: runs a program and prints its peak resident memory in KiB on standard error.
 *
 * A process begins with the peak of the one that started it, so whoever measures has to be small. */
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int count, char **arguments) {
    struct rusage usage;
    pid_t child = count > 1 ? fork() : -1;
    if (child == 0) {
        execv(arguments[1], arguments + 1);
        _exit(127);
    }
    if (child < 0 || wait4(child, NULL, 0, &usage) < 0) return 1;
    fprintf(stderr, "%ld\n", usage.ru_maxrss);
    return 0;
}
