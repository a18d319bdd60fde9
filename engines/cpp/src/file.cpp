#include "file.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <system_error>
#include <vector>

#include "error.hpp"
#include "manifest.hpp"

namespace vp {
namespace {

constexpr std::size_t kChunk = std::size_t{1} << 18;  // small enough to be hashed while in cache
constexpr int kOpenFile = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;  // NONBLOCK: opening a FIFO must not hang
constexpr int kOpenFolder = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_DIRECTORY;

std::string reason(int number) { return std::generic_category().message(number); }

Fd must_open(int folder, const std::string& name, int flags, const std::string& path) {
  Fd fd(::openat(folder, name.c_str(), flags));
  if (fd.get() >= 0) return fd;
  switch (const int number = errno; number) {
    case ENOENT:
      throw corrupt(quote(path) + " is missing");
    case ELOOP:
    case ENOTDIR:
    case ENXIO:  // a socket
    case EMLINK:
      throw corrupt(quote(path) + " or a folder on its way is a link or no plain file");
    default:
      throw_system(quote(path), number);
  }
}

using Visit = std::function<void(const std::string& path, mode_t mode)>;

void walk_folder(int folder, const std::string& prefix, const Visit& visit) {
  // Duplicate the descriptor: closedir closes it.
  const int own = ::openat(folder, ".", kOpenFolder);
  if (own < 0) throw_system(quote(prefix), errno);
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(::fdopendir(own), ::closedir);
  if (!entries) {
    const Fd closes(own);
    throw_system(quote(prefix), errno);
  }
  std::size_t count = 0;
  const auto depth = static_cast<std::size_t>(std::count(prefix.begin(), prefix.end(), '/'));
  while (true) {
    errno = 0;
    const dirent* entry = ::readdir(entries.get());
    if (entry == nullptr) {
      if (errno != 0) throw_system(quote(prefix), errno);
      return;
    }
    const std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    if (++count > 2 * kMaxFiles || depth > kMaxPathParts) {
      throw corrupt(quote(prefix.empty() ? "the bundle" : prefix) + " holds too much",
                    "at most " + std::to_string(kMaxFiles) + " files");
    }
    struct stat status {};
    if (::fstatat(folder, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) throw_system(quote(prefix + name), errno);
    visit(prefix + name, status.st_mode);
    if (S_ISDIR(status.st_mode)) {
      const Fd below = must_open(folder, name, kOpenFolder, prefix + name);
      walk_folder(below.get(), prefix + name + "/", visit);
    }
  }
}

}  // namespace

SealedFile::SealedFile() : fd_(::memfd_create("vp_engine", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
  if (fd_.get() < 0) throw_system("a file in memory", errno);
}

void SealedFile::append(const void* data, std::size_t size) {
  const char* rest = static_cast<const char*>(data);
  size_ += size;
  while (size > 0) {
    const ssize_t count = ::write(fd_.get(), rest, size);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_system("a file in memory", errno);
    rest += count;
    size -= static_cast<std::size_t>(count);
  }
}

void SealedFile::seal() {
  const int all = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
  if (::fcntl(fd_.get(), F_ADD_SEALS, all) != 0) throw_system("a file in memory", errno);
}

std::string SealedFile::path() const { return "/proc/self/fd/" + std::to_string(fd_.get()); }

MappedFile::MappedFile(const std::string& path, std::size_t size) : data_(nullptr), size_(size) {
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) throw_system(path, errno);
  if (size == 0) return;  // mmap rejects size 0
  data_ = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data_ == MAP_FAILED) throw_system(path, errno);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

const char* kind_of(mode_t mode) {
  switch (mode & S_IFMT) {
    case S_IFLNK:
      return "a symbolic link";
    case S_IFIFO:
      return "a pipe";
    case S_IFSOCK:
      return "a socket";
    case S_IFDIR:
      return "a folder";
    case S_IFREG:
      return "a plain file";
    default:
      return "a device";
  }
}

void throw_system(const std::string& what, int number) {
  throw Error(VP_ERROR_BUNDLE, "cannot read the bundle: " + what + ": " + reason(number));
}

Fd open_root(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
  if (fd.get() >= 0) return fd;
  const int number = errno;
  const std::string problem = number == ENOENT    ? "is not there"
                              : number == ENOTDIR ? "is not a folder"
                                                  : "cannot be opened (" + reason(number) + ")";
  throw Error(VP_ERROR_BUNDLE, "'" + path + "' " + problem, "the folder of a bundle (NAME.vpe)");
}

std::pair<Fd, std::size_t> open_inside(int root, const std::string& path) {
  Fd here;
  std::size_t start = 0;
  for (auto slash = path.find('/'); slash != std::string::npos; slash = path.find('/', start)) {
    const int parent = here.get() < 0 ? root : here.get();
    here = must_open(parent, path.substr(start, slash - start), kOpenFolder, path);
    start = slash + 1;
  }
  Fd file = must_open(here.get() < 0 ? root : here.get(), path.substr(start), kOpenFile, path);
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) throw_system(quote(path), errno);
  if (!S_ISREG(status.st_mode)) throw corrupt(quote(path) + " is " + kind_of(status.st_mode), "a plain file");
  return {std::move(file), static_cast<std::size_t>(status.st_size)};
}

void walk(int root, const Visit& visit) { walk_folder(root, "", visit); }

void read_chunks(int fd, std::size_t size, const std::function<void(const char* data, std::size_t size)>& use) {
  std::vector<char> buffer(std::min(size, kChunk));
  while (size > 0) {
    const ssize_t count = ::read(fd, buffer.data(), std::min(size, buffer.size()));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_system("a file", errno);
    if (count == 0) return;
    use(buffer.data(), static_cast<std::size_t>(count));
    size -= static_cast<std::size_t>(count);
  }
}

}  // namespace vp
