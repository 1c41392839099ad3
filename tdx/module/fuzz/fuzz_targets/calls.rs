//! Bytes as calls, guest events, faults and memory writes: no panic, no lock or page left behind.

#![no_main]

#[path = "../../tests/common/driver.rs"]
mod driver;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (partitioned, bytes) = bytes
        .split_first()
        .map_or((0, bytes), |(b, rest)| (b % 2, rest));
    match partitioned {
        0 => driver::Driver::new().run(bytes),
        _ => driver::Driver::partitioned().run(bytes),
    }
});
