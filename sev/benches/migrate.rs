//! The cost of migrations: `cargo bench -p kvm-ops-sev --bench migrate`.
//!
//! 1. A move inside a host, by guest size: time, and the commands and instructions that the machine
//!    saw. Neither grows.
//! 2. A journey between hosts, by guest size, beside what the two firmwares alone need for the same
//!    pages in the same run (SEND_UPDATE_DATA and RECEIVE_UPDATE_DATA with nothing around them), and
//!    beside the cipher and MAC of the packets alone, made and checked: the limit of any transport.

#[path = "../tests/common/mod.rs"]
mod common;

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use aes::cipher::{KeyIvInit, StreamCipher};
use common::*;
use embedded_io_adapters::std::FromStd;
use hmac::{Hmac, Mac};
use kvm_ops_core::{Backend, Gfn, Host, Level, PagePort, Tech, VmOps};
use kvm_ops_sev::migrate::{Flow, Mailbox, Packet, PacketOf, Receiver, SendLimits, Sender};
use kvm_ops_sev::{Identity, SevVm};
use kvm_ops_sim::{SevSetup, SimHost};

type Sev = SevVm<SimHost>;

const SIZES: [u64; 4] = [1, 16, 64, 256];
const MIB: u64 = 1 << 20;

fn machine(seed: u64, mib: u64) -> SimHost {
    let platform = platform(seed).memory((mib + 33) / 2 * 2 * MIB);
    host_from(SevSetup::new(platform).without_snp())
}

fn guest(host: &SimHost, ram: &Ram, mib: u64) -> Sev {
    let mut vm = with_ram(host, Tech::Sev, 1, ram);
    vm.add_initial_page(&measured(RAM, &page(1))).unwrap();
    vm.vm_finalize().unwrap();
    let rest = mib * MIB / PAGE - 1;
    assert_eq!(
        vm.pre_fault_memory(Gfn::new((RAM >> 12) + 1), rest),
        Ok(rest)
    );
    vm
}

fn operations(host: &SimHost) -> u64 {
    sp(host).counters().iter().map(|(_, _, n)| n).sum()
}

fn inside() {
    println!("move inside a host");
    println!(
        "{:>10} {:>12} {:>24}",
        "guest", "move", "commands, instructions"
    );
    for mib in SIZES {
        let (host, ram) = (machine(1, mib), Ram::new(mib * MIB));
        let mut best = Duration::MAX;
        let mut seen = 0;
        for _ in 0..20 {
            let mut from = guest(&host, &ram, mib);
            let mut to = with_ram(&host, Tech::Sev, 1, &ram);
            let (before, start) = (operations(&host), Instant::now());
            Sev::move_context(&mut from, &mut to).unwrap();
            best = best.min(start.elapsed());
            seen = seen.max(operations(&host) - before);
            free_clean(from);
            free_clean(to);
            if best * 20 > Duration::from_secs(1) {
                break;
            }
        }
        println!("{:>6} MiB {best:>12.1?} {seen:>24}", mib);
        assert_eq!(seen, 0);
    }
}

/// Bytes per second of the firmwares alone, one page at a time.
fn firmware_alone(from: &mut Sev, here: &SimHost, there: &SimHost) -> f64 {
    let (a, b) = (Mailbox::new(here).unwrap(), Mailbox::new(there).unwrap());
    let Some(Identity::Handle(source)) = from.identity() else {
        unreachable!("launched")
    };
    let mut certs = b.certs().unwrap();
    certs.vendor = sp(there).vendor_certs();
    let start = a.send_start(source, &certs).unwrap();
    let target = b.receive_start(&start).unwrap();
    let mut activate = [0; 8];
    activate[..4].copy_from_slice(&target.to_le_bytes());
    activate[4] = 7;
    sp(there).command(0x21u32, &mut activate).ok().unwrap();
    let pages = there.pages().unwrap();
    let into = pages.alloc(Level::Size4K).unwrap();
    let page = from.page_of(Gfn::new(RAM >> 12)).unwrap();
    let mut packet = Packet::default();
    let (mut done, begun) = (0u64, Instant::now());
    while begun.elapsed() < Duration::from_millis(500) {
        a.send_update(source, PacketOf::Memory, page, &mut packet)
            .unwrap();
        b.receive_update(target, PacketOf::Memory, &into, &packet)
            .unwrap();
        done += PAGE;
    }
    let rate = done as f64 / begun.elapsed().as_secs_f64();
    a.send_cancel(source).unwrap();
    for command in [0x22u32, 0x20] {
        let mut handle = target.to_le_bytes();
        sp(there).command(command, &mut handle).ok().unwrap();
    }
    sp(there).wbinvd_all();
    sp(there).command(0x0au32, &mut []).ok().unwrap();
    pages.free(into).unwrap();
    rate
}

/// Bytes per second of AES-128-CTR and HMAC-SHA-256 alone, once to make a page's packet and once to
/// check and open it.
fn cipher_alone() -> f64 {
    let (tek, tik) = ([1; 16], [2; 16]);
    let mac = |page: &[u8]| {
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&tik).unwrap();
        mac.update(page);
        mac.finalize().into_bytes()
    };
    let mut page = [3; PAGE as usize];
    let (mut done, begun) = (0u64, Instant::now());
    while begun.elapsed() < Duration::from_millis(500) {
        let iv = u128::from(done).to_le_bytes();
        let cipher = || ctr::Ctr128BE::<aes::Aes128>::new(&tek.into(), &iv.into());
        cipher().apply_keystream(&mut page);
        let sent = mac(&page);
        assert_eq!(sent, mac(&page));
        cipher().apply_keystream(&mut page);
        done += PAGE;
    }
    done as f64 / begun.elapsed().as_secs_f64()
}

fn between() {
    println!("\njourney between hosts, guest idle, over a socket pair");
    println!(
        "{:>10} {:>10} {:>8} {:>16} {:>8} {:>18} {:>8}",
        "guest", "time", "MB/s", "firmware alone", "ratio", "cipher, MAC alone", "ratio"
    );
    for mib in [1, 16, 64] {
        let (here, there) = (machine(2, mib), machine(3, mib));
        let (ram, ram2) = (Ram::new(mib * MIB), Ram::new(mib * MIB));
        let mut from = guest(&here, &ram, mib);
        let alone = firmware_alone(&mut from, &here, &there);
        let cipher = cipher_alone();
        let to = with_ram(&there, Tech::Sev, 1, &ram2);
        let (a, b) = UnixStream::pair().unwrap();
        let start = Instant::now();
        let vendor = sp(&there).vendor_certs();
        let outgoing = from.outgoing(Box::new(|_| Ok(Vec::new()))).unwrap();
        let incoming = to.incoming(vendor, Box::new(|_, _| Ok(()))).unwrap();
        let mut random = |out: &mut [u8]| {
            out.fill(9);
            Ok(())
        };
        let mut sender = Sender::new(outgoing, SendLimits::default(), &mut random)
            .map_err(|(error, _)| error)
            .unwrap();
        let mut receiver = Receiver::new(incoming);
        let sent = thread::scope(|scope| {
            scope.spawn(move || {
                receiver
                    .run(&mut FromStd::new(b), &mut |_| Flow::GoOn)
                    .unwrap();
            });
            sender
                .run(&mut FromStd::new(a), &mut |_| Flow::GoOn)
                .unwrap()
        });
        let took = start.elapsed();
        drop(sender);
        let rate = (sent.pages * PAGE) as f64 / took.as_secs_f64();
        println!(
            "{:>6} MiB {:>10.1?} {:>8.0} {:>16.0} {:>8.2} {:>18.0} {:>8.2}",
            mib,
            took,
            rate / 1e6,
            alone / 1e6,
            rate / alone,
            cipher / 1e6,
            rate / cipher
        );
        free_clean(from);
        free_clean(to);
    }
}

fn main() {
    // `cargo test --benches` only asks whether it starts.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    inside();
    between();
}
