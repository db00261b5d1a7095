/* LSTM layers for programs in C and C++, without Python and torch: plug-ins, voice activity detectors, controllers.
 *
 * lstm_ext.freeze(layer).save_native(path) writes a weights file in Python. A model is such a file, packed for this
 * processor; it never changes, and any number of streams and threads may use it. A stream has the states and the
 * workspace of one user. Both are opaque.
 *
 * Every function that can fail returns an error: NULL if all went well, else one line that says what is wrong. The line
 * is valid until there are 64 more in the process. A call that fails changes nothing.
 *
 * B sequences run side by side (the batch). T time steps, L layers, D directions, I input features, H hidden units, P
 * output features (H without a projection). Data are float or double, as the description says, contiguous, the last
 * axis fastest.
 *
 * Real time: lstm_ext_step and lstm_ext_run allocate nothing, lock nothing and make no system call. The same holds for
 * their _part variants, except for sched_yield while another worker is late; LSTM_EXT_CPU_WAIT_LIMIT makes such a wait
 * read the clock, too, and end with an error, after which the stream can only be destroyed. All memory is touched when
 * it is created. */
#ifndef LSTM_EXT_H
#define LSTM_EXT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LSTM_EXT_API __attribute__((visibility("default")))
#else
#define LSTM_EXT_API
#endif

/* The library has the same number as this header, or the program was compiled for another one. */
#define LSTM_EXT_ABI_VERSION 1
LSTM_EXT_API uint32_t lstm_ext_abi_version(void);

typedef struct lstm_ext_model lstm_ext_model;
typedef struct lstm_ext_stream lstm_ext_stream;
typedef const char* lstm_ext_error;

/* The instruction set that new models are packed for: the best of this processor, or the one that the environment
 * variable LSTM_EXT_CPU_CAPABILITY names, or lstm_ext_set_capability ("amx", "avx512_bf16", "avx512", "avx2";
 * "neon" on AArch64). A set that the processor or the library lacks is an error. */
LSTM_EXT_API lstm_ext_error lstm_ext_capability(const char** name);
LSTM_EXT_API lstm_ext_error lstm_ext_set_capability(const char* name);

/* ---- models */

/* Reads a weights file, or its bytes in memory, whose address is a multiple of 8. The bytes are not needed any more
 * afterwards. */
LSTM_EXT_API lstm_ext_error lstm_ext_model_load(const char* path, lstm_ext_model** model);
LSTM_EXT_API lstm_ext_error lstm_ext_model_create(const void* bytes, size_t size, lstm_ext_model** model);
/* The same in memory of the caller, at any address: nothing is allocated. `needed` is the memory in bytes, for the
 * instruction set in use. The memory belongs to the model until lstm_ext_model_destroy, which does not free it. */
LSTM_EXT_API lstm_ext_error lstm_ext_model_size(const void* bytes, size_t size, size_t* needed);
LSTM_EXT_API lstm_ext_error lstm_ext_model_create_in(const void* bytes, size_t size, void* memory, size_t memory_size,
                                                     lstm_ext_model** model);
/* Its streams are destroyed before. NULL is left alone. */
LSTM_EXT_API void lstm_ext_model_destroy(lstm_ext_model* model);

enum { LSTM_EXT_FLOAT32 = 0, LSTM_EXT_FLOAT64 = 1 };
enum { LSTM_EXT_WEIGHTS_OWN = 0, LSTM_EXT_WEIGHTS_BFLOAT16 = 1, LSTM_EXT_WEIGHTS_INT8 = 2 };

typedef struct lstm_ext_description {
  int64_t input_size;     /* I */
  int64_t hidden_size;    /* H */
  int64_t output_size;    /* P, of one direction */
  int32_t num_layers;     /* L */
  int32_t directions;     /* D, 1 or 2 */
  int32_t dtype;          /* the type of inputs, outputs and states: LSTM_EXT_FLOAT32 or LSTM_EXT_FLOAT64 */
  int32_t weights;        /* what weight_ih and weight_hh were rounded to: LSTM_EXT_WEIGHTS_... */
  const char* capability; /* the instruction set that the model is packed for; lives as long as the process */
} lstm_ext_description;
LSTM_EXT_API lstm_ext_error lstm_ext_model_describe(const lstm_ext_model* model, lstm_ext_description* description);

/* ---- streams */

typedef struct lstm_ext_setup {
  int64_t batch;     /* B, 1 to 2^20 */
  int64_t max_steps; /* the most steps of one lstm_ext_run, 1 to 2^20 */
  int64_t threads;   /* how many threads compute together, 1 to 256 */
} lstm_ext_setup;

/* The states are zeros. Creation plans each number of steps up to max_steps: 2^20 of them take some seconds. */
LSTM_EXT_API lstm_ext_error lstm_ext_stream_create(const lstm_ext_model* model, const lstm_ext_setup* setup,
                                                   lstm_ext_stream** stream);
/* The same in memory of the caller, as for models. */
LSTM_EXT_API lstm_ext_error lstm_ext_stream_size(const lstm_ext_model* model, const lstm_ext_setup* setup,
                                                 size_t* needed);
LSTM_EXT_API lstm_ext_error lstm_ext_stream_create_in(const lstm_ext_model* model, const lstm_ext_setup* setup,
                                                      void* memory, size_t memory_size, lstm_ext_stream** stream);
LSTM_EXT_API void lstm_ext_stream_destroy(lstm_ext_stream* stream);

/* h (L * D, B, P) and c (L * D, B, H), which a call reads and replaces. Between two calls they may be read and written.
 * Reset sets both to zeros. NULL for a stream that is NULL. */
LSTM_EXT_API void* lstm_ext_stream_h(lstm_ext_stream* stream);
LSTM_EXT_API void* lstm_ext_stream_c(lstm_ext_stream* stream);
LSTM_EXT_API lstm_ext_error lstm_ext_stream_reset(lstm_ext_stream* stream);

/* One time step: x (B, I), y (B, P). Not for a model of two directions, whose second one needs the steps that follow.
 * T steps in one call: x (T, B, I), y (T, B, D * P), T from 1 to max_steps. x and y do not overlap. Both are for
 * streams of one thread. */
LSTM_EXT_API lstm_ext_error lstm_ext_step(lstm_ext_stream* stream, const void* x, void* y);
LSTM_EXT_API lstm_ext_error lstm_ext_run(lstm_ext_stream* stream, const void* x, int64_t steps, void* y);

/* The same with several threads, which are the caller's: each calls it with a worker of its own, 0 to threads - 1, and
 * with the same other arguments. The calls begin when all workers have come and return when all are done. So one of
 * the threads may write x before its call and read y after it, while the others do nothing but call. A worker that
 * waits spins. A small layer leaves some workers without work; they come all the same. */
LSTM_EXT_API lstm_ext_error lstm_ext_step_part(lstm_ext_stream* stream, const void* x, void* y, int64_t worker);
LSTM_EXT_API lstm_ext_error lstm_ext_run_part(lstm_ext_stream* stream, const void* x, int64_t steps, void* y,
                                              int64_t worker);

#ifdef __cplusplus
}
#endif

#endif
