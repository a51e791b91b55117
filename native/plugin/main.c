/* istio-cni: starts an isolated CPython that holds nothing but frozen modules, and runs the frozen __main__.
 *
 * Nothing of the environment and no file influences the interpreter. Whatever goes wrong before Python code can answer
 * is answered here, because a runtime must always get a CNI answer. */
#include <Python.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

extern const struct _frozen app_frozen[];

/* The interpreter itself failed. A DEL still succeeds: a sandbox whose DEL fails stays forever. */
static _Noreturn void fail(const char *text)
{
    static const char start[] = "{\n    \"cniVersion\": \"1.1.0\",\n    \"code\": 999,\n    \"msg\": \"istio-cni could not start: ";
    static const char end[] = "\"\n}";
    const char *command = getenv("CNI_COMMAND");
    if (command && strcmp(command, "DEL") == 0)
        _exit(0);
    /* Nothing is left to do when stdout does not take it. */
    if (write(1, start, sizeof start - 1) < 0 || write(1, text, strlen(text)) < 0 || write(1, end, sizeof end - 1) < 0)
        _exit(1);
    _exit(1);
}

static void check(PyStatus status)
{
    if (PyStatus_Exception(status))
        fail("the interpreter cannot be initialised (out of memory?)");
}

static void initialise(int argc, char **argv)
{
    PyPreConfig pre;
    PyPreConfig_InitIsolatedConfig(&pre);
    pre.utf8_mode = 1; /* no locale: LC_* has no influence */
    pre.configure_locale = 0;
    pre.coerce_c_locale = 0;
    check(Py_PreInitialize(&pre));

    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    config.site_import = 0;
    config.write_bytecode = 0;
    config.pathconfig_warnings = 0;
    config.install_signal_handlers = 0;
    config.parse_argv = 0;
    config.use_frozen_modules = 1;
    config.optimization_level = 2;
    config.safe_path = 1;
    config.module_search_paths_set = 1; /* sys.path stays empty: nothing on disk can be imported */
    check(PyConfig_SetString(&config, &config.program_name, L"istio-cni"));
    wchar_t **const empty[] = {&config.executable,  &config.base_executable,  &config.prefix,    &config.exec_prefix,
                               &config.base_prefix, &config.base_exec_prefix, &config.stdlib_dir};
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++)
        check(PyConfig_SetString(&config, empty[i], L""));
    check(PyConfig_SetString(&config, &config.platlibdir, L"lib"));
    check(PyConfig_SetBytesArgv(&config, argc, argv));
    check(Py_InitializeFromConfig(&config));
    PyConfig_Clear(&config);
}

/* The exit status of a SystemExit with a number; everything else is a fault of ours. */
static int exit_status(void)
{
    if (!PyErr_ExceptionMatches(PyExc_SystemExit))
        fail("an unexpected exception");
#if PY_VERSION_HEX >= 0x030C0000
    PyObject *value = PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
#endif
    PyObject *code = PyObject_GetAttrString(value, "code");
    if (!code || !PyLong_Check(code))
        fail("no exit status");
    return (int)PyLong_AsLong(code);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN); /* a reader of stderr that went away must not end an ADD */
    initialise(argc, argv);
    PyGC_Disable(); /* the process lives for milliseconds */
    if (PyImport_ImportFrozenModule("__main__") == 0)
        fail("no frozen __main__");
    _exit(exit_status()); /* skips the tear-down of the interpreter; Python code wrote with write(2), so nothing is buffered */
}
