// A file system that shows the directory ROOT at a mount point and takes its time: each operation first waits as many
// milliseconds as the file DELAY says; while it says "hang", until it says something else. Run as root:
//   slow_storage ROOT DELAY MOUNTPOINT -f -o allow_other,default_permissions
// What the kernel remembers for a second (attributes, names) is quick, as with NFS.
#define FUSE_USE_VERSION FUSE_MAKE_VERSION(3, 12)
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static int root_fd, delay_fd;

static void take_time(void) {
  char text[16];
  for (;;) {
    const ssize_t got = pread(delay_fd, text, sizeof text - 1, 0);
    text[got > 0 ? got : 0] = 0;
    if (strncmp(text, "hang", 4) != 0) break;
    usleep(20 * 1000);
  }
  usleep((useconds_t)atoi(text) * 1000);
}

// Relative to root_fd, so that what is mounted over ROOT does not matter.
static const char* below(const char* path) { return path[1] == 0 ? "." : path + 1; }
static int result(int code) { return code == -1 ? -errno : 0; }
static int fd_of(struct fuse_file_info* file) { return (int)file->fh; }

// The server is root; what it makes belongs to who asked.
static int own(const char* path, int code) {
  if (code == -1) return -errno;
  const struct fuse_context* caller = fuse_get_context();
  return result(fchownat(root_fd, below(path), caller->uid, caller->gid, AT_SYMLINK_NOFOLLOW));
}

static int do_getattr(const char* path, struct stat* out, struct fuse_file_info* file) {
  return result(file ? fstat(fd_of(file), out) : fstatat(root_fd, below(path), out, AT_SYMLINK_NOFOLLOW));
}
static int do_readlink(const char* path, char* out, size_t size) {
  take_time();
  const ssize_t got = readlinkat(root_fd, below(path), out, size - 1);
  if (got == -1) return -errno;
  out[got] = 0;
  return 0;
}
static int do_mknod(const char* path, mode_t mode, dev_t device) {
  take_time();
  return own(path, mknodat(root_fd, below(path), mode, device));
}
static int do_mkdir(const char* path, mode_t mode) {
  take_time();
  return own(path, mkdirat(root_fd, below(path), mode));
}
static int do_symlink(const char* target, const char* path) {
  take_time();
  return own(path, symlinkat(target, root_fd, below(path)));
}
static int do_unlink(const char* path) {
  take_time();
  return result(unlinkat(root_fd, below(path), 0));
}
static int do_rmdir(const char* path) {
  take_time();
  return result(unlinkat(root_fd, below(path), AT_REMOVEDIR));
}
static int do_rename(const char* from, const char* to, unsigned flags) {
  take_time();
  return result(renameat2(root_fd, below(from), root_fd, below(to), flags));
}
static int do_link(const char* from, const char* to) {
  take_time();
  return result(linkat(root_fd, below(from), root_fd, below(to), 0));
}
static int do_chmod(const char* path, mode_t mode, struct fuse_file_info* file) {
  take_time();
  return result(file ? fchmod(fd_of(file), mode) : fchmodat(root_fd, below(path), mode, 0));
}
static int do_chown(const char* path, uid_t uid, gid_t gid, struct fuse_file_info* file) {
  take_time();
  return result(file ? fchown(fd_of(file), uid, gid) : fchownat(root_fd, below(path), uid, gid, AT_SYMLINK_NOFOLLOW));
}
static int do_truncate(const char* path, off_t size, struct fuse_file_info* file) {
  take_time();
  if (file) return result(ftruncate(fd_of(file), size));
  const int fd = openat(root_fd, below(path), O_WRONLY | O_CLOEXEC);
  if (fd == -1) return -errno;
  const int code = result(ftruncate(fd, size));
  close(fd);
  return code;
}
static int do_utimens(const char* path, const struct timespec times[2], struct fuse_file_info* file) {
  take_time();
  return result(file ? futimens(fd_of(file), times) : utimensat(root_fd, below(path), times, AT_SYMLINK_NOFOLLOW));
}
static int keep(struct fuse_file_info* file, int fd) {
  if (fd == -1) return -errno;
  file->fh = (uint64_t)fd;
  return 0;
}
// Append is the kernel's business: it sends each write with its offset.
static int do_open(const char* path, struct fuse_file_info* file) {
  take_time();
  return keep(file, openat(root_fd, below(path), (file->flags & ~O_APPEND) | O_CLOEXEC));
}
static int do_create(const char* path, mode_t mode, struct fuse_file_info* file) {
  take_time();
  const int code = keep(file, openat(root_fd, below(path), (file->flags & ~O_APPEND) | O_CREAT | O_CLOEXEC, mode));
  return code != 0 ? code : own(path, 0);
}
static int do_read(const char* path, char* out, size_t size, off_t offset, struct fuse_file_info* file) {
  (void)path;
  take_time();
  const ssize_t got = pread(fd_of(file), out, size, offset);
  return got == -1 ? -errno : (int)got;
}
static int do_write(const char* path, const char* data, size_t size, off_t offset, struct fuse_file_info* file) {
  (void)path;
  take_time();
  const ssize_t put = pwrite(fd_of(file), data, size, offset);
  return put == -1 ? -errno : (int)put;
}
static int do_statfs(const char* path, struct statvfs* out) {
  (void)path;
  return result(fstatvfs(root_fd, out));
}
static int do_release(const char* path, struct fuse_file_info* file) {
  (void)path;
  return result(close(fd_of(file)));
}
static int do_fsync(const char* path, int only_data, struct fuse_file_info* file) {
  (void)path;
  take_time();
  return result(only_data ? fdatasync(fd_of(file)) : fsync(fd_of(file)));
}
static int do_opendir(const char* path, struct fuse_file_info* file) {
  take_time();
  return keep(file, openat(root_fd, below(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}
static int do_readdir(const char* path, void* buffer, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info* file,
                      enum fuse_readdir_flags flags) {
  (void)path, (void)offset, (void)flags;
  DIR* directory = fdopendir(openat(fd_of(file), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory == NULL) return -errno;
  for (const struct dirent* entry; (entry = readdir(directory)) != NULL;) {
    const struct stat info = {.st_ino = entry->d_ino, .st_mode = (mode_t)entry->d_type << 12};
    fill(buffer, entry->d_name, &info, 0, 0);
  }
  closedir(directory);
  return 0;
}
static int do_fallocate(const char* path, int mode, off_t offset, off_t size, struct fuse_file_info* file) {
  (void)path;
  take_time();
  return result(fallocate(fd_of(file), mode, offset, size));
}
static void* do_init(struct fuse_conn_info* connection, struct fuse_config* config) {
  (void)connection;
  config->use_ino = 1;      // hard links are one file
  config->hard_remove = 1;  // a file that is open goes all the same
  return NULL;
}

static const struct fuse_operations kOperations = {
    .getattr = do_getattr, .readlink = do_readlink, .mknod = do_mknod, .mkdir = do_mkdir, .symlink = do_symlink,
    .unlink = do_unlink, .rmdir = do_rmdir, .rename = do_rename, .link = do_link, .chmod = do_chmod, .chown = do_chown,
    .truncate = do_truncate, .utimens = do_utimens, .open = do_open, .create = do_create, .read = do_read,
    .write = do_write, .statfs = do_statfs, .release = do_release, .fsync = do_fsync, .opendir = do_opendir,
    .readdir = do_readdir, .releasedir = do_release, .fsyncdir = do_fsync, .fallocate = do_fallocate, .init = do_init,
};

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: slow_storage ROOT DELAY MOUNTPOINT [FUSE OPTIONS]\n");
    return 2;
  }
  root_fd = open(argv[1], O_PATH | O_DIRECTORY | O_CLOEXEC);
  delay_fd = open(argv[2], O_RDONLY | O_CLOEXEC);
  if (root_fd == -1 || delay_fd == -1) {
    perror("slow_storage");
    return 1;
  }
  umask(0);  // the caller's was applied by the kernel
  argv[2] = argv[0];
  return fuse_main(argc - 2, argv + 2, &kOperations, NULL);
}
