// The toy kernels for nvcc, with the sizes of toy_driver.cpp and mailbox_driver.cpp.
#include "simt/toy_lstm.cuh"
#include "simt/toy_mailbox.cuh"

template LSTM_KERNEL toy::grid_f32<128, 16, 16>(toy::Arguments);
template LSTM_KERNEL toy::grid_bf16<128, 16, 16>(toy::Arguments);
template LSTM_KERNEL toy::mailbox<4, 16>(toy::MailboxArguments);
