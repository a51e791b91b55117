/* Stands in the place of a netfilter program: appends the capability sets it was started with to a file, then executes
 * the program itself, under the name by which it was called. */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char status[8192];
    int in = open("/proc/self/status", O_RDONLY);
    int out = open("/var/run/istio-cni/witness", O_WRONLY | O_CREAT | O_APPEND, 0666);
    ssize_t length = read(in, status, sizeof status);
    if (in < 0 || out < 0 || length <= 0 || write(out, status, length) != length)
        return 99;
    close(in);
    close(out);
    (void)argc;
    execv("/host/witnessed/xtables-nft-multi", argv);
    return 98;
}
