/* `install-cni` of the image that plays Istio's own: runs /original.py with the host's Python, mounted at /host/usr. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifdef __x86_64__
#define LIBRARIES "/host/usr/lib/x86_64-linux-gnu"
#define LOADER LIBRARIES "/ld-linux-x86-64.so.2"
#else
#define LIBRARIES "/host/usr/lib/aarch64-linux-gnu"
#define LOADER LIBRARIES "/ld-linux-aarch64.so.1"
#endif

int main(void) {
    setenv("PYTHONHOME", "/host/usr", 1);
    execl(LOADER, LOADER, "--library-path", LIBRARIES, "/host/usr/bin/python3", "-S", "/original.py", (char *)0);
    perror(LOADER);
    return 127;
}
