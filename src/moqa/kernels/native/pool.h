// Threads that sleep between calls and take numbered items of work.
#pragma once

#include <functional>

namespace moqa {

// Calls work(0) ... work(items - 1) on up to `threads` threads, including this one, and returns when all are done. The
// result of an item must not depend on the thread. A thread without work polls for about ten microseconds, then sleeps
// until there is more.
void parallel(int threads, int items, const std::function<void(int)>& work);

}  // namespace moqa
