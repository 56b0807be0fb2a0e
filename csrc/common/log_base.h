// From natural logarithms to those of base 2, in which the kernels keep them, and back.
#pragma once

namespace flashmla {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace flashmla
