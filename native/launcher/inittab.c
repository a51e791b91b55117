/* Link-time replacement for config.o of Debian's static libpython: the C modules that the executable holds. Against
 * Debian's own table these are left out, and the linker leaves out their code:
 *   _sha2                        not whole in the archive; hashlib has SHA-2 from _hashlib, which is OpenSSL's
 *   pyexpat, _elementtree        need libexpat, and nothing reads XML
 *   cmath, _statistics, _symtable, syslog   nothing uses them */
#include <Python.h>

#define MODULES(M) \
    M(_abc) M(_bisect) M(_blake2) M(_codecs) M(_collections) M(_csv) M(_datetime) M(_functools) M(_heapq) M(_io) \
    M(_json) M(_locale) M(_md5) M(_opcode) M(_operator) M(_pickle) M(_posixsubprocess) M(_random) M(_sha1) M(_sha3) \
    M(_signal) M(_socket) M(_sre) M(_stat) M(_struct) M(_suggestions) M(_sysconfig) M(_thread) \
    M(_tracemalloc) M(_typing) M(_weakref) M(array) M(atexit) M(binascii) M(errno) M(faulthandler) M(fcntl) M(grp) \
    M(itertools) M(math) M(posix) M(pwd) M(select) M(time) M(unicodedata) M(zlib)
/* Those whose functions are named otherwise, or that live in the interpreter itself. */
#define OWN(M) \
    M(marshal, PyMarshal_Init) M(_imp, PyInit__imp) M(_ast, PyInit__ast) M(_tokenize, PyInit__tokenize) \
    M(gc, PyInit_gc) M(_warnings, _PyWarnings_Init) M(_string, PyInit__string)

#define DECLARE(name) extern PyObject *PyInit_##name(void);
#define ENTRY(name) {#name, PyInit_##name},
#define DECLARE_OWN(name, function) extern PyObject *function(void);
#define ENTRY_OWN(name, function) {#name, function},

MODULES(DECLARE)
OWN(DECLARE_OWN)

struct _inittab _PyImport_Inittab[] = {
    MODULES(ENTRY)
    OWN(ENTRY_OWN)
    {"builtins", NULL},
    {"sys", NULL},
    {NULL, NULL},
};
