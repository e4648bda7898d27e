// ThreadSanitizer cannot see inside Debian's absl (built without it), so every absl::Mutex, every absl::Notification and
// every reference count of an absl::Status would look like a race. In sanitizer builds these definitions stand before
// the library's own for all code in the process, gRPC's included: they tell the sanitizer what is synchronised, and
// call the real ones.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdint>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

namespace {

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

// A wait gives the mutex away and takes it back.
template <typename Wait>
auto AroundWait(void* mu, Wait wait) {
  __tsan_mutex_pre_unlock(mu, 0);
  __tsan_mutex_post_unlock(mu, 0);
  __tsan_mutex_pre_lock(mu, 0);
  if constexpr (std::is_void_v<decltype(wait())>) {
    wait();
    __tsan_mutex_post_lock(mu, 0, 0);
  } else {
    auto result = wait();
    __tsan_mutex_post_lock(mu, 0, 0);
    return result;
  }
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
}

void TsanUnlock(void* mu) asm(MUTEX("6UnlockEv"));
void TsanUnlock(void* mu) {
  static Void* const real = Real<Void>(MUTEX("6UnlockEv"));
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
  __tsan_mutex_pre_lock(mu, 0);
  real(mu, when);
  __tsan_mutex_post_lock(mu, 0, 0);
}

bool TsanLockWhenDeadline(void* mu, const absl::Condition& when, absl::Time deadline)
    asm(MUTEX("20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
bool TsanLockWhenDeadline(void* mu, const absl::Condition& when, absl::Time deadline) {
  static WhenDeadline* const real =
      Real<WhenDeadline>(MUTEX("20LockWhenWithDeadlineERKNS0_9ConditionENS0_4TimeE"));
  __tsan_mutex_pre_lock(mu, 0);
  const bool held = real(mu, when, deadline);
  __tsan_mutex_post_lock(mu, 0, 0);
  return held;
}

bool TsanLockWhenTimeout(void* mu, const absl::Condition& when, absl::Duration timeout)
    asm(MUTEX("19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
bool TsanLockWhenTimeout(void* mu, const absl::Condition& when, absl::Duration timeout) {
  static WhenTimeout* const real =
      Real<WhenTimeout>(MUTEX("19LockWhenWithTimeoutERKNS0_9ConditionENS0_8DurationE"));
  __tsan_mutex_pre_lock(mu, 0);
  const bool held = real(mu, when, timeout);
  __tsan_mutex_post_lock(mu, 0, 0);
  return held;
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
  __tsan_mutex_destroy(mu, 0);
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
  real(n);
}

void TsanWaitNotification(const void* n) asm("_ZNK4absl7debian312Notification19WaitForNotificationEv");
void TsanWaitNotification(const void* n) {
  static Void* const real = Real<Void>("_ZNK4absl7debian312Notification19WaitForNotificationEv");
  real(const_cast<void*>(n));
  __tsan_acquire(const_cast<void*>(n));
}

bool TsanWaitNotificationTimeout(const void* n, absl::Duration timeout)
    asm("_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
bool TsanWaitNotificationTimeout(const void* n, absl::Duration timeout) {
  using F = bool(void*, absl::Duration);
  static F* const real = Real<F>("_ZNK4absl7debian312Notification30WaitForNotificationWithTimeoutENS0_8DurationE");
  const bool notified = real(const_cast<void*>(n), timeout);
  if (notified) __tsan_acquire(const_cast<void*>(n));
  return notified;
}

}  // extern "C"
