// Descriptors, and files inside a bundle: opened relative to the bundle's folder, following no link.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace vp {

/// A descriptor that is closed with its owner.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }

  int get() const noexcept { return fd_; }

 private:
  int fd_ = -1;
};

/// Content that nobody can change any more, this process included: a sealed file in memory without a name.
class SealedFile {
 public:
  SealedFile();
  void append(const void* data, std::size_t size);
  void seal();

  std::size_t size() const noexcept { return size_; }
  /// A path that leads to it in this process, for libraries that want one.
  std::string path() const;

 private:
  Fd fd_;
  std::size_t size_ = 0;
};

/// A read-only view of a sealed file in memory.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path, std::size_t size);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const void* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  void* data_;
  std::size_t size_;
};

/// "a symbolic link", "a pipe", ... of a mode.
const char* kind_of(mode_t mode);

/// Throws Error (VP_ERROR_BUNDLE) that says what the system said.
[[noreturn]] void throw_system(const std::string& what, int number);

/// The bundle's folder. It may be reached through a link: that is the user's own path, not the bundle's content.
Fd open_root(const std::string& path);

/// A plain file at a checked path inside the bundle, and its size. Throws Error where it is anything else.
std::pair<Fd, std::size_t> open_inside(int root, const std::string& path);

/// Path and mode of everything below a folder, bounded, and following nothing.
void walk(int root, const std::function<void(const std::string& path, mode_t mode)>& visit);

/// Up to `size` bytes, or fewer where the file ends before; in pieces.
void read_chunks(int fd, std::size_t size, const std::function<void(const char* data, std::size_t size)>& use);

}  // namespace vp
