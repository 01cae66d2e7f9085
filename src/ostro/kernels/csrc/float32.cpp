// The kernels for float32, from the same text.
#define FLOAT32

#include "attention.cpp"
#include "elementwise.cpp"
#include "linear.cpp"
#include "loss.cpp"
