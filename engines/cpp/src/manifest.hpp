// The manifest of a bundle: the checks that a stranger's manifest must pass. Mirrors engines/vp_engines/manifest.py.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace vp {

constexpr int kFormatMajor = 1;
constexpr int kFormatMinor = 0;
constexpr const char* kManifestName = "manifest.json";

// The limits of engines/vp_engines/manifest.py: far above any bundle, far below what would hurt the machine that reads a hostile
// one.
constexpr std::size_t kMaxManifestBytes = std::size_t{8} << 20;
constexpr std::size_t kMaxFiles = 1000;
constexpr std::int64_t kMaxFileBytes = std::int64_t{32} << 30;
constexpr std::size_t kMaxPathParts = 8;
constexpr std::size_t kMaxPathLength = 400;

struct FileEntry {
  std::string path;
  std::int64_t size = 0;
  std::string sha256;
};

struct BatchRange {
  std::int64_t min = 1, opt = 1, max = 1;
};

struct Variant {
  std::string artefact;
  std::vector<std::string> files;
  std::map<std::string, std::string> requirements;  // those that are text
  std::vector<std::string> cpu_flags;               // the one list among them that we know
};

/// -1 in `shape` is a dynamic axis, whose name is in `axes` ("" elsewhere).
struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::string> axes;
};

struct Manifest {
  std::string format_version;
  std::string name;
  std::string digest;  // sha256 (hex) of the canonical form
  std::vector<FileEntry> files;
  std::string engine, engine_version, precision, device;
  std::optional<BatchRange> batch;
  std::map<std::string, Variant> variants;
  std::vector<Tensor> inputs, outputs;
  std::vector<std::string> classes;
  std::string document;  // all of it, canonical, without its digest
};

/// The folder of a variant inside the bundle ("engine/" of "reduced", "dense/" of "dense"), "" where there is no such
/// one.
std::string_view variant_folder(std::string_view variant);

/// Whether `path` may name a file inside a bundle: relative, POSIX, plain ASCII parts, bounded.
bool safe_path(std::string_view path);

/// What vp_description.json says: one JSON object.
std::string summary(const Manifest& manifest, const std::string& variant);

/// Check the bytes of a manifest.
/// Throws Error: VP_ERROR_BUNDLE_CORRUPT, or VP_ERROR_BUNDLE_INCOMPATIBLE for another major version of the format.
Manifest parse_manifest(std::string_view data);

}  // namespace vp
