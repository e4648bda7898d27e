// ThreadSanitizer cannot see inside Debian's absl (built without it), so every absl::Mutex, every absl::Notification and
// every reference count of an absl::Status would look like a race. In sanitizer builds these definitions stand before
// the library's own for all code in the process, gRPC's included: they tell the sanitizer what is synchronised, and
// call the real ones.
#include <dlfcn.h>
#include <grpc/grpc.h>
#include <sanitizer/tsan_interface.h>

#include <cstdint>
#include <type_traits>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

extern "C" const char __executable_start, etext;  // of this program's code; the linker's

namespace {

bool IsOurs(const void* caller) { return caller >= &__executable_start && caller < &etext; }

// gRPC hands work from thread to thread by lock-free queues, which the sanitizer does not see. So what a thread did before it
// began an operation, or gave back one of gRPC's locks, is taken to come before what follows an event or such a lock.
char grpc_order;

constexpr unsigned kTry = __tsan_mutex_try_lock;
constexpr unsigned kFailed = __tsan_mutex_try_lock_failed;
constexpr unsigned kRead = __tsan_mutex_read_lock;

template <typename F>
F* Real(const char* symbol) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, symbol));
}

using Void = void(void*);
using Bool = bool(void*);
using When = void(void*, const absl::Condition&);
using WhenDeadline = bool(void*, const absl::Condition&, absl::Time);
using WhenTimeout = bool(void*, const absl::Condition&, absl::Duration);
using CvWait = void(void*, void*);
using CvDeadline = bool(void*, void*, absl::Time);
using CvTimeout = bool(void*, void*, absl::Duration);

// The library's functions with a timeout call those with a deadline, which are ours too: what is inside is told once.
thread_local void* inside = nullptr;  // the mutex that is waited with

template <typename Wait>
auto Inside(void* mu, Wait wait) {
  struct Restore {
    void* const before = inside;
    ~Restore() { inside = before; }
  } restore;
  inside = mu;
  return wait();
}

template <typename Lock>
auto AroundLock(void* mu, Lock lock) {
  if (inside == mu) return lock();
  __tsan_mutex_pre_lock(mu, 0);
  if constexpr (std::is_void_v<decltype(lock())>) {
    Inside(mu, lock);
    __tsan_mutex_post_lock(mu, 0, 0);
  } else {
    auto result = Inside(mu, lock);
    __tsan_mutex_post_lock(mu, 0, 0);
    return result;
  }
}

// A wait gives the mutex away and takes it back.
template <typename Wait>
auto AroundWait(void* mu, Wait wait) {
  if (inside == mu) return wait();
  __tsan_mutex_pre_unlock(mu, 0);
  __tsan_mutex_post_unlock(mu, 0);
  return AroundLock(mu, wait);
}

bool Notified(const void* notification, bool notified) {
  if (notified) __tsan_acquire(const_cast<void*>(notification));
  return notified;
}

}  // namespace

#define MUTEX(name) "_ZN4absl7debian35Mutex" name
#define CONDVAR(name) "_ZN4absl7debian37CondVar" name

extern "C" {

void TsanLock(void* mu) asm(MUTEX("4LockEv"));
void TsanLock(void* mu) {
  static Void* const real = Real<Void>(MUTEX("4LockEv"));
  __tsan_mutex_pre_lock(mu, 0);
  real(mu);
  __tsan_mutex_post_lock(mu, 0, 0);
  if (!IsOurs(__builtin_return_address(0))) __tsan_acquire(&grpc_order);
}

void TsanUnlock(void* mu) asm(MUTEX("6UnlockEv"));
void TsanUnlock(void* mu) {
  static Void* const real = Real<Void>(MUTEX("6UnlockEv"));
  if (!IsOurs(__builtin_return_address(0))) __tsan_release(&grpc_order);
  __tsan_mutex_pre_unlock(mu, 0);
  real(mu);
  __tsan_mutex_post_unlock(mu, 0);
}

bool TsanTryLock(void* mu) asm(MUTEX("7TryLockEv"));
bool TsanTryLock(void* mu) {
  static Bool* const real = Real<Bool>(MUTEX("7TryLockEv"));
  __tsan_mutex_pre_lock(mu, kTry);
  const bool locked = real(mu);
  __tsan_mutex_post_lock(mu, locked ? kTry : kTry | kFailed, 0);
  return locked;
}

void TsanReaderLock(void* mu) asm(MUTEX("10ReaderLockEv"));
void TsanReaderLock(void* mu) {
  static Void* const real = Real<Void>(MUTEX("10ReaderLockEv"));
  __tsan_mutex_pre_lock(mu, kRead);
  real(mu);
  __tsan_mutex_post_lock(mu, kRead, 0);
}

void TsanReaderUnlock(void* mu) asm(MUTEX("12ReaderUnlockEv"));
void TsanReaderUnlock(void* mu) {
  static Void* const real = Real<Void>(MUTEX("12ReaderUnlockEv"));
  __tsan_mutex_pre_unlock(mu, kRead);
  real(mu);
  __tsan_mutex_post_unlock(mu, kRead);
}

void TsanLockWhen(void* mu, const absl::Condition& when) asm(MUTEX("8LockWhenERKNS0_9ConditionE"));
void TsanLockWhen(void* mu, const absl::Condition& when) {
  static When* const real = Real<When>(MUTEX("8LockWhenERKNS0_9ConditionE"));
  AroundLock(mu, [&] { real(mu, when); });
}

bool TsanLockWhenDeadline(void* mu, const absl::Condition& when, absl::Time deadline)
    asm(MUTEX("20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
bool TsanLockWhenDeadline(void* mu, const absl::Condition& when, absl::Time deadline) {
  static WhenDeadline* const real =
      Real<WhenDeadline>(MUTEX("20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
  return AroundLock(mu, [&] { return real(mu, when, deadline); });
}

bool TsanLockWhenTimeout(void* mu, const absl::Condition& when, absl::Duration timeout)
    asm(MUTEX("19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
bool TsanLockWhenTimeout(void* mu, const absl::Condition& when, absl::Duration timeout) {
  static WhenTimeout* const real =
      Real<WhenTimeout>(MUTEX("19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
  return AroundLock(mu, [&] { return real(mu, when, timeout); });
}

void TsanAwait(void* mu, const absl::Condition& when) asm(MUTEX("5AwaitERKNS0_9ConditionE"));
void TsanAwait(void* mu, const absl::Condition& when) {
  static When* const real = Real<When>(MUTEX("5AwaitERKNS0_9ConditionE"));
  AroundWait(mu, [&] { real(mu, when); });
}

bool TsanAwaitDeadline(void* mu, const absl::Condition& when, absl::Time deadline)
    asm(MUTEX("17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
bool TsanAwaitDeadline(void* mu, const absl::Condition& when, absl::Time deadline) {
  static WhenDeadline* const real =
      Real<WhenDeadline>(MUTEX("17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
  return AroundWait(mu, [&] { return real(mu, when, deadline); });
}

bool TsanAwaitTimeout(void* mu, const absl::Condition& when, absl::Duration timeout)
    asm(MUTEX("16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
bool TsanAwaitTimeout(void* mu, const absl::Condition& when, absl::Duration timeout) {
  static WhenTimeout* const real =
      Real<WhenTimeout>(MUTEX("16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
  return AroundWait(mu, [&] { return real(mu, when, timeout); });
}

void TsanMutexEnd(void* mu) asm(MUTEX("D1Ev"));
void TsanMutexEnd(void* mu) {
  static Void* const real = Real<Void>(MUTEX("D1Ev"));
  real(mu);
  // The libraries' own end when an atomic count says so, which the sanitizer does not see; it forgets them with their memory.
  if (IsOurs(__builtin_return_address(0))) __tsan_mutex_destroy(mu, 0);
}

void TsanCvWait(void* cv, void* mu) asm(CONDVAR("4WaitEPNS0_5MutexE"));
void TsanCvWait(void* cv, void* mu) {
  static CvWait* const real = Real<CvWait>(CONDVAR("4WaitEPNS0_5MutexE"));
  AroundWait(mu, [&] { real(cv, mu); });
}

bool TsanCvDeadline(void* cv, void* mu, absl::Time deadline) asm(CONDVAR("16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE"));
bool TsanCvDeadline(void* cv, void* mu, absl::Time deadline) {
  static CvDeadline* const real = Real<CvDeadline>(CONDVAR("16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE"));
  return AroundWait(mu, [&] { return real(cv, mu, deadline); });
}

bool TsanCvTimeout(void* cv, void* mu, absl::Duration timeout)
    asm(CONDVAR("15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE"));
bool TsanCvTimeout(void* cv, void* mu, absl::Duration timeout) {
  static CvTimeout* const real = Real<CvTimeout>(CONDVAR("15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE"));
  return AroundWait(mu, [&] { return real(cv, mu, timeout); });
}

grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t nops, void* tag, void* reserved) {
  static auto* const real = Real<decltype(grpc_call_start_batch)>("grpc_call_start_batch");
  __tsan_release(&grpc_order);
  return real(call, ops, nops, tag, reserved);
}

grpc_event grpc_completion_queue_next(grpc_completion_queue* queue, gpr_timespec deadline, void* reserved) {
  static auto* const real = Real<decltype(grpc_completion_queue_next)>("grpc_completion_queue_next");
  const grpc_event event = real(queue, deadline, reserved);
  __tsan_acquire(&grpc_order);
  return event;
}

// A Status is given away by several threads and deleted by the last of them, inside the library.
void TsanStatusUnref(uintptr_t rep) asm("_ZN4absl7debian36Status15UnrefNonInlinedEm");
void TsanStatusUnref(uintptr_t rep) {
  using F = void(uintptr_t);
  static F* const real = Real<F>("_ZN4absl7debian36Status15UnrefNonInlinedEm");
  void* const shared = reinterpret_cast<void*>(rep);
  __tsan_release(shared);
  __tsan_acquire(shared);
  real(rep);
}

// HasBeenNotified() is an inline atomic; waiting is inside the library.
void TsanNotify(void* n) asm("_ZN4absl7debian312Notification6NotifyEv");
void TsanNotify(void* n) {
  static Void* const real = Real<Void>("_ZN4absl7debian312Notification6NotifyEv");
  __tsan_release(n);
  __tsan_release(static_cast<char*>(n) + sizeof(absl::Mutex));  // the atomic, behind the mutex
  real(n);
}

void TsanWaitNotification(const void* n) asm("_ZNK4absl7debian312Notification19WaitForNotificationEv");
void TsanWaitNotification(const void* n) {
  static Void* const real = Real<Void>("_ZNK4absl7debian312Notification19WaitForNotificationEv");
  real(const_cast<void*>(n));
  __tsan_acquire(const_cast<void*>(n));
}

bool TsanWaitNotificationDeadline(const void* n, absl::Time deadline)
    asm("_ZNK4absl7debian312Notification31WaitForNotificationWithDeadlineENS0_4TimeE");
bool TsanWaitNotificationDeadline(const void* n, absl::Time deadline) {
  static auto* const real =
      Real<bool(const void*, absl::Time)>("_ZNK4absl7debian312Notification31WaitForNotificationWithDeadlineENS0_4TimeE");
  return Notified(n, real(n, deadline));
}

bool TsanWaitNotificationTimeout(const void* n, absl::Duration timeout)
    asm("_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
bool TsanWaitNotificationTimeout(const void* n, absl::Duration timeout) {
  static auto* const real =
      Real<bool(const void*, absl::Duration)>("_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
  return Notified(n, real(n, timeout));
}

}  // extern "C"
