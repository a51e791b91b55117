/* /usr/local/lib/meshcni/enter-userns FD COMMAND [ARGUMENT...]: executes a command as root of a user namespace.
 *
 * The rules of a pod with a user namespace of its own (`hostUsers: false`) can only be loaded from inside it: the kernel
 * takes owner matches from nobody else. FD is open on that namespace. Mounts, network namespace, environment, folder and
 * all other descriptors stay what they are, so the command is one of the image's and works on the pod's rules.
 *
 * It has no rights of its own and needs none: the kernel asks the caller for CAP_SYS_ADMIN over the namespace. Being
 * there, it holds every capability over the namespace and none outside. The caller's ids mean nothing there. */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

/* Above what iptables-restore ends with. */
enum { CANNOT_ENTER = 122, CANNOT_BE_ROOT = 123, USAGE = 125, CANNOT_EXECUTE = 126, NOT_FOUND = 127 };

int main(int argc, char **argv)
{
    char *end = NULL;
    const long fd = argc < 3 ? -1 : strtol(argv[1], &end, 10);
    if (fd < 0 || fd > INT_MAX || end == argv[1] || *end != '\0')
        errx(USAGE, "usage: enter-userns FD COMMAND [ARGUMENT...]");
    if (setns((int)fd, CLONE_NEWUSER) != 0)
        err(CANNOT_ENTER, "cannot enter the user namespace of descriptor %ld", fd);
    close((int)fd);
    if (setgroups(0, NULL) != 0 && errno != EPERM) /* whoever made the namespace may have denied it to all in it */
        err(CANNOT_BE_ROOT, "cannot drop the groups");
    if (setresgid(0, 0, 0) != 0 || setresuid(0, 0, 0) != 0)
        err(CANNOT_BE_ROOT, "cannot become root of the user namespace");
    execv(argv[2], argv + 2);
    const int status = errno == ENOENT ? NOT_FOUND : CANNOT_EXECUTE; /* as shells do */
    err(status, "cannot execute %s", argv[2]);
}
