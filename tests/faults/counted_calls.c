/* Preloaded into a program: kills it before its n-th call that changes the disk.
   Without exchange, renameat2 answers as a kernel that lacks it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long left = 0;
static int can_exchange = 1;

void allow_exchange(int allowed) { can_exchange = allowed; }

void kill_before_call(long number) { left = number; }

static void counted(void) {
  if (left > 0 && --left == 0) kill(getpid(), SIGKILL);
}

#define CALL(result, name, parameters, values)  \
  result name parameters {                      \
    static result(*next) parameters;            \
    if (!next) next = dlsym(RTLD_NEXT, #name);  \
    counted();                                  \
    return next values;                         \
  }
/* Opening for reading changes nothing and is not counted. */
#define OPEN(name)                                              \
  int name(const char *path, int flags, ...) {                  \
    static int (*next)(const char *, int, ...);                 \
    va_list rest;                                               \
    va_start(rest, flags);                                      \
    unsigned mode = va_arg(rest, unsigned);                     \
    va_end(rest);                                               \
    if (!next) next = dlsym(RTLD_NEXT, #name);                  \
    if (flags & 03) counted();                                  \
    return next(path, flags, mode);                             \
  }

OPEN(open)
OPEN(open64)
CALL(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
CALL(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
CALL(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
CALL(int, fsync, (int fd), (fd))
CALL(int, fdatasync, (int fd), (fd))
CALL(int, ftruncate64, (int fd, off_t size), (fd, size))
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode))
CALL(int, chmod, (const char *path, mode_t mode), (path, mode))
CALL(int, fchmod, (int fd, mode_t mode), (fd, mode))
CALL(int, rename, (const char *old, const char *new), (old, new))
CALL(int, unlink, (const char *path), (path))
CALL(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
CALL(int, rmdir, (const char *path), (path))

int renameat2(int old_fd, const char *old, int new_fd, const char *new, unsigned flags) {
  static int (*next)(int, const char *, int, const char *, unsigned);
  if (!next) next = dlsym(RTLD_NEXT, "renameat2");
  if (!can_exchange) {
    errno = ENOSYS;
    return -1;
  }
  counted();
  return next(old_fd, old, new_fd, new, flags);
}
