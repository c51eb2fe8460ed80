// The part of the fake driver that the fake NCCL uses.
#include <stddef.h>

enum { FAKE_LARGEST = 8 };

// Ends the process with a message.
void fake_dies(const char *why);
// The calling thread's current device; -1 without one.
int fake_device(void);
// A device joins a communicator.
void fake_joins(int device);
// A device begins a sum, which is work of the device's default stream.
void fake_begins(int device);
// A device has done its oldest sum.
void fake_ends(int device);
// A device is in no communicator any more.
void fake_leaves(int device);
