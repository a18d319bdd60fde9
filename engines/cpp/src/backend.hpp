// What an engine's backend offers: open from verified content, run a batch. One file in backends/ per engine.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "file.hpp"
#include "manifest.hpp"

namespace vp {

class Runner {
 public:
  Runner() = default;
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  virtual ~Runner() = default;

  /// Run one batch; any thread may call it. Buffers are in the manifest's order and of the sizes that it gives them.
  /// A null output is not wanted. Throws Error.
  virtual void run(const std::vector<const void*>& inputs, std::int64_t batch, const std::vector<void*>& outputs) = 0;
};

struct OpenRequest {
  const Manifest& manifest;
  const Variant& variant;
  std::map<std::string, SealedFile> contents;  // of the variant's files, verified
  int threads = 0;                             // 0: the runtime's own choice
  int runners = 1;
};

using OpenFunction = std::unique_ptr<Runner> (*)(OpenRequest request);

#ifdef VP_ENGINE_AOTI
std::unique_ptr<Runner> open_aoti(OpenRequest request);
#endif
#ifdef VP_ENGINE_TENSORRT
std::unique_ptr<Runner> open_tensorrt(OpenRequest request);
#endif

/// A requirement as text; "" where it is absent or no text.
std::string requirement(const Variant& variant, const char* name);

/// Shape of a tensor for that batch size.
std::vector<std::int64_t> shape_of(const Tensor& tensor, std::int64_t batch);

std::size_t bytes_of(const Tensor& tensor, std::int64_t batch);

}  // namespace vp
