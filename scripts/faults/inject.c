/* Counts the calls that change files below a folder, and lets a fault happen at one of them.

   A library for LD_PRELOAD: the functions below come before those of the C library with the same
   names. Each one asks `outcome_of` whether the call shall go on, and then calls the real function.
   So calls of Python and calls of C++ libraries are all seen, from every thread. A library that
   calls the kernel itself is not seen: safetensors, in Rust, renames its temporary file so.

   Nothing is counted before `inject_arm`. The count lies in memory that a forked child shares with
   its parent, so a parent can read the count of a child that was killed. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* Kinds of calls, as in server.py. */
enum kind { MAKE = 1, WRITE = 2, FLUSH = 4, RENAME = 8, REMOVE = 16, CHANGE = 32 };

static atomic_long *count;
static char folder[PATH_MAX];
static long at;       /* number of the call at which the fault happens; 0: at none */
static int kinds;     /* the kinds that are counted */
static int to_send;   /* signal that the fault sends; 0: none */
static int to_return; /* errno that the fault returns; 0: the call goes on */
static bool lasting;  /* later calls return the errno too */
static bool half;     /* a write at which the fault happens first writes half of its bytes */

__attribute__((constructor)) static void share_count(void) {
  count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (count == MAP_FAILED) abort();
}

/* Starts to count in this process; `below` is an absolute path without links. */
void inject_arm(const char *below, long number, int which, int signal_number, int error_number,
                int lasts, int writes_half) {
  atomic_store(count, 0);
  at = number;
  kinds = which;
  to_send = signal_number;
  to_return = error_number;
  lasting = lasts;
  half = writes_half;
  snprintf(folder, sizeof folder, "%s/", below);
}

long inject_count(void) { return atomic_load(count); }

/* The real function of a name, with the type of the function that stands here for it. */
#define REAL(name)              \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

struct outcome {
  bool here; /* the fault happens at this call */
  int error; /* errno to return; 0: the call goes on */
};
static const struct outcome not_counted = {false, 0};

static struct outcome count_call(enum kind kind, const char *path) {
  if (!(kinds & kind) || strncmp(path, folder, strlen(folder))) return not_counted;
  long number = atomic_fetch_add(count, 1) + 1;
  bool here = number == at, after = lasting && at && number > at;
  return (struct outcome){here, here || after ? to_return : 0};
}

/* Counts a call on a path that is relative to the open folder `fd`, as in openat. */
static struct outcome outcome_of(enum kind kind, int fd, const char *path) {
  char link[64], whole[2 * PATH_MAX];
  if (!folder[0] || path[0] == '/') return folder[0] ? count_call(kind, path) : not_counted;
  snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, whole, PATH_MAX);
  if (length < 0) return not_counted;
  snprintf(whole + length, sizeof whole - length, "/%s", path);
  return count_call(kind, whole);
}

/* Sends the signal where the fault happens; returns true, with errno, where the call must fail. */
static bool fails(struct outcome outcome) {
  if (outcome.here && to_send) kill(getpid(), to_send);
  if (outcome.error) errno = outcome.error;
  return outcome.error;
}

static bool fails_at(enum kind kind, int fd, const char *path) {
  return fails(outcome_of(kind, fd, path));
}

static bool makes(int flags) { return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE; }

static bool fails_open(int fd, const char *path, int flags) {
  if (!makes(flags) && (flags & O_ACCMODE) == O_RDONLY) return false; /* it only reads */
  return fails_at(makes(flags) ? MAKE : CHANGE, fd, path);
}

#define MODE_AFTER(last)                           \
  va_list more;                                    \
  va_start(more, last);                            \
  mode_t mode = makes(last) ? va_arg(more, mode_t) : 0; \
  va_end(more)

#define OPEN(name)                                    \
  int name(const char *path, int flags, ...) {        \
    REAL(name);                                       \
    MODE_AFTER(flags);                                \
    if (fails_open(AT_FDCWD, path, flags)) return -1; \
    return real(path, flags, mode);                   \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                   \
  int name(int fd, const char *path, int flags, ...) { \
    REAL(name);                                        \
    MODE_AFTER(flags);                                 \
    if (fails_open(fd, path, flags)) return -1;        \
    return real(fd, path, flags, mode);                \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                               \
  FILE *name(const char *path, const char *mode) {                                \
    REAL(name);                                                                   \
    if (strpbrk(mode, "wa+") && fails_at(MAKE, AT_FDCWD, path)) return NULL;      \
    return real(path, mode);                                                      \
  }
FOPEN(fopen)
FOPEN(fopen64)

/* A function of which every call fails as a whole, or goes on. */
#define CALL(type, name, parameters, arguments, kind, fd, path) \
  type name parameters {                                        \
    REAL(name);                                                 \
    if (fails_at(kind, fd, path)) return -1;                    \
    return real arguments;                                      \
  }
#define HERE AT_FDCWD

CALL(int, creat, (const char *p, mode_t m), (p, m), MAKE, HERE, p)
CALL(int, creat64, (const char *p, mode_t m), (p, m), MAKE, HERE, p)
CALL(int, mkdir, (const char *p, mode_t m), (p, m), MAKE, HERE, p)
CALL(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), MAKE, d, p)
CALL(int, link, (const char *q, const char *p), (q, p), MAKE, HERE, p)
CALL(int, linkat, (int c, const char *q, int d, const char *p, int f), (c, q, d, p, f), MAKE, d, p)
CALL(int, symlink, (const char *q, const char *p), (q, p), MAKE, HERE, p)
CALL(int, symlinkat, (const char *q, int d, const char *p), (q, d, p), MAKE, d, p)

CALL(int, rename, (const char *q, const char *p), (q, p), RENAME, HERE, p)
CALL(int, renameat, (int c, const char *q, int d, const char *p), (c, q, d, p), RENAME, d, p)
CALL(int, renameat2, (int c, const char *q, int d, const char *p, unsigned f), (c, q, d, p, f),
     RENAME, d, p)

CALL(int, unlink, (const char *p), (p), REMOVE, HERE, p)
CALL(int, unlinkat, (int d, const char *p, int f), (d, p, f), REMOVE, d, p)
CALL(int, rmdir, (const char *p), (p), REMOVE, HERE, p)
CALL(int, remove, (const char *p), (p), REMOVE, HERE, p)

CALL(int, chmod, (const char *p, mode_t m), (p, m), CHANGE, HERE, p)
CALL(int, fchmod, (int d, mode_t m), (d, m), CHANGE, d, "")
CALL(int, fchmodat, (int d, const char *p, mode_t m, int f), (d, p, m, f), CHANGE, d, p)
CALL(int, truncate, (const char *p, off_t n), (p, n), CHANGE, HERE, p)
CALL(int, truncate64, (const char *p, off64_t n), (p, n), CHANGE, HERE, p)
CALL(int, ftruncate, (int d, off_t n), (d, n), CHANGE, d, "")
CALL(int, ftruncate64, (int d, off64_t n), (d, n), CHANGE, d, "")

CALL(int, fsync, (int d), (d), FLUSH, d, "")
CALL(int, fdatasync, (int d), (d), FLUSH, d, "")

CALL(ssize_t, sendfile, (int d, int s, off_t *o, size_t n), (d, s, o, n), WRITE, d, "")
CALL(ssize_t, sendfile64, (int d, int s, off64_t *o, size_t n), (d, s, o, n), WRITE, d, "")
CALL(ssize_t, copy_file_range, (int s, off64_t *i, int d, off64_t *o, size_t n, unsigned f),
     (s, i, d, o, n, f), WRITE, d, "")
CALL(ssize_t, pwritev, (int d, const struct iovec *v, int n, off_t o), (d, v, n, o), WRITE, d, "")
CALL(ssize_t, pwritev64, (int d, const struct iovec *v, int n, off64_t o), (d, v, n, o), WRITE, d,
     "")

/* A write of which a full disk still takes a half, or a killed process still writes one. */
#define WRITE_CALL(name, parameters, whole_call, half_call, length) \
  ssize_t name parameters {                                         \
    REAL(name);                                                     \
    struct outcome outcome = outcome_of(WRITE, fd, "");             \
    if (outcome.here && half && length > 1) {                       \
      ssize_t written = half_call;                                  \
      if (to_send) kill(getpid(), to_send);                         \
      return written;                                               \
    }                                                               \
    return fails(outcome) ? -1 : whole_call;                        \
  }

WRITE_CALL(write, (int fd, const void *data, size_t length), real(fd, data, length),
           real(fd, data, length / 2), length)
WRITE_CALL(pwrite, (int fd, const void *data, size_t length, off_t offset),
           real(fd, data, length, offset), real(fd, data, length / 2, offset), length)
WRITE_CALL(pwrite64, (int fd, const void *data, size_t length, off64_t offset),
           real(fd, data, length, offset), real(fd, data, length / 2, offset), length)
WRITE_CALL(writev, (int fd, const struct iovec *parts, int number), real(fd, parts, number),
           real(fd, parts, number / 2), number)

/* Programs reach renameat2 by its number where their C library lacks the function. */
long syscall(long number, ...) {
  REAL(syscall);
  va_list more;
  va_start(more, number);
  long a[6];
  for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
  va_end(more);
  if (number == SYS_renameat2 && fails_at(RENAME, a[2], (const char *)a[3])) return -1;
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
