#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| metal_candle_fuzz::run(metal_candle_fuzz::gguf, data));
