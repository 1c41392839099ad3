//! Prints how fast the model is: `cargo run --release --example throughput`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use soft_amd_sp::measure::{Launch, PageType, cpu_signature};
use soft_amd_sp::{GuestPage, Platform};
use std::time::{Duration, Instant};

const LEN: u64 = 16 << 20;
const AT: u64 = 16 << 20;
const PAGE: usize = 0x1000;

/// Repeats until half a second is over and prints bytes per second.
fn rate(what: &str, bytes: u64, mut once: impl FnMut()) {
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < Duration::from_millis(500) {
        once();
        done += bytes;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{what:<44} {:>8.0} MB/s", done as f64 / 1e6 / seconds);
}

fn machine(seed: u64) -> soft_amd_sp::Builder {
    Platform::builder()
        .memory(64 << 20)
        .cores(2)
        .asids(6, 12)
        .seed(seed)
}

fn main() {
    let image = vec![0x5a; LEN as usize];
    rate("off-line SNP digest of an image", LEN, || {
        let signature = cpu_signature("EPYC-v4").unwrap_or(0);
        let digest = Launch::new(&image).vcpu_sig(signature).snp();
        assert!(digest.is_ok());
    });

    let p = sev_from(machine(1));
    p.host_write(AT, &image).unwrap();
    let handle = launch_start(&p, OPEN, 6);
    rate("LAUNCH_UPDATE_DATA", LEN, || {
        update_data(&p, handle, AT, LEN as u32).ok().unwrap();
    });

    let q = snp_from(machine(2));
    snp_launch(&q, 0x1000, SnpPolicy::SMT, 1);
    rate(
        "SNP_LAUNCH_UPDATE, 4 KiB pages, with RMPUPDATE",
        PAGE as u64,
        || {
            snp_add(&q, 0x1000, 1, AT, 0x8000, PageType::Normal)
                .ok()
                .unwrap();
            q.rmpupdate(AT, &soft_amd_sp::RmpUpdate::shared()).unwrap();
        },
    );

    let (a, b) = (sev_from(machine(3)), sev_from(machine(4)));
    let source = running(&a, OPEN, 6, &[1; PAGE]);
    run(&a, send_start(&a, &b, source)).ok().unwrap();
    let (_, target) = receive_start(&a, &b, OPEN);
    activate(&b, target, 6).ok().unwrap();
    let send: SendUpdateData = packet(source, GUEST, PAGE as u32);
    let receive: ReceiveUpdateData = packet(target, GUEST, PAGE as u32);
    let mut bytes = vec![0; 2 * PAGE];
    rate(
        "SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA",
        PAGE as u64,
        || {
            run(&a, send).ok().unwrap();
            a.host_read(SCRATCH, &mut bytes).unwrap();
            b.host_write(SCRATCH, &bytes).unwrap();
            run(&b, receive).ok().unwrap();
        },
    );

    let mut page = [0; PAGE];
    rate("guest read of private pages", PAGE as u64, || {
        b.guest_read(&GuestPage::new(6, 0, GUEST), &mut page)
            .unwrap();
    });
}
