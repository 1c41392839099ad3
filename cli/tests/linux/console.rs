//! Linux with a virtio console, in a TD: what the kernel says there comes through memory that it shares.

use crate::boot::{Boot, CMDLINE, console};
use crate::{figures, init, processor_seconds, td};

#[test]
fn a_kernel_in_a_td_has_a_virtio_console() {
    let Some(boot) = Boot::new(&td::TD, td::KERNEL, &[("init", init::speaks())]) else {
        return;
    };
    let began = processor_seconds();
    let report = boot.run(1, &["--console", "virtio"]);
    let text = console(&report);
    // Once: user space writes to /dev/hvc0 alone.
    assert_eq!(text.matches(init::BY_VIRTIO).count(), 1, "{text}");
    assert!(text.contains(CMDLINE), "{text}");
    figures("Linux in a TD with a virtio console", &report, began);
}
