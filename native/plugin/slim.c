/* Link-time replacements for members of Debian's static libpython, so that the linker never pulls these in:
 *   config.o      the built-in C modules: only those that the interpreter and the plugin need
 *   frozen.o      the frozen modules: only ours, without zipimport
 *   getpath.o     the search for the standard library: none, so no path is looked at
 *   deepfreeze.o  (3.11) code objects of the standard library: 900 KB of data that a PIE has to relocate at each start,
 *                 a third of all page faults
 * and for two functions of libc that would read /etc/localtime when the module `time` is initialised.
 *
 * These symbols are private to CPython, so each new minor version has to be looked at. */
#define Py_BUILD_CORE 1
#include <Python.h>
#include "internal/pycore_import.h"
#include "internal/pycore_initconfig.h"
#include "internal/pycore_pathconfig.h"
#include <string.h>
#include <time.h>

#if PY_VERSION_HEX < 0x030B0000 || PY_VERSION_HEX >= 0x030E0000 || (PY_VERSION_HEX >> 16) == 0x030C
#error "slim.c is checked for CPython 3.11 and 3.13 only"
#endif

extern const struct _frozen app_frozen[], boot_frozen[];

static const struct _frozen nothing[] = {{0}};
static const struct _module_alias aliases[] = {{"_frozen_importlib", "importlib._bootstrap"}, {0, 0}};

const struct _frozen *_PyImport_FrozenBootstrap = boot_frozen;
const struct _frozen *_PyImport_FrozenStdlib = nothing;
const struct _frozen *_PyImport_FrozenTest = nothing;
const struct _module_alias *_PyImport_FrozenAliases = aliases;
const struct _frozen *PyImport_FrozenModules = app_frozen;

PyStatus _PyConfig_InitPathConfig(PyConfig *config, int compute_path_config)
{
    (void)compute_path_config;
    return _PyPathConfig_ReadGlobal(config);
}

#if PY_VERSION_HEX < 0x030C0000
int _Py_Deepfreeze_Init(void) { return 0; }
void _Py_Deepfreeze_Fini(void) {}
#endif

/* _codecs is for the stub of encodings; the others are what the plugin imports; _tls is ours. */
#define MODULES(M) M(_codecs) M(posix) M(_socket) M(fcntl) M(time) M(_tls)

#define DECLARE(name) extern PyObject *PyInit_##name(void);
#define ENTRY(name) {#name, PyInit_##name},
MODULES(DECLARE)
extern PyObject *PyMarshal_Init(void), *PyInit__imp(void), *_PyWarnings_Init(void), *PyInit__string(void), *PyInit_gc(void);

struct _inittab _PyImport_Inittab[] = {
    MODULES(ENTRY)
    {"marshal", PyMarshal_Init},
    {"_imp", PyInit__imp},
    {"_warnings", _PyWarnings_Init},
    {"_string", PyInit__string},
    {"gc", PyInit_gc},
    {"builtins", NULL},
    {"sys", NULL},
    {0, 0},
};

/* Days since 1970-01-01 to a date, with years that begin in March (Howard Hinnant, "chrono-Compatible Low-Level Date
 * Algorithms"). UTC is all that the log needs. */
struct tm *gmtime_r(const time_t *restrict when, struct tm *restrict out)
{
    long long days = *when / 86400, second = *when % 86400;
    if (second < 0) {
        second += 86400;
        days--;
    }
    long long shifted = days + 719468, era = (shifted >= 0 ? shifted : shifted - 146096) / 146097;
    long long day_of_era = shifted - era * 146097;
    long long year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    long long day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    long long month = (5 * day_of_year + 2) / 153; /* 0 is March */
    memset(out, 0, sizeof *out);
    out->tm_sec = (int)(second % 60);
    out->tm_min = (int)(second / 60 % 60);
    out->tm_hour = (int)(second / 3600);
    out->tm_mday = (int)(day_of_year - (153 * month + 2) / 5 + 1);
    out->tm_mon = (int)(month < 10 ? month + 2 : month - 10);
    out->tm_year = (int)(year_of_era + era * 400 + (month >= 10) - 1900);
    out->tm_zone = "UTC";
    return out;
}

struct tm *localtime_r(const time_t *restrict when, struct tm *restrict out)
{
    return gmtime_r(when, out);
}
