// Threads that sleep between calls and take numbered items of work.
#pragma once

#include <functional>

namespace moqa {

// Calls work(0) ... work(items - 1) on up to `threads` threads, this one included, and returns when all are done.
// Which thread takes an item must not matter to its result. A thread without work looks for some ten microseconds
// whether more comes, then sleeps until it does.
void parallel(int threads, int items, const std::function<void(int)>& work);

}  // namespace moqa
