// Descriptors, and files inside a bundle: opened relative to the bundle's folder, without following links.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

namespace vp {

/// Owns a file descriptor.
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

/// Immutable content in a sealed memfd: not even this process can change it.
class SealedFile {
 public:
  SealedFile();
  void append(const void* data, std::size_t size);
  void seal();

  std::size_t size() const noexcept { return size_; }
  /// Path of the memfd in this process, for libraries that need a path.
  std::string path() const;

 private:
  Fd fd_;
  std::size_t size_ = 0;
};

/// Read-only mapping of a sealed file.
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

/// Name of the file type in a mode: "a symbolic link", "a pipe", ...
const char* kind_of(mode_t mode);

/// Throws Error (VP_ERROR_BUNDLE) with the system's message.
[[noreturn]] void throw_system(const std::string& what, int number);

/// Opens the bundle's folder. Its path may be a link, since the user chose it.
Fd open_root(const std::string& path);

/// Opens a regular file at a checked path inside the bundle; also returns its size. Throws Error for other file types.
std::pair<Fd, std::size_t> open_inside(int root, const std::string& path);

/// Path and mode of everything below a folder, bounded in number, without following links.
void walk(int root, const std::function<void(const std::string& path, mode_t mode)>& visit);

/// Reads up to `size` bytes in chunks, fewer at the end of the file.
void read_chunks(int fd, std::size_t size, const std::function<void(const char* data, std::size_t size)>& use);

}  // namespace vp
