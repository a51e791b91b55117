/* /usr/local/bin/install-cni: hands the capabilities of this file on to the agent, and does nothing else.
 *
 * The image's user is not root, but an agent has to enter network namespaces and write into folders of root. The file
 * carries the five capabilities below as permitted (`+p`), so the kernel gives whoever executes it those of the five
 * that the container's bounding set holds. They would be gone with the next execve: only ambient capabilities survive
 * that of a file which has none, and only what is inheritable can be ambient.
 *
 * Threat model: every process of the container may execute this file and pass what arguments and environment it likes.
 * - It gets no more than the container was given: the kernel cuts file capabilities by the bounding set. `drop: ALL`,
 *   no_new_privs and a file whose attribute was lost all mean none of the five, and the agent says so.
 * - The five reach one fixed path only, the launcher, which runs the agent's code and nothing that the caller names.
 * - It is a separate and static file because the launcher is linked dynamically and has an interpreter in it. The kernel
 *   marks this process AT_SECURE, so the start-up code of libc removes LD_PRELOAD and its like from the environment; the
 *   launcher then starts as an ordinary process, which may read its own /proc and finds its trust store as usual.
 * - `+p`, not `+ep`: with `+ep` the kernel refuses the execve when the bounding set lacks one of the five, and the agent
 *   could not even say which.
 *
 * No failure here is fatal but that of execve: the agent reports a missing capability better than this file could. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/capability.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char program[] = "/usr/local/lib/meshcni/install-cni";

#define BIT(capability) (1u << (capability))
/* What the chart of Istio adds. All are among the first 32, which is what the first element of the kernel's data holds. */
static const unsigned wanted = BIT(CAP_DAC_OVERRIDE) | BIT(CAP_NET_ADMIN) | BIT(CAP_NET_RAW) | BIT(CAP_SYS_PTRACE) | BIT(CAP_SYS_ADMIN);

/* Afterwards the ambient set is permitted & wanted, or smaller where the kernel refused. */
static void hand_on(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    if (syscall(SYS_capget, &header, data) != 0)
        return;
    const unsigned held = data[0].permitted & wanted;
    data[0].inheritable = held; /* the kernel takes out of the ambient set what is not inheritable */
    data[1].inheritable = 0;
    if (syscall(SYS_capset, &header, data) != 0)
        return;
    for (unsigned capability = 0; capability < 32; capability++)
        if (held & BIT(capability))
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0);
}

static void say(const char *text)
{
    if (write(STDERR_FILENO, text, strlen(text)) < 0)
        return; /* nobody listens */
}

int main(int argc, char **argv)
{
    (void)argc;
    hand_on();
    execv(program, argv);
    const int error = errno;
    say("install-cni: cannot execute ");
    say(program);
    say(": ");
    say(strerrordesc_np(error) ? strerrordesc_np(error) : "unknown error");
    say("\n");
    return error == ENOENT ? 127 : 126; /* as shells do */
}
