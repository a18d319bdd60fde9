#include "manifest.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <set>
#include <stdexcept>

#include "error.hpp"
#include "fields.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace vp {
namespace {

Error manifest_corrupt(const std::string& problem, const std::string& expected = "") {
  return corrupt(std::string(kManifestName) + ": " + problem, expected);
}

std::string lower(std::string_view text) {
  std::string out(text);
  for (auto& letter : out) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return out;
}

// Locale-independent, ASCII only.
bool is_digit(char letter) { return letter >= '0' && letter <= '9'; }
bool is_word(char letter) {
  return is_digit(letter) || (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') || letter == '_';
}

bool safe_part(std::string_view part) {
  if (part.empty() || part.size() > 128 || !is_word(part.front())) return false;
  if (!is_word(part.back()) && part.back() != '+' && part.back() != '-')
    return false;  // Windows drops a trailing dot
  const auto allowed = [](char letter) { return is_word(letter) || letter == '.' || letter == '+' || letter == '-'; };
  if (!std::all_of(part.begin(), part.end(), allowed)) return false;
  const std::string stem = lower(part.substr(0, part.find('.')));
  if (stem == "con" || stem == "prn" || stem == "aux" || stem == "nul") return false;  // reserved on Windows
  return !(stem.size() == 4 && is_digit(stem[3]) && (stem.rfind("com", 0) == 0 || stem.rfind("lpt", 0) == 0));
}

std::vector<std::string_view> parts_of(std::string_view path) {
  std::vector<std::string_view> parts;
  while (true) {
    const auto slash = path.find('/');
    parts.push_back(path.substr(0, slash));
    if (slash == std::string_view::npos) return parts;
    path.remove_prefix(slash + 1);
  }
}

/// Rejects paths that collide on a case-insensitive disk, or that are both a file and a folder.
void check_paths_together(const std::vector<FileEntry>& files) {
  std::map<std::string, std::string> seen = {{kManifestName, kManifestName}};
  for (const auto& [path, size, hash] : files) {
    const auto [twin, fresh] = seen.emplace(lower(path), path);
    if (!fresh) {
      throw manifest_corrupt(quote(path) + " and " + quote(twin->second) + " are the same file where case is ignored");
    }
  }
  std::map<std::string, std::string> folders;  // lower case -> spelling used
  for (const auto& [path, size, hash] : files) {
    for (auto slash = path.find('/'); slash != std::string::npos; slash = path.find('/', slash + 1)) {
      const auto folder = path.substr(0, slash);
      if (seen.count(lower(folder)) != 0 || folders.emplace(lower(folder), folder).first->second != folder) {
        throw manifest_corrupt("folder " + quote(folder) + " of " + quote(path) + " clashes with another name");
      }
    }
  }
}

/// Whether a newer minor version wrote the document.
bool check_version(const Json& document) {
  const auto text = [&](const char* key) {
    const auto found = document.find(key);
    return found != document.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  if (text("format") != "vpe") throw manifest_corrupt("has format " + quote(text("format"), 40), "'vpe'");
  const std::string version = text("format_version");
  const auto number = [](std::string_view digits) {
    const bool plain = !digits.empty() && digits.size() <= 6 && std::all_of(digits.begin(), digits.end(), is_digit);
    return plain && (digits.size() == 1 || digits[0] != '0') ? std::stoi(std::string(digits)) : -1;
  };
  const auto dot = version.find('.');
  const int major = dot == std::string::npos ? -1 : number(std::string_view(version).substr(0, dot));
  const int minor = dot == std::string::npos ? -1 : number(std::string_view(version).substr(dot + 1));
  if (major < 0 || minor < 0) {
    throw manifest_corrupt("has format_version " + quote(version, 40), "two numbers, as in '1.0'");
  }
  if (major != kFormatMajor) {
    throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE, "the bundle has format version " + version,
                std::to_string(kFormatMajor) + ".x",
                major > kFormatMajor ? "upgrade vp_engine" : "export the model again with this version");
  }
  return minor > kFormatMinor;
}

bool real_time(const std::string& text) {  // 2026-11-21T03:24:00Z, rejecting e.g. 31 November
  int year = 0, month = 0, day = 0, hour = 0, minute = 0, second = 0, end = 0;
  if (text.size() != 20 || text.find_first_of(" +") != std::string::npos ||
      std::sscanf(text.c_str(), "%4d-%2d-%2dT%2d:%2d:%2dZ%n", &year, &month, &day, &hour, &minute, &second, &end) !=
          6 ||
      end != 20 || year < 1 || month < 1 || month > 12) {
    return false;
  }
  const bool leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
  const std::array<int, 12> days = {31, leap ? 29 : 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
  return day >= 1 && day <= days[static_cast<std::size_t>(month - 1)] && hour >= 0 && hour < 24 && minute >= 0 &&
         minute < 60 && second >= 0 && second <= 61;
}

/// The schema, in the order of engines/vp_engines/manifest.py.
class Reader {
 public:
  Reader(const Json& document, Manifest& manifest, bool newer) : document_(document), out_(manifest), newer_(newer) {}

  void read() {
    Members top{Field(document_, "")};
    top.need("format");
    out_.format_version = top.need("format_version").name();
    out_.name = top.need("name").name();
    const Field created = top.need("created");
    if (!real_time(created.text())) created.refuse("a time as in 2026-11-21T03:24:00Z");
    Members tool(top.need("tool"));
    tool.need("name").name();
    tool.need("version").name();
    tool.done(newer_);
    for (const auto& item : top.need("files").items(1, kMaxFiles)) file(item);
    engine(top.need("engine"));
    variants(top.need("variants"));
    for (const auto& item : top.need("inputs").items(1)) out_.inputs.push_back(tensor(item));
    for (const auto& item : top.need("outputs").items(1)) out_.outputs.push_back(tensor(item));
    preprocessing(top.need("preprocessing"));
    const Field classes = top.need("classes");
    if (!classes.is_null()) out_.classes = classes.texts();
    const auto class_count = model(top.need("model"));
    plan(top.need("plan"));
    validation(top.need("validation"));
    top.need("kernels").name();
    top.done(newer_);
    consistent(class_count, !classes.is_null());
  }

 private:
  void file(const Field& field) {
    Members members(field);
    out_.files.push_back(
        {members.need("path").path(), members.need("size").whole(0, kMaxFileBytes), members.need("sha256").sha256()});
    members.done(newer_);
  }

  void engine(const Field& field) {
    Members members(field);
    out_.engine = members.need("name").name();
    out_.engine_version = members.need("version").name();
    out_.precision = members.need("precision").one_of({"fp32", "fp16", "bf16"});
    out_.device = members.need("device").one_of({"cpu", "cuda"});
    const Field batch = members.maybe("batch");
    members.done(newer_);
    if (batch.is_null()) return;
    Members sizes(batch);
    out_.batch = BatchRange{sizes.need("min").whole(), sizes.need("opt").whole(), sizes.need("max").whole()};
    sizes.done(newer_);
    if (out_.batch->min > out_.batch->opt || out_.batch->opt > out_.batch->max) {
      throw manifest_corrupt("engine.batch: min, opt and max are not in order");
    }
  }

  void variants(const Field& field) {
    Members all(field);
    for (const auto& item : field.json().items()) {
      if (variant_folder(item.key()).empty()) continue;
      const Field one = all.need(item.key().c_str());
      Members members(one);
      Variant variant;
      variant.artefact = members.need("artefact").path();
      for (const auto& path : members.need("files").items(1)) variant.files.push_back(path.path());
      const Field requirements = members.maybe("requirements");
      if (!requirements.is_null()) read_requirements(requirements, variant);
      const Field notes = members.maybe("notes");
      if (!notes.is_null()) notes.texts();
      members.done(newer_);
      out_.variants.emplace(item.key(), std::move(variant));
    }
    all.done(newer_);
  }

  /// Requirements differ between engines, so any member is allowed.
  static void read_requirements(const Field& field, Variant& variant) {
    if (!field.json().is_object()) field.refuse("an object");
    for (const auto& item : field.json().items()) {
      if (const auto* text = item.value().get_ptr<const std::string*>()) variant.requirements[item.key()] = *text;
    }
    const auto flags = field.json().find("cpu_flags");
    if (flags == field.json().end() || !flags->is_array()) return;
    // Convert non-strings to something that no processor lists.
    for (const auto& flag : *flags)
      variant.cpu_flags.push_back(flag.is_string() ? flag.get<std::string>() : flag.dump());
  }

  Tensor tensor(const Field& field) {
    Members members(field);
    Tensor tensor;
    tensor.name = members.need("name").name();
    tensor.dtype = members.need("dtype").name();
    for (const auto& axis : members.need("shape").items()) {
      const bool dynamic = axis.json().is_string();
      tensor.axes.push_back(dynamic ? axis.name() : "");
      tensor.shape.push_back(dynamic ? -1 : axis.whole());
    }
    members.done(newer_);
    return tensor;
  }

  void preprocessing(const Field& field) {
    Members members(field);
    const auto sizes = members.need("input_size").items(3, 3);
    if (sizes[0].whole() != 3) sizes[0].refuse("3");
    for (const auto& size : sizes) input_size_.push_back(size.whole());
    const Field resize = members.need("resize");
    if (!resize.is_null()) one_or_two(resize);
    members.need("crop_mode").one_of({"center", "squash", "border"});
    members.need("interpolation").one_of({"bicubic", "bilinear", "nearest", "lanczos"});
    for (const auto& value : members.need("mean").items(3, 3)) value.number();
    for (const auto& value : members.need("std").items(3, 3)) {
      if (!(value.number() > 0)) value.refuse("a number above 0");
    }
    members.done(newer_);
  }

  static void one_or_two(const Field& field) {  // n, or [height, width]
    if (!field.json().is_array()) {
      field.whole();
    } else {
      for (const auto& size : field.items(2, 2)) size.whole();
    }
  }

  std::int64_t model(const Field& field) {
    Members members(field);
    members.need("name").name();
    const auto count = members.need("num_classes").whole(0, INT64_MAX);
    one_or_two(members.need("img_size"));
    one_or_two(members.need("patch_size"));
    members.need("weights_sha256").sha256();
    members.need("weights_source").text();
    members.done(newer_);
    return count;
  }

  void plan(const Field& field) {
    Members members(field);
    plan_ = members.need("path").path();
    members.need("fingerprint").name();
    members.need("method").name();
    members.need("macs_dense").whole(0, INT64_MAX);
    members.need("macs_reduced").whole(0, INT64_MAX);
    for (const auto& block : members.need("tokens").items()) {
      if (!block.json().is_array()) {
        block.whole(0, INT64_MAX);
      } else {
        for (const auto& count : block.items()) count.whole(0, INT64_MAX);
      }
    }
    members.done(newer_);
  }

  void validation(const Field& field) {
    Members members(field);
    members.need("status").one_of({"passed", "failed", "measured", "unvalidated"});
    members.need("accuracy").one_of({"measured", "unmeasured"});
    members.need("latency").one_of({"measured", "unmeasured"});
    members.need("summary").text();
    members.done(newer_);
  }

  void consistent(std::int64_t class_count, bool has_classes) const {
    check_paths_together(out_.files);
    std::set<std::string> known;
    for (const auto& entry : out_.files) known.insert(entry.path);
    if (out_.variants.count("reduced") == 0) throw manifest_corrupt("variants has no 'reduced'");
    for (const auto& [key, variant] : out_.variants) {
      const auto folder = variant_folder(key);
      for (const auto& path : variant.files) {
        if (known.count(path) == 0 || path.rfind(folder, 0) != 0) {
          throw manifest_corrupt("variant '" + key + "' names " + quote(path) + ", which is not a listed file in " +
                                 std::string(folder));
        }
      }
      if (std::find(variant.files.begin(), variant.files.end(), variant.artefact) == variant.files.end()) {
        throw manifest_corrupt("variant '" + key + "' starts from " + quote(variant.artefact) +
                               ", which is not among its files");
      }
    }
    if (known.count(plan_) == 0) throw manifest_corrupt("the plan " + quote(plan_) + " is not a listed file");
    if (has_classes && static_cast<std::int64_t>(out_.classes.size()) != class_count) {
      throw manifest_corrupt(std::to_string(out_.classes.size()) + " class names for a model of " +
                             std::to_string(class_count) + " classes");
    }
    const auto& shape = out_.inputs[0].shape;
    if (shape.size() != 4 || !std::equal(shape.begin() + 1, shape.end(), input_size_.begin())) {
      throw manifest_corrupt("the first input does not take what the preprocessing makes");
    }
  }

  const Json& document_;
  Manifest& out_;
  const bool newer_;
  std::vector<std::int64_t> input_size_;
  std::string plan_;
};

}  // namespace

std::string_view variant_folder(std::string_view variant) {
  return variant == "reduced" ? "engine/" : variant == "dense" ? "dense/" : "";
}

bool safe_path(std::string_view path) {
  if (path.size() > kMaxPathLength) return false;
  const auto parts = parts_of(path);
  return parts.size() <= kMaxPathParts && std::all_of(parts.begin(), parts.end(), safe_part);
}

Manifest parse_manifest(std::string_view data) {
  if (data.size() > kMaxManifestBytes) {
    throw manifest_corrupt("is " + std::to_string(data.size()) + " bytes long",
                           "at most " + std::to_string(kMaxManifestBytes));
  }
  Manifest manifest;
  Json document;
  try {
    document = parse_json(data);
  } catch (const std::invalid_argument& error) {
    throw manifest_corrupt(error.what());
  }
  const bool newer = check_version(document);
  const auto told = document.find("digest");
  const std::string digest = told != document.end() && told->is_string() ? told->get<std::string>() : "";
  document.erase("digest");
  manifest.document = canonical_json(document);
  manifest.digest = sha256_hex(manifest.document);
  if (digest != manifest.digest) throw manifest_corrupt("has the digest " + quote(digest, 64), manifest.digest);
  Reader(document, manifest, newer).read();
  return manifest;
}

std::string summary(const Manifest& manifest, const std::string& variant) {
  const Json document = Json::parse(manifest.document);
  Json out = {{"digest", manifest.digest}, {"variant", variant}};
  for (const char* member :
       {"name", "format_version", "engine", "inputs", "outputs", "preprocessing", "classes", "validation"}) {
    out[member] = document.at(member);
  }
  return out.dump();
}

}  // namespace vp
