//! Export and import of 4 KiB pages beside the cipher alone, and two streams on two threads.
//!
//! `cargo bench --bench migrate [-- flat|encrypted|streams]`. Times are processor time where the system reports
//! it (Linux); a page's is the median of calls of 512 pages. A ratio is the median of those of a call and the cipher
//! just before it: what else runs on the machine slows both.

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
    let [mut same, mut each, mut exports, mut fresh, mut used] = [const { Vec::new() }; 5];
    for (list, texts) in (0..LISTS).zip(memory.chunks(LIST as usize)) {
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
    }
    let ratio = |times: &[f64], first: usize| {
        let ciphers = each[first..].iter();
        median(times.iter().zip(ciphers).map(|(a, b)| a / b).collect())
    };
    let half = (LISTS / 2) as usize;
    let rows = [
        ("AES-256-GCM, the same two pages again", &same, 0),
        ("EXPORT.MEM", &exports, 0),
        ("IMPORT.MEM, into frames used before", &used, half),
        ("IMPORT.MEM, into frames never touched", &fresh, 0),
    ];
    let rows = rows.map(|(name, times, first)| (name, median(times.clone()), ratio(times, first)));
    let cipher = median(each.clone());
    let memory = if encrypt { "encrypted" } else { "flat" };
    println!("\n-- a page of 4 KiB, memory {memory}");
    println!("{:<42} {cipher:>8.0} ns", "AES-256-GCM, from page to page");
    for (name, ns, ratio) in rows {
        println!("{name:<42} {ns:>8.0} ns {ratio:>6.2} x");
    }
}

/// Pages each thread exports per second of its processor time, on a separate stream.
fn export_rate(m: &Migration, threads: u64) -> f64 {
    const ROUNDS: u64 = 200;
    let worker = |stream: u64| {
        let b = Bundle::of_stream(stream);
        m.list(&b, &gpas(stream), MIGRATE);
        let start = processor_time();
        for _ in 0..ROUNDS {
            let mut r = b.memory(m.source.tdr, LIST);
            r.rax = L::ExportMem.number();
            let lp = stream as usize * 2;
            let status = m.p.seamcall(lp, &mut r).expect("executes");
            assert!(!status.is_error(), "{status}");
        }
        (ROUNDS * LIST) as f64 / (processor_time() - start).as_secs_f64()
    };
    std::thread::scope(|s| {
        let running: Vec<_> = (0..threads).map(|t| s.spawn(move || worker(t))).collect();
        let rates = running.into_iter().map(|t| t.join().expect("no panic"));
        rates.sum::<f64>()
    })
}

fn streams() {
    let mut m = Migration::new(2 * LIST, false);
    m.begin();
    m.source.ok(&m.p, L::ExportPause, regs(m.source.tdr, 0));
    m.state_bundles();
    // After the start token a page may be exported as often as one likes.
    m.token(true);
    let rounds = |threads| median((0..5).map(|_| export_rate(&m, threads)).collect());
    let (one, two) = (rounds(1), rounds(2));
    println!("\n-- two streams of one TD on two threads, pages per second of processor time");
    println!(
        "EXPORT.MEM: one stream {:.0} k/s, two {:.0} k/s: {:.2}x",
        one / 1e3,
        two / 1e3,
        two / one
    );
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
