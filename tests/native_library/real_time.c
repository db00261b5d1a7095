/* What a stream does after it was created: counts allocations, or forbids system calls. See test_real_time.py.
 *
 *   real_time WEIGHTS THREADS MODE
 *
 * MODE: "allocations" prints how many there were in 1000 calls; "calls" makes the calls where a system call ends the
 * process, but for sched_yield with several threads; "allocate" and "call" do what is forbidden once. "in_place" is
 * "allocations" that counts from before the model is made, in memory of the caller. "no_memory" loads the model and
 * makes the stream after no allocation, one, two and so on, until there is memory for all; and asks for an instruction
 * set that there is not. */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <lstm_ext.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CALLS 1000
#define STEPS 20
#define BATCH 2

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static volatile int counting, allocations, most = INT_MAX;
static void count(void) {
  if (counting) __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
}
static int fails(void) { return count(), allocations > most; }
void* malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void* calloc(size_t number, size_t size) { return fails() ? NULL : __libc_calloc(number, size); }
void* realloc(void* memory, size_t size) { return fails() ? NULL : __libc_realloc(memory, size); }
void* memalign(size_t alignment, size_t size) { return fails() ? NULL : __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return fails() ? NULL : __libc_memalign(alignment, size); }
int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = fails() ? NULL : __libc_memalign(alignment, size);
  return *memory ? 0 : 12;
}
void free(void* memory) {
  if (memory) count();
  __libc_free(memory);
}

static void check(const char* error) {
  if (!error) return;
  fprintf(stderr, "%s\n", error);
  _exit(1);
}

/* The process ends at any system call but these. */
static void forbid(int threads) {
  const unsigned yield = threads > 1 ? __NR_sched_yield : __NR_write;
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_write, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_exit_group, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, yield, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof(filter) / sizeof(filter[0]), filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0) {
    fprintf(stderr, "no seccomp\n");
    _exit(3);
  }
}

static lstm_ext_stream* stream;
static lstm_ext_description model_is;
static void *x, *y;
static long threads;
static volatile int ready, begun, done;

/* The calls of a worker: steps, and runs of different lengths. */
static void work(long worker) {
  for (int i = 0; i < CALLS; ++i) {
    if (model_is.directions == 1) check(lstm_ext_step_part(stream, x, y, worker));
    if (i % 20 == 0) check(lstm_ext_run_part(stream, x, 1 + i / 20 % STEPS, y, worker));
  }
}
static void* body(void* worker) {
  __atomic_add_fetch(&ready, 1, __ATOMIC_RELEASE);
  while (!__atomic_load_n(&begun, __ATOMIC_ACQUIRE)) {
  }
  work((long)worker);
  __atomic_add_fetch(&done, 1, __ATOMIC_RELEASE);
  for (;;) { /* a thread that ends makes system calls */
  }
  return NULL;
}

static void* place(size_t size) {
  void* memory = __libc_memalign(64, size);
  memset(memory, 0xFF, size);
  return memory;
}

/* Each error is a line. */
static int without_memory(const char* path, const lstm_ext_setup* setup) {
  const char* error = "none yet";
  for (most = 0; error; ++most) {
    lstm_ext_model* model = NULL;
    allocations = 0;
    counting = 1;
    const char* const other = lstm_ext_set_capability("an instruction set of no processor that there is");
    error = lstm_ext_model_load(path, &model);
    if (!error) error = lstm_ext_stream_create(model, setup, &stream);
    counting = allocations = 0;
    if (!other || !*other || (error && !*error)) return 1;
    if (!error) lstm_ext_stream_destroy(stream);
    lstm_ext_model_destroy(model);
  }
  printf("%d allocations\n", most - 1);
  return 0;
}

int main(int argc, char** argv) {
  lstm_ext_model* model;
  char text[64];
  if (argc != 4) return 2;
  const char* const mode = argv[3];
  threads = atol(argv[2]);
  const lstm_ext_setup setup = {BATCH, STEPS, threads};
  if (strcmp(mode, "no_memory") == 0) return without_memory(argv[1], &setup);
  if (strcmp(mode, "in_place") == 0) {
    FILE* file = fopen(argv[1], "rb");
    void* bytes = place(1 << 22);
    const size_t size = fread(bytes, 1, 1 << 22, file);
    size_t needed;
    void* memory = place(1 << 24);
    fclose(file);
    counting = 1;
    check(lstm_ext_model_size(bytes, size, &needed));
    check(lstm_ext_model_create_in(bytes, size, memory, 1 << 24, &model));
    check(lstm_ext_stream_size(model, &setup, &needed));
    counting = 0;
    memory = place(needed);
    counting = 1;
    check(lstm_ext_stream_create_in(model, &setup, memory, needed, &stream));
    counting = 0;
  } else {
    check(lstm_ext_model_load(argv[1], &model));
    check(lstm_ext_stream_create(model, &setup, &stream));
  }
  check(lstm_ext_model_describe(model, &model_is));
  x = place(8 * STEPS * BATCH * (size_t)model_is.input_size);
  y = place(8 * STEPS * BATCH * (size_t)(model_is.directions * model_is.output_size));
  memset(x, 0, 8 * STEPS * BATCH * (size_t)model_is.input_size);
  for (long worker = 1; worker < threads; ++worker) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, (void*)worker) != 0) return 2;
  }
  while (__atomic_load_n(&ready, __ATOMIC_ACQUIRE) != threads - 1) { /* a thread that begins makes system calls */
  }
  if (strncmp(mode, "call", 4) == 0) forbid((int)threads);
  counting = strncmp(mode, "call", 4) != 0;
  __atomic_store_n(&begun, 1, __ATOMIC_RELEASE);
  work(0);
  while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) != threads - 1) {
  }
  if (strcmp(mode, "allocate") == 0) {
    check(lstm_ext_stream_create(model, &setup, &stream));
    lstm_ext_stream_destroy(stream);
  }
  if (strcmp(mode, "call") == 0) syscall(SYS_getppid);
  counting = 0;
  const int length = strcmp(mode, "calls") == 0 ? 0 : snprintf(text, sizeof(text), "%d allocations\n", allocations);
  if (write(1, length ? text : "made all calls\n", length ? (size_t)length : 15) < 0) return 2;
  syscall(SYS_exit_group, 0);
  return 0;
}
