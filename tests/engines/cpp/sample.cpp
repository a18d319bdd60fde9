#include "sample.hpp"

#include <unistd.h>

#include <fstream>
#include <iterator>
#include <stdexcept>

#include "json.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace vp::testing {

Sample::Sample(const std::string& engine) {
  std::string folder = (fs::temp_directory_path() / "vp-engine-test-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) throw std::runtime_error("no temporary folder");
  around_ = folder;
  path_ = around_ / "a.vpe";
  files_ = {{"plan.json", "{\"plan\": 1}\n"},
            {"engine/model.pt2", std::string(300'000, 'm')},
            {"engine/more/weights.bin", std::string(5000, 'w')},
            {"dense/model.pt2", "dense model"},
            {"report.json", "{}\n"},
            {"empty.txt", ""}};
  Json document = Json::parse(R"({
    "format": "vpe", "format_version": "1.0", "name": "tiny \u017c\u00f3\u0142w", "created": "2026-11-21T03:24:00Z",
    "tool": {"name": "vp-export", "version": "0.1.0"}, "files": [],
    "engine": {"name": "aoti", "version": "2.11", "precision": "fp32", "device": "cpu",
               "batch": {"min": 1, "opt": 8, "max": 64}},
    "variants": {
      "reduced": {"artefact": "engine/model.pt2", "files": ["engine/model.pt2", "engine/more/weights.bin"],
                  "requirements": {"torch": "0.0", "nested": [1, 2.5, null, {"a": true}]}, "notes": ["one note"]},
      "dense": {"artefact": "dense/model.pt2", "files": ["dense/model.pt2"], "requirements": {}, "notes": []}},
    "inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 4, 4]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
    "preprocessing": {"input_size": [3, 4, 4], "resize": 4, "crop_mode": "center", "interpolation": "bicubic",
                      "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "classes": ["cat", "dog"],
    "model": {"name": "vit_tiny", "num_classes": 2, "img_size": [4, 4], "patch_size": [2, 2], "weights_sha256": "",
              "weights_source": "a test"},
    "plan": {"path": "plan.json", "fingerprint": "cd", "method": "mask", "macs_dense": 1000, "macs_reduced": 600,
             "tokens": [5, 5, [4, 3]]},
    "validation": {"status": "unvalidated", "accuracy": "unmeasured", "latency": "unmeasured", "summary": "no"},
    "kernels": "portable"})");
  document["engine"]["name"] = engine;
  document["model"]["weights_sha256"] = std::string(64, 'a');
  for (const auto& [name, content] : files_) {
    put(name, content);
    document["files"].push_back({{"path", name}, {"size", content.size()}, {"sha256", sha256_hex(content)}});
  }
  document_ = document.dump();
  forge("[]");
}

Sample::~Sample() {
  std::error_code ignored;
  fs::remove_all(around_, ignored);
}

std::string Sample::patched(const std::string& patch) const {
  Json document = Json::parse(document_).patch(Json::parse(patch));
  document["digest"] = sha256_hex(canonical_json(document));
  return canonical_json(document);
}

std::string Sample::listing(const std::string& path, const std::string& content) {
  const Json entry = {{"path", path}, {"size", content.size()}, {"sha256", sha256_hex(content)}};
  return set("/files/-", entry.dump());
}

std::string set(const std::string& pointer, const std::string& value) {
  // "add" replaces a member of an object, but inserts into a list.
  const bool item = pointer.back() >= '0' && pointer.back() <= '9';
  return std::string("[{\"op\": ") + (item ? "\"replace\"" : "\"add\"") + ", \"path\": " + text(pointer) +
         ", \"value\": " + value + "}]";
}

std::string drop(const std::string& pointer) { return "[{\"op\": \"remove\", \"path\": " + text(pointer) + "}]"; }

std::string text(const std::string& content) { return Json(content).dump(); }

void Sample::put(const std::string& name, const std::string& content) const {
  fs::create_directories((path_ / name).parent_path());
  std::ofstream(path_ / name, std::ios::binary) << content;
}

std::string slurp(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace vp::testing
