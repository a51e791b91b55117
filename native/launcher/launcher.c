/* /usr/local/lib/meshcni/install-cni: CPython, embedded, that runs meshcni.agent and nothing else.
 *
 * The image has no python3, so nobody can run other code with it: no option is parsed, no variable of the environment is
 * read by the interpreter, and modules come from three folders of the image only. */
#include <Python.h>
#include <stdlib.h>

/* Where modules are looked for, in this order: our own and the wheels, the standard library, its extension modules. */
static const wchar_t *const search_path[] = {
    L"/usr/lib/meshcni",
    L"/usr/lib/python3.13",
    L"/usr/lib/python3.13/lib-dynload",
};

/* The way of the console script of the same name. `-m` would take 3 ms more of each start, for runpy. */
static const wchar_t command[] = L"import sys; from meshcni.agent.__main__ import main; sys.exit(main())";

/* Variables that make libcrypto, libc, iptables or nft load code or configuration from a path that the caller names. The
 * caller may have fewer capabilities than this process (see trampoline.c), and this one is not AT_SECURE, so the
 * libraries would obey; so would programs that the agent starts. LD_* matters to those programs only. */
static const char *const dangerous[] = {
    "OPENSSL_CONF", "OPENSSL_CONF_INCLUDE", "OPENSSL_ENGINES", "OPENSSL_MODULES",  "XTABLES_LIBDIR", "IPTABLES_LIB_DIR",
    "IP6TABLES_LIB_DIR", "GCONV_PATH", "LD_AUDIT", "LD_LIBRARY_PATH", "LD_PRELOAD",
};

static void check(PyStatus status)
{
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
}

static void set(PyConfig *config, wchar_t **field, const wchar_t *value)
{
    check(PyConfig_SetString(config, field, value));
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
    config.parse_argv = 0;
    config.safe_path = 1;
    config.use_frozen_modules = 1;
    config.install_signal_handlers = 1;
    config.module_search_paths_set = 1;
    for (size_t i = 0; i < sizeof search_path / sizeof *search_path; i++)
        check(PyWideStringList_Append(&config.module_search_paths, search_path[i]));
    set(&config, &config.program_name, L"install-cni");
    set(&config, &config.executable, L"");
    set(&config, &config.base_executable, L"");
    set(&config, &config.prefix, L"/usr");
    set(&config, &config.exec_prefix, L"/usr");
    set(&config, &config.base_prefix, L"/usr");
    set(&config, &config.base_exec_prefix, L"/usr");
    set(&config, &config.stdlib_dir, search_path[1]);
    set(&config, &config.platlibdir, L"lib");
    set(&config, &config.run_command, command);
    check(PyConfig_SetBytesArgv(&config, argc, argv));
    check(Py_InitializeFromConfig(&config));
    PyConfig_Clear(&config);
}

int main(int argc, char **argv)
{
    for (size_t i = 0; i < sizeof dangerous / sizeof *dangerous; i++)
        unsetenv(dangerous[i]);
    initialise(argc, argv);
    return Py_RunMain();
}
