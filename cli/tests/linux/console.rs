//! Linux with a virtio console, in a TD and in an SNP guest: what the kernel says there comes through memory that it shares.

use crate::boot::{Boot, CMDLINE, Guests, console};
use crate::{figures, init, processor_seconds, snp, td};

fn speaks(guests: &Guests, variable: &str) {
    let Some(boot) = Boot::new(guests, variable, &[("init", init::speaks())]) else {
        return;
    };
    let began = processor_seconds();
    let report = boot.run(1, &["--console", "virtio"]);
    let text = console(&report);
    // Once: user space writes to /dev/hvc0 alone.
    assert_eq!(text.matches(init::BY_VIRTIO).count(), 1, "{text}");
    assert!(text.contains(CMDLINE), "{text}");
    figures(
        &format!("Linux in {} with a virtio console", guests.name),
        &report,
        began,
    );
}

#[test]
fn a_kernel_in_a_td_has_a_virtio_console() {
    speaks(&td::TD, td::KERNEL);
}

#[test]
fn a_kernel_in_an_snp_guest_has_a_virtio_console() {
    speaks(&snp::SNP, snp::KERNEL);
}
