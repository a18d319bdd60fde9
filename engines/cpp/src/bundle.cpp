#include "bundle.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <optional>
#include <set>
#include <system_error>
#include <thread>
#include <vector>

#include "error.hpp"
#include "sha256.hpp"

namespace vp {

std::function<void()> testing::after_listing;

namespace {

using Identity = std::optional<std::pair<dev_t, ino_t>>;

/// Identity of what `path` leads to.
Identity identity(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return std::nullopt;
  return std::pair{status.st_dev, status.st_ino};
}

Manifest read_manifest(int root) {
  struct stat status {};
  if (::fstatat(root, kManifestName, &status, AT_SYMLINK_NOFOLLOW) != 0 && errno == ENOENT) {
    throw Error(VP_ERROR_BUNDLE_CORRUPT,
                std::string(kManifestName) + " is missing: this folder is not a bundle, or not a whole one",
                "a folder that vp-export wrote", "check the path, or export again");
  }
  const auto [file, size] = open_inside(root, kManifestName);
  if (size > kMaxManifestBytes) {
    throw corrupt(std::string(kManifestName) + " is " + std::to_string(size) + " bytes long",
                  "at most " + std::to_string(kMaxManifestBytes));
  }
  std::string data;
  read_chunks(file.get(), size, [&](const char* chunk, std::size_t count) { data.append(chunk, count); });
  return parse_manifest(data);
}

/// Check that the folder holds exactly the files that the manifest lists, by name and file type.
void check_closed_world(int root, const Manifest& manifest) {
  std::set<std::string> files = {kManifestName}, folders, missing;
  for (const auto& entry : manifest.files) {
    files.insert(entry.path);
    for (auto slash = entry.path.find('/'); slash != std::string::npos; slash = entry.path.find('/', slash + 1)) {
      folders.insert(entry.path.substr(0, slash));
    }
  }
  missing.insert(files.begin(), files.end());
  missing.insert(folders.begin(), folders.end());
  std::vector<std::string> problems;
  walk(root, [&](const std::string& path, mode_t mode) {
    missing.erase(path);
    if (!S_ISDIR(mode) && !S_ISREG(mode)) {
      problems.push_back(quote(path) + " is " + kind_of(mode));
    } else if ((S_ISDIR(mode) ? folders : files).count(path) == 0) {
      problems.push_back(quote(path) + " is not in the manifest");
    }
  });
  for (const auto& path : missing) problems.push_back(quote(path) + " is missing");
  if (problems.empty()) return;
  std::string text;
  for (std::size_t i = 0; i < problems.size() && i < 5; ++i) text += (i == 0 ? "" : ", ") + problems[i];
  if (problems.size() > 5) text += " and " + std::to_string(problems.size() - 5) + " more";
  throw corrupt(text, "exactly the files that the manifest lists");
}

/// Check one file; returns its content if it is to be kept.
std::optional<SealedFile> read_file(int root, const FileEntry& entry, bool keep) {
  const auto [file, size] = open_inside(root, entry.path);
  if (size != static_cast<std::size_t>(entry.size)) {  // before reading, so that a huge file costs nothing
    throw corrupt(quote(entry.path) + " has " + std::to_string(size) + " bytes", std::to_string(entry.size));
  }
  std::optional<SealedFile> content;
  if (keep) content.emplace();
  Sha256 hasher;
  read_chunks(file.get(), size, [&](const char* chunk, std::size_t count) {
    hasher.update(chunk, count);
    if (content) content->append(chunk, count);
  });
  const std::string hash = hasher.hex();
  if (hash != entry.sha256) {
    throw corrupt(quote(entry.path) + " has sha256 " + hash.substr(0, 16) + "...", entry.sha256.substr(0, 16) + "...");
  }
  if (content) content->seal();
  return content;
}

Bundle read_once(const std::string& path, const std::function<bool(const std::string&)>& keep) {
  const Fd root = open_root(path);
  Bundle bundle{read_manifest(root.get()), {}};
  check_closed_world(root.get(), bundle.manifest);
  if (testing::after_listing) testing::after_listing();

  // The two big files are the engine and its dense counterpart: one core each.
  auto entries = bundle.manifest.files;
  std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.size > b.size; });
  std::vector<std::optional<SealedFile>> contents(entries.size());
  std::vector<std::exception_ptr> failures(entries.size());
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    for (std::size_t i = next++; i < entries.size() && !failed; i = next++) {
      try {
        contents[i] = read_file(root.get(), entries[i], keep(entries[i].path));
      } catch (...) {
        failures[i] = std::current_exception();
        failed = true;
      }
    }
  };
  const std::size_t cores = std::max(1U, std::thread::hardware_concurrency());
  std::vector<std::thread> helpers;
  try {
    while (helpers.size() + 1 < std::min({std::size_t{4}, cores, entries.size()})) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // Cannot start more threads: continue with those running.
  }
  work();
  for (auto& helper : helpers) helper.join();
  for (const auto& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (contents[i]) bundle.contents.emplace(entries[i].path, std::move(*contents[i]));
  }
  return bundle;
}

}  // namespace

Bundle read_bundle(const std::string& path, const std::function<bool(const std::string& path)>& keep) {
  while (true) {
    const Identity before = identity(path);
    try {
      return read_once(path, keep);
    } catch (const Error&) {
      // An export may have replaced the bundle while it was being read.
      if (identity(path) == before) throw;
    }
  }
}

}  // namespace vp
