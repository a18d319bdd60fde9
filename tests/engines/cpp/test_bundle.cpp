// Damaged and malicious bundles: each is rejected quickly, naming the file. Mirrors
// tests/engines/test_bundle_attacks.py.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "bundle.hpp"
#include "sample.hpp"

namespace {

namespace fs = std::filesystem;
using vp::testing::expect_error;
using vp::testing::Sample;
using vp::testing::set;
using vp::testing::slurp;

vp::Bundle read(const fs::path& path) {
  return vp::read_bundle(path.string(), [](const std::string&) { return true; });
}

void refused(const Sample& sample, const std::string& text) {
  expect_error(VP_ERROR_BUNDLE_CORRUPT, text, [&] { read(sample.path()); });
  expect_error(VP_ERROR_BUNDLE_CORRUPT, text,
               [&] { vp::read_bundle(sample.path().string(), [](const std::string&) { return false; }); });
}

std::string content(const vp::SealedFile& file) {
  const vp::MappedFile view(file.path(), file.size());
  return {static_cast<const char*>(view.data()), view.size()};
}

struct Hook {  // called between listing and reading
  explicit Hook(std::function<void()> hook) { vp::testing::after_listing = std::move(hook); }
  ~Hook() { vp::testing::after_listing = nullptr; }
};

TEST(Bundle, ASoundOneGivesTheBytesThatWereHashed) {
  const Sample sample;
  const auto bundle = read(sample.path());
  ASSERT_EQ(bundle.contents.size(), sample.files().size());
  for (const auto& [name, wanted] : sample.files()) EXPECT_EQ(content(bundle.contents.at(name)), wanted) << name;
  const auto some =
      vp::read_bundle(sample.path().string(), [](const std::string& name) { return name == "plan.json"; });
  EXPECT_EQ(some.contents.size(), 1U);
}

TEST(Bundle, WhatWasKeptCannotBeChanged) {
  const Sample sample;
  const auto bundle = read(sample.path());
  sample.put("engine/model.pt2", "evil");
  const auto& kept = bundle.contents.at("engine/model.pt2");
  std::FILE* file = std::fopen(kept.path().c_str(), "r+b");
  if (file != nullptr) {
    std::fputs("evil", file);
    std::fclose(file);
  }
  EXPECT_EQ(content(kept), sample.files().at("engine/model.pt2"));
}

TEST(Bundle, AFlippedBitInAnyFile) {
  const Sample sound;
  for (const auto& [name, original] : sound.files()) {
    for (const std::size_t where : {std::size_t{0}, original.size() / 2, original.size() - 1}) {
      if (original.empty()) continue;
      const Sample sample;
      std::string data = original;
      data[where] = static_cast<char>(data[where] ^ 4);
      sample.put(name, data);
      refused(sample, "'" + name + "' has sha256");
    }
  }
}

TEST(Bundle, TruncatedLongerOrMissingFiles) {
  const Sample sound;
  for (const auto& [name, original] : sound.files()) {
    const Sample sample;
    sample.put(name, original + "}");
    refused(sample, "'" + name + "' has " + std::to_string(original.size() + 1) + " bytes");
    if (!original.empty()) {
      sample.put(name, original.substr(0, original.size() - 1));
      refused(sample, "'" + name + "' has " + std::to_string(original.size() - 1) + " bytes");
    }
    fs::remove(sample.path() / name);
    refused(sample, "'" + name + "' is missing");
  }
}

TEST(Bundle, ADamagedManifest) {
  const Sample sample;
  const std::string sound = slurp(sample.path() / "manifest.json");
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, sound.size() - 2}) {
    sample.put("manifest.json", sound.substr(0, size));
    refused(sample, "manifest.json");
  }
  sample.put("manifest.json", sound + "}");
  refused(sample, "manifest.json");
  sample.put("manifest.json", std::string(1'000'000, '['));
  refused(sample, "manifest.json: is nested too deeply");
  fs::resize_file(sample.path() / "manifest.json", std::uintmax_t{1} << 40);  // sparse
  refused(sample, "manifest.json is 1099511627776 bytes long");
  fs::remove(sample.path() / "manifest.json");
  refused(sample, "manifest.json is missing");
}

TEST(Bundle, ExtraFilesAndFolders) {
  for (const char* name : {"extra.txt", ".hidden", "engine/extra.bin", "engine/more/deep/x", "\xc5\xbc", "a\nb"}) {
    const Sample sample;
    sample.put(name, "");
    refused(sample, "is not in the manifest");
  }
  for (const char* name : {"empty", "engine/empty"}) {
    const Sample sample;
    fs::create_directories(sample.path() / name);
    refused(sample, "'" + std::string(name) + "' is not in the manifest");
  }
  const Sample sample;
  fs::remove(sample.path() / "plan.json");
  sample.put("extra", "");
  refused(sample, "'extra' is not in the manifest, 'plan.json' is missing");
  fs::create_directory(sample.path() / "plan.json");
  refused(sample, "'plan.json'");
}

TEST(Bundle, TooMuchIsCutShort) {
  const Sample many;
  for (int i = 0; i < 2100; ++i) many.put("x" + std::to_string(i), "");
  refused(many, "holds too much");
  const Sample deep;
  std::string path = "d";
  for (int i = 0; i < 200; ++i) path += "/d";
  fs::create_directories(deep.path() / path);
  refused(deep, "holds too much");
}

TEST(Bundle, Links) {
  for (const char* name : {"plan.json", "engine/model.pt2", "manifest.json", "engine", "engine/more"}) {
    const Sample sample;
    fs::rename(sample.path() / name, sample.around() / "elsewhere");
    fs::create_symlink(sample.around() / "elsewhere", sample.path() / name);
    refused(sample, name);
  }
  const Sample sample;  // hard links, and a link to the whole bundle, are allowed
  fs::create_hard_link(sample.path() / "plan.json", sample.around() / "twin");
  fs::create_symlink(sample.path(), sample.around() / "latest.vpe");
  EXPECT_EQ(read(sample.around() / "latest.vpe").contents.size(), 6U);
}

TEST(Bundle, WhatBecomesALinkOrAPipeAfterItWasListed) {
  for (const char* name : {"engine", "plan.json"}) {
    const Sample sample;
    const Hook hook([&] {
      fs::rename(sample.path() / name, sample.around() / "elsewhere");
      fs::create_symlink(sample.around() / "elsewhere", sample.path() / name);
    });
    expect_error(VP_ERROR_BUNDLE_CORRUPT, "is a link or no plain file", [&] { read(sample.path()); });
  }
  const Sample sample;
  const Hook hook([&] {
    fs::remove(sample.path() / "plan.json");
    ASSERT_EQ(::mkfifo((sample.path() / "plan.json").c_str(), 0600), 0);
  });
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "'plan.json' is a pipe", [&] { read(sample.path()); });
}

TEST(Bundle, ThingsThatAreNoFiles) {
  for (const char* name : {"plan.json", "manifest.json", "extra"}) {
    const Sample sample;
    fs::remove(sample.path() / name);
    ASSERT_EQ(::mkfifo((sample.path() / name).c_str(), 0600), 0);
    refused(sample, name);
    fs::remove(sample.path() / name);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::string place = (sample.path() / name).string();
    ASSERT_LT(place.size(), sizeof address.sun_path);
    std::copy(place.begin(), place.end(), address.sun_path);
    const vp::Fd server(::socket(AF_UNIX, SOCK_STREAM, 0));
    ASSERT_EQ(::bind(server.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    refused(sample, name);
  }
}

TEST(Bundle, AManifestThatPointsOutside) {
  for (const std::string& path : {std::string("../secret"), std::string("/etc/hostname"), std::string("engine\\secret"),
                                  std::string("engine/../../secret"), std::string("secret\0", 7)}) {
    const Sample sample;
    sample.forge(Sample::listing(path, "secret"));
    refused(sample, "unsafe path");
  }
}

TEST(Bundle, SizesCostNothing) {
  const Sample declared;
  declared.forge(set("/files/0/size", "32212254720"));
  refused(declared, "expected 32212254720");
  const Sample huge;
  fs::resize_file(huge.path() / "plan.json", std::uintmax_t{1} << 40);
  refused(huge, "'plan.json' has 1099511627776 bytes");
}

TEST(Bundle, NoBundleThere) {
  const Sample sample;
  expect_error(VP_ERROR_BUNDLE, "is not there; expected the folder of a bundle",
               [&] { read(sample.around() / "none"); });
  expect_error(VP_ERROR_BUNDLE, "is not a folder", [&] { read(sample.path() / "plan.json"); });
  fs::create_directory(sample.around() / "empty");
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "manifest.json is missing: this folder is not a bundle",
               [&] { read(sample.around() / "empty"); });
}

TEST(Bundle, ABundleReplacedWhileItWasReadIsReadAgain) {
  const Sample sample;
  int calls = 0;
  const Hook hook([&] {
    if (++calls > 1) return;
    fs::copy(sample.path(), sample.around() / "new", fs::copy_options::recursive);
    fs::remove(sample.path() / "plan.json");
    fs::rename(sample.path(), sample.around() / "old");
    fs::rename(sample.around() / "new", sample.path());
  });
  EXPECT_EQ(read(sample.path()).contents.size(), 6U);
  EXPECT_EQ(calls, 2);
}

TEST(Bundle, NoDescriptorIsLeftOpen) {
  const auto count = [] { return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator()); };
  const Sample sample;
  const auto before = count();
  for (int i = 0; i < 20; ++i) read(sample.path());
  sample.put("engine/more/weights.bin", std::string(5000, 'v'));
  for (int i = 0; i < 20; ++i) refused(sample, "weights.bin");
  sample.put("extra", "");
  refused(sample, "extra");
  EXPECT_EQ(count(), before);
}

}  // namespace
