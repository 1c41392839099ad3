//! Export and import of 4 KiB pages beside the cipher alone, and two streams on two threads.
//!
//! `cargo bench --bench migrate [-- flat|encrypted|streams]`. Times are processor time where the system reports
//! it (Linux); a page's is the median of calls of 512 pages. A ratio is the median of those of a call and the cipher
//! beside it: from pages of its own to others, between two pages that stay in the cache, and to pages that the
//! process has never touched. What else runs on the machine slows all.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/migration.rs"]
mod migration;

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use common::regs;
use migration::{Bundle, MIGRATE, Migration};
use soft_tdx_module::HostLeaf as L;
use std::hint::black_box;
use std::time::Duration;

/// Pages of a list.
const LIST: u64 = 512;
/// Lists of a measurement.
const LISTS: u64 = 64;
const PAGE: usize = 4096;

/// Processor time this thread has used; wall-clock time where the system does not say.
#[cfg(target_os = "linux")]
fn processor_time() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Processor time this thread has used; wall-clock time where the system does not say.
#[cfg(not(target_os = "linux"))]
fn processor_time() -> Duration {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed()
}

/// Nanoseconds a page takes, where a call works on [`LIST`] of them.
fn per_page(mut call: impl FnMut()) -> f64 {
    let start = processor_time();
    call();
    (processor_time() - start).as_nanos() as f64 / LIST as f64
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// AES-256-GCM on as many pages of 4 KiB as a list has, with the 8 bytes of associated data that migration uses.
/// Goes from `text` to `out`, page by page, or as often between the only two pages.
fn cipher_alone(text: &[[u8; PAGE]], out: &mut [[u8; PAGE]]) -> f64 {
    let cipher = Aes256Gcm::new(&[7; 32].into());
    let count = out.len();
    per_page(|| {
        for n in 0..LIST as usize {
            let mut iv = [0; 12];
            iv[..8].copy_from_slice(&n.to_le_bytes());
            let iv: Nonce<_> = iv.into();
            let page = InOutBuf::new(&text[n % count][..], &mut out[n % count][..]);
            let page = page.expect("of equal length");
            let tag = cipher.encrypt_inout_detached(&iv, &[0; 8], page);
            black_box(tag.expect("short enough"));
        }
    })
}

fn gpas(list: u64) -> Vec<u64> {
    (0..LIST).map(|n| (list * LIST + n) << 12).collect()
}

fn pages(encrypt: bool) {
    let mut m = Migration::new(LISTS * LIST, encrypt);
    m.begin();
    m.target_tables(LISTS * LIST);
    m.source.ok(&m.p, L::ExportPause, regs(m.source.tdr, 0));
    let b = Bundle::of_stream(0);
    let memory = vec![[3; PAGE]; (LISTS * LIST) as usize];
    let mut buffers = vec![[0; PAGE]; LIST as usize];
    // So many bytes of zeros are fresh memory of the system.
    let mut untouched = vec![0; (LISTS * LIST) as usize * PAGE];
    let untouched = untouched.as_chunks_mut().0.chunks_mut(LIST as usize);
    let [mut same, mut each, mut new] = [const { Vec::new() }; 3];
    let [mut exports, mut fresh, mut used] = [const { Vec::new() }; 3];
    for ((list, texts), news) in (0..LISTS).zip(memory.chunks(LIST as usize)).zip(untouched) {
        m.list(&b, &gpas(list), MIGRATE);
        same.push(cipher_alone(&texts[..1], &mut [[0; PAGE]]));
        each.push(cipher_alone(texts, &mut buffers));
        exports.push(per_page(|| {
            m.source
                .ok(&m.p, L::ExportMem, b.memory(m.source.tdr, LIST));
        }));
        let pages = m.new_pages(&b, LIST);
        let were_used = list >= LISTS / 2;
        for page in pages.iter().filter(|_| were_used) {
            m.p.write_memory(*page, &[5; PAGE]).expect("memory");
        }
        let imports = if were_used { &mut used } else { &mut fresh };
        imports.push(per_page(|| {
            m.target
                .ok(&m.p, L::ImportMem, b.memory(m.target.tdr, LIST));
        }));
        // The last, since it brings the text into the cache.
        new.push(cipher_alone(texts, news));
    }
    let ratio = |times: &[f64], ciphers: &[f64]| {
        median(times.iter().zip(ciphers).map(|(a, b)| a / b).collect())
    };
    let memory = if encrypt { "encrypted" } else { "flat" };
    println!("\n-- a page of 4 KiB, memory {memory}");
    let columns = ["to the cipher", "in the cache", "to new pages"];
    println!("{:>62} {:>12} {:>12}", columns[0], columns[1], columns[2]);
    for (name, times, first) in [
        ("AES-256-GCM, from page to page", &each, 0),
        ("AES-256-GCM, the same two pages again", &same, 0),
        ("AES-256-GCM, to pages never touched", &new, 0),
        ("EXPORT.MEM", &exports, 0),
        ("IMPORT.MEM, into frames used before", &used, fresh.len()),
        ("IMPORT.MEM, into frames never touched", &fresh, 0),
    ] {
        let ns = median(times.clone());
        let [each, same, new] = [&each, &same, &new].map(|all| ratio(times, &all[first..]));
        println!("{name:<38} {ns:>8.0} ns {each:>10.2} x {same:>10.2} x {new:>10.2} x");
    }
}

/// Lists of pages each thread works on.
const ROUNDS: u64 = 200;

/// Pages that threads work on per second of their processor time. A worker gets its thread's number, and returns the
/// nanoseconds of a page.
fn rate(threads: u64, worker: impl Fn(u64) -> f64 + Sync) -> f64 {
    let worker = &worker;
    std::thread::scope(|s| {
        let running: Vec<_> = (0..threads).map(|t| s.spawn(move || worker(t))).collect();
        let times = running.into_iter().map(|t| t.join().expect("no panic"));
        times.map(|ns| 1e9 / ns).sum()
    })
}

/// Exports on as many streams as threads.
fn export_rate(m: &Migration, threads: u64) -> f64 {
    rate(threads, |stream| {
        let b = Bundle::of_stream(stream);
        m.list(&b, &gpas(stream), MIGRATE);
        let rounds = per_page(|| {
            for _ in 0..ROUNDS {
                let mut r = b.memory(m.source.tdr, LIST);
                r.rax = L::ExportMem.number();
                let lp = stream as usize * 2;
                let status = m.p.seamcall(lp, &mut r).expect("executes");
                assert!(!status.is_error(), "{status}");
            }
        });
        rounds / ROUNDS as f64
    })
}

/// The cipher alone on the same number of pages, of each thread's own: what two threads cannot share on this processor,
/// a stream of the module cannot have.
fn cipher_rate(threads: u64) -> f64 {
    rate(threads, |_| {
        let text = vec![[3; PAGE]; LIST as usize];
        let mut out = vec![[0; PAGE]; LIST as usize];
        let rounds = (0..ROUNDS).map(|_| cipher_alone(&text, &mut out));
        rounds.sum::<f64>() / ROUNDS as f64
    })
}

fn streams() {
    let mut m = Migration::new(2 * LIST, false);
    m.begin();
    m.source.ok(&m.p, L::ExportPause, regs(m.source.tdr, 0));
    m.state_bundles();
    // After the start token a page may be exported as often as one likes.
    m.token(true);
    println!("\n-- two threads against one, pages per second of processor time");
    // Each run of the exports beside one of the cipher: what else runs on the machine slows both.
    let [mut exports, mut ciphers] = [const { Vec::new() }; 2];
    for _ in 0..9 {
        exports.push(export_rate(&m, 2) / export_rate(&m, 1));
        ciphers.push(cipher_rate(2) / cipher_rate(1));
    }
    let (exports, ciphers) = (median(exports), median(ciphers));
    println!("EXPORT.MEM, two streams of one TD  {exports:>5.2} x");
    println!("AES-256-GCM alone                  {ciphers:>5.2} x");
}

fn main() {
    let only = std::env::args().nth(1).filter(|a| !a.starts_with("--"));
    let wanted = |what: &str| only.as_deref().is_none_or(|o| o == what);
    if wanted("flat") {
        pages(false);
    }
    if wanted("encrypted") {
        pages(true);
    }
    if wanted("streams") {
        streams();
    }
}
