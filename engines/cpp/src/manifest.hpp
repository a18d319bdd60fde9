// Manifest of a bundle: checks of an untrusted manifest. Mirrors engines/vp_engines/manifest.py.
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

// Limits of engines/vp_engines/manifest.py: far above any real bundle, harmless to read from an untrusted one.
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
  std::map<std::string, std::string> requirements;  // those that are strings
  std::vector<std::string> cpu_flags;               // the only list that is used
};

/// -1 in `shape` is a dynamic axis; its name is in `axes` ("" elsewhere).
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
  std::string document;  // canonical, without its digest
};

/// Folder of a variant inside the bundle ("engine/" for "reduced", "dense/" for "dense"), "" if it has none.
std::string_view variant_folder(std::string_view variant);

/// Whether `path` is a valid file path inside a bundle: relative, POSIX, plain ASCII parts, bounded in length.
bool safe_path(std::string_view path);

/// Content of vp_description.json, a JSON object.
std::string summary(const Manifest& manifest, const std::string& variant);

/// Check the content of a manifest file.
/// Throws Error: VP_ERROR_BUNDLE_CORRUPT, or VP_ERROR_BUNDLE_INCOMPATIBLE for another major version of the format.
Manifest parse_manifest(std::string_view data);

}  // namespace vp
