//! Bytes as calls, guest events, faults and memory writes: no panic, no lock or page left behind.

#![no_main]

#[path = "../../tests/common/driver.rs"]
mod driver;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    driver::Driver::new().run(bytes);
});
