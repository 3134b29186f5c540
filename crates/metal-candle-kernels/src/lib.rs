//! CPU kernels of metal-candle: plain slices in, slices out.
