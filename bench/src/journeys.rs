//! Journeys of TDs from one process to another, taken by the program `kvm-ops`, beside the cipher alone.

use std::error::Error;
use std::fs;
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{figures, system};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bytes of a page.
const PAGE: usize = 4096;

/// The time for which the cipher is measured.
const SPAN: Duration = Duration::from_secs(1);

/// The pages over which the cipher goes, more than a processor's caches hold.
const CIPHER_PAGES: usize = 1 << 14;

/// Journeys of one run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Journeys {
    /// The processor's name.
    pub cpu: String,
    /// The processors that the run could use.
    pub processors: usize,
    /// The load average of the last minute when the run began: what other programs took.
    pub load: f64,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// AES-256-GCM over pages of 4 KiB on one thread, in MB/s, before the first journey and after the last.
    pub cipher: [f64; 2],
    /// Each journey.
    pub runs: Vec<Run>,
}

/// One journey.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Memory of the TD in MiB.
    pub mib: u64,
    /// The part that its program writes again and again, in MiB.
    pub working_set: u64,
    /// Epochs that were begun: the rounds, those while the TD was stopped, and that of the start token.
    pub rounds: u64,
    /// Pages that travelled, with repetitions.
    pub pages: u64,
    /// Seconds of the journey.
    pub seconds: f64,
    /// MB/s of pages that travelled, while the TD ran.
    pub sent: f64,
    /// MB/s of pages that its program wrote again.
    pub dirtied: f64,
    /// Pages that were left when the TD was stopped.
    pub left: u64,
    /// Seconds of downtime to be expected then, from the pages left and the rate.
    pub expected: f64,
    /// Seconds of downtime.
    pub downtime: f64,
    /// Pages that the arrived program found as it had written them.
    pub as_written: u64,
}

impl Run {
    /// Pages that the arrived program did not find as it had written them. It compares all but the first, which tells how
    /// far it is.
    pub fn lost(&self) -> u64 {
        let compared = self.mib * 256 - 1;
        compared.saturating_sub(self.as_written)
    }
}

/// Measures the journeys and writes the figures.
pub fn write(out: &Path, program: &Path, mib: &[u64], sets: &[u64]) -> Result<()> {
    let load = load()?;
    let before = cipher();
    let mut runs = Vec::new();
    for size in mib {
        for set in sets.iter().filter(|set| *set <= size) {
            let run = run(program, *size, *set)?;
            println!(
                "{size} MiB, {set} MiB written: {} rounds, {:.0} MB/s, {:.0} MB/s dirtied, {:.1} ms down",
                run.rounds,
                run.sent,
                run.dirtied,
                run.downtime * 1e3
            );
            runs.push(run);
        }
    }
    let journeys = Journeys {
        cpu: system::cpu(),
        processors: thread::available_parallelism().map_or(1, usize::from),
        load,
        kernel: system::kernel()?,
        rustc: env!("KVM_OPS_BENCH_RUSTC").to_owned(),
        cipher: [before, cipher()],
        runs,
    };
    figures::write(out, &journeys)
}

fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    let first = text.split_whitespace().next().ok_or("no load average")?;
    Ok(first.parse()?)
}

/// MB/s of AES-256-GCM over pages of 4 KiB.
fn cipher() -> f64 {
    let cipher = Aes256Gcm::new(&[7; 32].into());
    let mut memory = vec![0x5a; CIPHER_PAGES * PAGE];
    let (start, mut pages) = (Instant::now(), 0u64);
    while start.elapsed() < SPAN {
        for page in memory.chunks_exact_mut(PAGE) {
            let mut iv = [0; 12];
            iv[..8].copy_from_slice(&pages.to_le_bytes());
            let iv: Nonce<_> = iv.into();
            let tag = cipher.encrypt_inout_detached(&iv, &[], page.into());
            // Pages of 4 KiB are far below the cipher's limit.
            black_box(tag.is_ok());
            pages += 1;
        }
    }
    (pages * PAGE as u64) as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// The longest time of a journey.
const TIMEOUT: &str = "10m";

/// A process that waits for a TD at a socket, which goes with it.
struct Receiver {
    child: Child,
    socket: PathBuf,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It has ended, unless its source failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

impl Receiver {
    fn start(mut command: Command, socket: PathBuf) -> Result<Self> {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let receiver = Self { child, socket };
        let start = Instant::now();
        while !receiver.socket.exists() {
            if start.elapsed() > Duration::from_secs(10) {
                return Err("the receiving process does not wait at its socket".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(receiver)
    }

    fn report(&mut self) -> Result<Value> {
        let mut said = Vec::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            stdout.read_to_end(&mut said)?;
        }
        let status = self.child.wait()?;
        let stdout = said;
        let stderr = Vec::new();
        report(
            "receive",
            Output {
                status,
                stdout,
                stderr,
            },
        )
    }
}

/// A report, of a process that lost nothing.
fn report(what: &str, output: Output) -> Result<Value> {
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("`kvm-ops migrate {what}` said no JSON: {error}"))?;
    match output.status.success() {
        true => Ok(report),
        false => Err(format!("`kvm-ops migrate {what}` lost something: {report}").into()),
    }
}

/// A TD goes from one process to another.
fn run(program: &Path, mib: u64, set: u64) -> Result<Run> {
    let socket = std::env::temp_dir().join(format!("kvm-ops-bench-{}", std::process::id()));
    let address = format!("unix:{}", socket.display());
    let migrate = |how: &str| {
        let mut command = Command::new(program);
        command
            .args(["migrate", how, &address, "--tech", "tdx", "--json"])
            .args(["--rounds", "8", "--timeout", TIMEOUT])
            .args(["--memory", &format!("{mib}M")])
            .args(["--working-set", &format!("{set}M")]);
        command
    };
    let mut receiver = Receiver::start(migrate("receive"), socket)?;
    let sent = report("send", migrate("send").output()?)?;
    let received = receiver.report()?;
    let number = |value: &Value| value.as_f64().ok_or("a report without figures");
    let count = |report: &Value, name: &str| report[name].as_u64().ok_or("a report without counts");
    let at_stop = &sent["at_stop"];
    Ok(Run {
        mib,
        working_set: set,
        rounds: count(&sent, "rounds")?,
        pages: count(&sent, "pages")?,
        seconds: number(&sent["seconds"])?,
        sent: number(&at_stop["sent_megabytes_per_second"])?,
        dirtied: number(&at_stop["dirtied_megabytes_per_second"])?,
        left: count(at_stop, "pages_left")?,
        expected: number(&at_stop["expected_downtime_seconds"])?,
        downtime: number(&sent["downtime_seconds"])?,
        as_written: count(&received, "pages_as_written")?,
    })
}
