/* vp_engine: verify a vp-export bundle (NAME.vpe), describe it and run its engine.
 *
 * A pure C interface; no C++ exception crosses it. Every function that can fail returns a vp_status; what went wrong is
 * then in vp_engine_last_error() of the same thread: one line that says what was found, what was expected, what to do.
 *
 *   vp_engine* engine = NULL;
 *   if (vp_engine_open("deit_s.vpe", NULL, &engine) != VP_OK) { puts(vp_engine_last_error()); return 2; }
 *   vp_input  in  = {"images", VP_FLOAT32, 4, {1, 3, 224, 224}, images, sizeof images};
 *   vp_output out = {"logits", VP_FLOAT32, logits, sizeof logits};
 *   if (vp_engine_run(engine, &in, 1, &out, 1) != VP_OK) puts(vp_engine_last_error());
 *   vp_engine_close(engine);
 *
 * Nothing of a bundle is deserialised or loaded before every one of its files has been verified, and what is loaded are
 * the very bytes that were verified. A digest is a checksum and no signature: an engine is machine code, so compare the
 * digest of vp_engine_describe with one from a source you trust before you run a stranger's bundle.
 */
#ifndef VP_ENGINE_VP_ENGINE_H
#define VP_ENGINE_VP_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* Raised when a program compiled against an older header would no longer work with the library (also its SOVERSION). */
#define VP_ENGINE_API_VERSION 1

#if defined(VP_ENGINE_BUILDING)
#define VP_ENGINE_API __attribute__((visibility("default")))
#else
#define VP_ENGINE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What Python's vp_engines raises, by the same names (engines/vp_engines/errors.py). */
typedef enum vp_status {
  VP_OK = 0,
  VP_ERROR_INPUT = 1,               /* an argument or a tensor has the wrong shape, dtype, name or size */
  VP_ERROR_ENGINE_UNAVAILABLE = 2,  /* this build or this machine lacks what the engine needs */
  VP_ERROR_BUNDLE = 3,              /* no bundle there, or it cannot be read */
  VP_ERROR_BUNDLE_CORRUPT = 4,      /* not what its manifest says: missing, extra, altered, truncated, unsafe */
  VP_ERROR_BUNDLE_INCOMPATIBLE = 5, /* sound, but this version or this machine cannot run it */
  VP_ERROR_INTERNAL = 6             /* out of memory, or the engine failed while it ran */
} vp_status;

/* Element types. Engines of format 1 take and give float32 only; the others let a caller say what it really has. */
typedef enum vp_dtype {
  VP_FLOAT32 = 1,
  VP_FLOAT64 = 2,
  VP_FLOAT16 = 3,
  VP_BFLOAT16 = 4,
  VP_INT32 = 5,
  VP_INT64 = 6,
  VP_UINT8 = 7
} vp_dtype;

#define VP_MAX_RANK 8

typedef struct vp_engine vp_engine;

/* How to open. Start from VP_ENGINE_OPTIONS_INIT, so that members of later versions get their defaults. */
typedef struct vp_engine_options {
  size_t struct_size;  /* sizeof(vp_engine_options) of the caller */
  const char* variant; /* "reduced" (also NULL), or "dense": the model that travels with it for comparison */
  int32_t threads;     /* CPU threads of one run, for the whole process; 0: the runtime's own choice */
  int32_t runners;     /* runs that may be under way at once on one handle (1 to 64; more wait); 0 means 1 */
  int32_t verify_only; /* not 0: verify and describe; nothing is loaded and nothing can be run */
} vp_engine_options;

#define VP_ENGINE_OPTIONS_INIT \
  { sizeof(vp_engine_options), NULL, 0, 0, 0 }

/* Name, type and shape of an input or output. -1 is a dynamic axis (axis 0 is the batch). */
typedef struct vp_tensor_info {
  const char* name;
  vp_dtype dtype;
  size_t rank;
  int64_t shape[VP_MAX_RANK];
} vp_tensor_info;

/* What a bundle is. The pointers belong to the engine and live until it is closed. */
typedef struct vp_description {
  const char* name;
  const char* format_version;
  const char* digest;    /* sha256 (hex) of the canonical manifest: the identity of the whole bundle */
  const char* engine;    /* "aoti", "trt", ... */
  const char* precision; /* "fp32", "fp16" or "bf16": inside; inputs and outputs stay float32 */
  const char* device;    /* "cpu" or "cuda" */
  const char* variant;   /* "reduced" or "dense" */
  int64_t min_batch;     /* batch sizes that the engine was built for; max_batch 0: any */
  int64_t max_batch;
  size_t input_count;
  const vp_tensor_info* inputs;
  size_t output_count;
  const vp_tensor_info* outputs;
  size_t class_count; /* 0: the bundle names no classes */
  const char* const* classes;
  const char* json; /* all of the above and the preprocessing as one JSON object, UTF-8 */
} vp_description;

/* A batch that the caller owns: C-contiguous, native byte order, aligned to its element. It is only read. */
typedef struct vp_input {
  const char* name; /* NULL: by position */
  vp_dtype dtype;
  size_t rank;
  int64_t shape[VP_MAX_RANK];
  const void* data;
  size_t bytes; /* must be the product of the shape times the element's size */
} vp_input;

/* A buffer that the caller owns and that the run fills: C-contiguous, of exactly vp_engine_output_bytes bytes. */
typedef struct vp_output {
  const char* name; /* NULL: by position */
  vp_dtype dtype;
  void* data;
  size_t bytes;
} vp_output;

/* VP_ENGINE_API_VERSION of the library itself, which may be newer than the header. */
VP_ENGINE_API int vp_engine_api_version(void);

/* The engines that this build can load, as "aoti,trt"; empty where it only verifies. Never NULL. */
VP_ENGINE_API const char* vp_engine_backends(void);

/* Verify every file of the bundle at `path`, check that its engine can run here, and only then load it.
 * `options` may be NULL. On failure *engine is NULL. */
VP_ENGINE_API vp_status vp_engine_open(const char* path, const vp_engine_options* options, vp_engine** engine);

VP_ENGINE_API vp_status vp_engine_describe(const vp_engine* engine, vp_description* description);

/* Bytes that output `index` takes for a batch of that many images. */
VP_ENGINE_API vp_status vp_engine_output_bytes(const vp_engine* engine, size_t index, int64_t batch, size_t* bytes);

/* Run one batch. Any number of threads may call this on one handle; see vp_engine_options.runners. All inputs have to
 * be given; an output that is left out is computed and thrown away. On failure the outputs hold nothing of use. */
VP_ENGINE_API vp_status vp_engine_run(vp_engine* engine, const vp_input* inputs, size_t input_count,
                                      const vp_output* outputs, size_t output_count);

/* Release the engine; NULL is fine. Runs under way are waited for; no call may be started with the handle after it. */
VP_ENGINE_API void vp_engine_close(vp_engine* engine);

/* The last failure in this thread, one line without a newline; "" where there was none. Lives until the next one. */
VP_ENGINE_API const char* vp_engine_last_error(void);

/* The exit code that the command line tools of vp-export give a status: 0, 2 (bad input) or 3 (engine unavailable). */
VP_ENGINE_API int vp_engine_exit_code(vp_status status);

#ifdef __cplusplus
}
#endif

#endif /* VP_ENGINE_VP_ENGINE_H */
