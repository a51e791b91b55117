/* _tls: one request over TLS on a connected or connecting socket, for the plugin's question to the API server.
 *
 * OpenSSL as far as that needs: TLS 1.2 and 1.3, a server that proves its name or address with a certificate of the
 * given authorities, no client certificate. Nothing of the machine takes part: no configuration file, no variable of
 * the environment, no trust store, no module. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <elf.h>
#include <errno.h>
#include <openssl/bio.h>
#include <openssl/comp.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 16384
#define TICK_SECONDS 0.1

/* --- OpenSSL without cost for those who do not use it --- */

/* Relocations of OpenSSL's data, which postpone.py puts here and the start leaves out: their number, then a RELR table. */
#define MAX_POSTPONED 4096
__attribute__((section(".postponed_relr"), used)) static const uint64_t postponed_relr[MAX_POSTPONED + 1] = {0};
extern const unsigned char __ehdr_start[] __attribute__((visibility("hidden")));

static void relocate_all(uint64_t base)
{
    const uint64_t *table = postponed_relr;
    __asm__("" : "+r"(table)); /* the compiler knows the zeros above, but not what they are replaced with */
    uint64_t *where = NULL;
    for (uint64_t i = 1; i <= table[0]; i++) {
        uint64_t word = table[i];
        if (!(word & 1)) {
            where = (uint64_t *)(base + word);
            *where++ += base;
            continue;
        }
        for (int bit = 0; bit < 63; bit++)
            if (word >> (bit + 1) & 1)
                where[bit] += base;
        where += 63;
    }
}

/* As libc does it at the start, with the data that is only read from then on writable for that long. */
static int relocate(void)
{
    static int is_done;
    uint64_t base = (uint64_t)__ehdr_start, page = (uint64_t)sysconf(_SC_PAGESIZE), start = 0, size = 0;
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)__ehdr_start;
    const Elf64_Phdr *segment = (const Elf64_Phdr *)(base + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++)
        if (segment[i].p_type == PT_GNU_RELRO) {
            start = (base + segment[i].p_vaddr) & -page;
            size = ((base + segment[i].p_vaddr + segment[i].p_memsz) & -page) - start;
        }
    if (is_done)
        return 1;
    if (mprotect((void *)start, size, PROT_READ | PROT_WRITE) != 0)
        return 0;
    relocate_all(base);
    is_done = 1;
    return mprotect((void *)start, size, PROT_READ) == 0;
}

/* On x86 a constructor of libcrypto asks the processor for its abilities, and a variable of the environment for its
 * opinion. Linked with --wrap, it does so when OpenSSL is started, and there is no environment then. */
extern void __real_OPENSSL_cpuid_setup(void);
static int is_started;

void __wrap_OPENSSL_cpuid_setup(void)
{
    if (is_started)
        __real_OPENSSL_cpuid_setup();
}

#ifdef __aarch64__ /* where that constructor cannot be wrapped, but asks the kernel only */
static void forget_opinion(void) { unsetenv("OPENSSL_armcap"); }
__attribute__((section(".preinit_array"), used)) static void (*const before_constructors)(void) = forget_opinion;
#endif

#if OPENSSL_VERSION_NUMBER >= 0x30200000L
/* Certificates are not compressed: in place of the parts of libcrypto that would need zlib and zstd. */
#define WITHOUT(name)                                        \
    const BIO_METHOD *BIO_f_##name(void) { return NULL; }    \
    COMP_METHOD *COMP_##name(void) { return NULL; }          \
    COMP_METHOD *COMP_##name##_oneshot(void) { return NULL; } \
    void ossl_comp_##name##_cleanup(void) {}
extern void ossl_comp_zlib_cleanup(void), ossl_comp_zstd_cleanup(void);
extern const BIO_METHOD *BIO_f_zlib(void), *BIO_f_zstd(void);
extern COMP_METHOD *COMP_zlib(void), *COMP_zlib_oneshot(void), *COMP_zstd(void), *COMP_zstd_oneshot(void);
WITHOUT(zlib)
WITHOUT(zstd)
#endif

static int start(void)
{
    clearenv(); /* whatever a variable could change, from here on it does not; the plugin has read its own */
    if (!relocate())
        return 0;
    is_started = 1;
    return OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT | OPENSSL_INIT_LOAD_SSL_STRINGS, NULL);
}

/* --- One exchange --- */

struct exchange {
    int socket;
    double deadline; /* on the monotonic clock */
    PyObject *is_over; /* asked while waiting */
    PyObject *error; /* the module's exception */
};

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Waits until the socket is readable or writable; 0 with a Python exception when that takes too long, or when the
 * caller has lost its interest. */
static int wait_for(const struct exchange *exchange, short events)
{
    for (;;) {
        double left = exchange->deadline - now();
        if (left <= 0) {
            PyErr_SetNone(PyExc_TimeoutError);
            return 0;
        }
        struct pollfd one = {.fd = exchange->socket, .events = events};
        int ready = poll(&one, 1, (int)((left < TICK_SECONDS ? left : TICK_SECONDS) * 1000) + 1);
        if (ready > 0)
            return 1;
        if (ready < 0 && errno != EINTR) {
            PyErr_SetFromErrno(PyExc_OSError);
            return 0;
        }
        PyObject *over = PyObject_CallNoArgs(exchange->is_over);
        if (!over)
            return 0;
        int is_over = PyObject_IsTrue(over);
        Py_DECREF(over);
        if (is_over) {
            PyErr_SetNone(PyExc_InterruptedError);
            return 0;
        }
    }
}

static int is_connected(const struct exchange *exchange)
{
    int problem = 0;
    socklen_t size = sizeof problem;
    if (!wait_for(exchange, POLLOUT))
        return 0;
    if (getsockopt(exchange->socket, SOL_SOCKET, SO_ERROR, &problem, &size) == 0 && problem == 0)
        return 1;
    errno = problem ? problem : errno;
    PyErr_SetFromErrno(PyExc_OSError);
    return 0;
}

/* Sets the module's exception from what OpenSSL says. */
static void fail(const struct exchange *exchange, SSL *ssl, const char *what)
{
    int system = errno;
    long verified = ssl ? SSL_get_verify_result(ssl) : X509_V_OK;
    unsigned long code = ERR_peek_last_error();
    const char *reason = code ? ERR_reason_error_string(code) : NULL;
    if (verified != X509_V_OK)
        PyErr_Format(exchange->error, "the server's certificate is not accepted: %s",
                     X509_verify_cert_error_string(verified));
    else if (reason)
        PyErr_Format(exchange->error, "%s: %s", what, reason);
    else if (system)
        PyErr_Format(exchange->error, "%s: %s", what, strerror(system));
    else
        PyErr_Format(exchange->error, "%s: the connection ended", what);
    ERR_clear_error();
}

/* The certificates of a PEM text in base64, as a kubeconfig has it; NULL when there is none or one is broken. */
static X509_STORE *authorities(const char *base64, Py_ssize_t size)
{
    X509_STORE *store = X509_STORE_new();
    unsigned char *pem = OPENSSL_malloc((size_t)size + 4);
    int length = store && pem && size ? EVP_DecodeBlock(pem, (const unsigned char *)base64, (int)size) : -1;
    BIO *text = length > 0 ? BIO_new_mem_buf(pem, length) : NULL;
    int count = 0, is_good = text != NULL;
    while (is_good) {
        X509 *certificate = PEM_read_bio_X509(text, NULL, NULL, NULL);
        if (!certificate) {
            is_good = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
            break;
        }
        is_good = X509_STORE_add_cert(store, certificate);
        X509_free(certificate);
        count++;
    }
    ERR_clear_error();
    BIO_free(text);
    OPENSSL_free(pem);
    if (is_good && count)
        return store;
    X509_STORE_free(store);
    return NULL;
}

static SSL *prepared(SSL_CTX *context, X509_STORE *store, int socket, const char *host, int is_address)
{
    SSL_CTX_set1_cert_store(context, store);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    /* Where an answer ends is for HTTP and JSON to say; not everybody ends a connection as TLS wants it. */
    SSL_CTX_set_options(context, SSL_OP_IGNORE_UNEXPECTED_EOF);
    if (!SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION))
        return NULL;
    SSL *ssl = SSL_new(context);
    if (!ssl)
        return NULL;
    X509_VERIFY_PARAM *wanted = SSL_get0_param(ssl);
    /* As Go's clients do: any of the authorities ends a chain, and a subject's common name is no name. */
    X509_VERIFY_PARAM_set_flags(wanted, X509_V_FLAG_PARTIAL_CHAIN);
    X509_VERIFY_PARAM_set_hostflags(wanted, X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    int is_good = is_address ? X509_VERIFY_PARAM_set1_ip_asc(wanted, host)
                             : X509_VERIFY_PARAM_set1_host(wanted, host, 0) && SSL_set_tlsext_host_name(ssl, host);
    if (is_good && SSL_set_fd(ssl, socket)) {
        SSL_set_connect_state(ssl);
        return ssl;
    }
    SSL_free(ssl);
    return NULL;
}

/* 1 when the operation is to be tried again because the socket is ready now, 0 when it failed for good. */
static int may_retry(const struct exchange *exchange, SSL *ssl, int result, const char *what)
{
    int kind = SSL_get_error(ssl, result);
    if (kind == SSL_ERROR_WANT_READ)
        return wait_for(exchange, POLLIN);
    if (kind == SSL_ERROR_WANT_WRITE)
        return wait_for(exchange, POLLOUT);
    fail(exchange, ssl, what);
    return 0;
}

static int say(const struct exchange *exchange, SSL *ssl, const char *data, Py_ssize_t size)
{
    for (;;) {
        ERR_clear_error();
        errno = 0;
        int result = SSL_write(ssl, data, (int)size); /* all or nothing: partial writes are not switched on */
        if (result > 0)
            return 1;
        if (!may_retry(exchange, ssl, result, "the request could not be sent"))
            return 0;
    }
}

/* All that the server says until the connection ends. */
static PyObject *heard(const struct exchange *exchange, SSL *ssl, Py_ssize_t limit)
{
    PyObject *all = PyByteArray_FromStringAndSize(NULL, 0);
    while (all) {
        Py_ssize_t size = PyByteArray_GET_SIZE(all);
        if (size > limit) {
            PyErr_Format(exchange->error, "the answer has more than %zd bytes", limit);
            break;
        }
        if (PyByteArray_Resize(all, size + CHUNK) < 0)
            break;
        ERR_clear_error();
        errno = 0;
        int result = SSL_read(ssl, PyByteArray_AS_STRING(all) + size, CHUNK);
        if (PyByteArray_Resize(all, size + (result > 0 ? result : 0)) < 0)
            break;
        if (result > 0)
            continue;
        if (SSL_get_error(ssl, result) == SSL_ERROR_ZERO_RETURN) {
            PyObject *bytes = PyBytes_FromObject(all);
            Py_DECREF(all);
            return bytes;
        }
        if (!may_retry(exchange, ssl, result, "the answer could not be read"))
            break;
    }
    Py_XDECREF(all);
    return NULL;
}

static PyObject *converse(const struct exchange *exchange, SSL *ssl, const char *request, Py_ssize_t size, Py_ssize_t limit)
{
    for (;;) {
        ERR_clear_error();
        errno = 0;
        int result = SSL_connect(ssl);
        if (result == 1)
            break;
        if (!may_retry(exchange, ssl, result, "TLS could not be agreed on"))
            return NULL;
    }
    return say(exchange, ssl, request, size) ? heard(exchange, ssl, limit) : NULL;
}

PyDoc_STRVAR(exchange_doc, "exchange(socket, authorities, host, is_address, request, limit, seconds, is_over)");

static PyObject *exchange(PyObject *module, PyObject *arguments)
{
    const char *base64, *host, *request;
    Py_ssize_t base64_size, request_size, limit;
    int is_address;
    double seconds;
    struct exchange it = {.error = PyModule_GetState(module) ? *(PyObject **)PyModule_GetState(module) : NULL};
    if (!PyArg_ParseTuple(arguments, "is#spy#ndO", &it.socket, &base64, &base64_size, &host, &is_address, &request,
                          &request_size, &limit, &seconds, &it.is_over))
        return NULL;
    it.deadline = now() + seconds;
    if (!is_connected(&it))
        return NULL;

    PyObject *answer = NULL;
    SSL_CTX *context = NULL;
    SSL *ssl = NULL;
    if (start())
        context = SSL_CTX_new(TLS_client_method());
    X509_STORE *store = context ? authorities(base64, base64_size) : NULL;
    if (!context)
        fail(&it, NULL, "OpenSSL could not be started");
    else if (!store)
        PyErr_SetString(it.error, "the authorities are no certificates");
    else if (!(ssl = prepared(context, store, it.socket, host, is_address)))
        fail(&it, NULL, "OpenSSL could not be prepared");
    else
        answer = converse(&it, ssl, request, request_size, limit);
    SSL_free(ssl);
    X509_STORE_free(store);
    SSL_CTX_free(context);
    return answer;
}

static PyMethodDef methods[] = {{"exchange", exchange, METH_VARARGS, exchange_doc}, {0}};

static int execute(PyObject *module)
{
    PyObject **error = PyModule_GetState(module);
    *error = PyErr_NewException("_tls.TlsError", NULL, NULL);
    return *error ? PyModule_AddObjectRef(module, "TlsError", *error) : -1;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_tls", .m_size = sizeof(PyObject *), .m_methods = methods, .m_slots = slots};

PyMODINIT_FUNC PyInit__tls(void) { return PyModuleDef_Init(&definition); }
