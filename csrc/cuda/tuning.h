// Launch parameters that `make gpu-tune` may change while a process runs. The initial value is what users get.

#pragma once

namespace pruneops {

struct Tuned {
  const char* name;
  int value;
  Tuned* next;  // of all parameters of the library

  Tuned(const char* name, int value) : name(name), value(value), next(first) { first = this; }

  static inline Tuned* first = nullptr;
};

}  // namespace pruneops
