/* vp_engine: verify a vp-export bundle (NAME.vpe), describe it and run its engine.
 *
 * A plain C interface; no C++ exception crosses it. Functions that can fail return a vp_status; the reason is then in
 * vp_engine_last_error() on the same thread: one line that says what was found, what was expected, and what to do.
 *
 *   vp_engine* engine = NULL;
 *   if (vp_engine_open("deit_s.vpe", NULL, &engine) != VP_OK) { puts(vp_engine_last_error()); return 2; }
 *   vp_input  in  = {"images", VP_FLOAT32, 4, {1, 3, 224, 224}, images, sizeof images};
 *   vp_output out = {"logits", VP_FLOAT32, logits, sizeof logits};
 *   if (vp_engine_run(engine, &in, 1, &out, 1) != VP_OK) puts(vp_engine_last_error());
 *   vp_engine_close(engine);
 *
 * Nothing is deserialised or loaded until every file of the bundle has been verified, and the bytes loaded are those
 * that were verified. A digest is a checksum, not a signature. An engine is machine code: before you run a bundle from
 * somebody else, compare the digest in vp_description with one from a source that you trust.
 */
#ifndef VP_ENGINE_VP_ENGINE_H
#define VP_ENGINE_VP_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* Incremented when programs compiled against an older header would no longer work (also the library's SOVERSION). */
#define VP_ENGINE_API_VERSION 1

#if defined(VP_ENGINE_BUILDING)
#define VP_ENGINE_API __attribute__((visibility("default")))
#else
#define VP_ENGINE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Named after the exceptions of Python's vp_engines (engines/vp_engines/errors.py). */
typedef enum vp_status {
  VP_OK = 0,
  VP_ERROR_INPUT = 1,               /* an argument or a tensor has the wrong shape, dtype, name or size */
  VP_ERROR_ENGINE_UNAVAILABLE = 2,  /* this build or machine lacks what the engine needs */
  VP_ERROR_BUNDLE = 3,              /* there is no bundle, or it cannot be read */
  VP_ERROR_BUNDLE_CORRUPT = 4,      /* a file is missing, extra, altered, truncated or unsafe */
  VP_ERROR_BUNDLE_INCOMPATIBLE = 5, /* valid, but this version or machine cannot run it */
  VP_ERROR_INTERNAL = 6             /* out of memory, or the engine failed during a run */
} vp_status;

/* Element types. Engines of format 1 only use float32; the others exist so that mismatches can be reported. */
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

/* Options of vp_engine_open. Start from VP_ENGINE_OPTIONS_INIT, so that members of later versions get defaults. */
typedef struct vp_engine_options {
  size_t struct_size;  /* sizeof(vp_engine_options) of the caller */
  const char* variant; /* "reduced" (also NULL), or "dense", the model included for comparison */
  int32_t threads;     /* CPU threads per run, process-wide; 0: the runtime's default */
  int32_t runners;     /* concurrent runs on one handle (1 to 64; further ones wait); 0 means 1 */
  int32_t verify_only; /* not 0: verify and describe only; nothing is loaded or can be run */
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

/* Description of a bundle. The pointers belong to the engine and are valid until it is closed. */
typedef struct vp_description {
  const char* name;
  const char* format_version;
  const char* digest;    /* sha256 (hex) of the canonical manifest; identifies the whole bundle */
  const char* engine;    /* "aoti", "trt", ... */
  const char* precision; /* "fp32", "fp16" or "bf16"; inputs and outputs are float32 regardless */
  const char* device;    /* "cpu" or "cuda" */
  const char* variant;   /* "reduced" or "dense" */
  int64_t min_batch;     /* batch sizes that the engine was built for; max_batch 0: any */
  int64_t max_batch;
  size_t input_count;
  const vp_tensor_info* inputs;
  size_t output_count;
  const vp_tensor_info* outputs;
  size_t class_count; /* 0: no class names */
  const char* const* classes;
  const char* json; /* all of the above and the preprocessing as one JSON object, UTF-8 */
} vp_description;

/* A batch owned by the caller: C-contiguous, native byte order, aligned to its element. Not modified. */
typedef struct vp_input {
  const char* name; /* NULL: by position */
  vp_dtype dtype;
  size_t rank;
  int64_t shape[VP_MAX_RANK];
  const void* data;
  size_t bytes; /* product of the shape times the element size */
} vp_input;

/* A buffer owned by the caller and filled by the run: C-contiguous, exactly vp_engine_output_bytes bytes. */
typedef struct vp_output {
  const char* name; /* NULL: by position */
  vp_dtype dtype;
  void* data;
  size_t bytes;
} vp_output;

/* VP_ENGINE_API_VERSION of the library, which may be newer than the header. */
VP_ENGINE_API int vp_engine_api_version(void);

/* Engines that this build can load, such as "aoti,trt"; empty if it can only verify. Never NULL. */
VP_ENGINE_API const char* vp_engine_backends(void);

/* Verify every file of the bundle at `path`, check that its engine can run here, and only then load it.
 * `options` may be NULL. On failure *engine is NULL. */
VP_ENGINE_API vp_status vp_engine_open(const char* path, const vp_engine_options* options, vp_engine** engine);

VP_ENGINE_API vp_status vp_engine_describe(const vp_engine* engine, vp_description* description);

/* Size in bytes of output `index` for a batch of `batch` images. */
VP_ENGINE_API vp_status vp_engine_output_bytes(const vp_engine* engine, size_t index, int64_t batch, size_t* bytes);

/* Run one batch. Thread-safe, see vp_engine_options.runners. All inputs must be given; omitted outputs are computed and
 * discarded. On failure the contents of the outputs are undefined. */
VP_ENGINE_API vp_status vp_engine_run(vp_engine* engine, const vp_input* inputs, size_t input_count,
                                      const vp_output* outputs, size_t output_count);

/* Release the engine, after waiting for runs in progress; NULL is ignored. The handle is invalid afterwards. */
VP_ENGINE_API void vp_engine_close(vp_engine* engine);

/* Last failure on this thread, one line without a newline; "" if there was none. Valid until the next failure. */
VP_ENGINE_API const char* vp_engine_last_error(void);

/* Exit code of the vp-export command-line tools for a status: 0, 2 (bad input) or 3 (engine unavailable). */
VP_ENGINE_API int vp_engine_exit_code(vp_status status);

#ifdef __cplusplus
}
#endif

#endif /* VP_ENGINE_VP_ENGINE_H */
