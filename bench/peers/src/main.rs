#![doc = include_str!("../README.md")]

#[path = "../../src/measurement.rs"]
#[allow(dead_code, unreachable_pub)]
mod figures;
mod image;
mod python;
mod work;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs};

use clap::Parser;
use kvm_ops_tdvf::{Order, Tdvf};
use rustix::time::{ClockId, clock_gettime};
use sev::measurement::sev::{
    SevEsMeasurementArgs, SevMeasurementArgs, sev_calc_launch_digest, seves_calc_launch_digest,
};
use sev::measurement::snp::{SnpMeasurementArgs, snp_calc_launch_digest};
use sev::measurement::vcpu_types::CpuType;
use sev::measurement::vmsa::GuestFeatures;
use sha2::Digest as _;
use soft_amd_sp::measure::Launch;

use crate::figures::{Contender, Digest, Hash, Measurement};
use crate::image::Image;
use crate::python::Tool;

/// The number of vCPUs of the launch.
const VCPUS: u32 = 4;
/// The signature of QEMU's EPYC-v4.
const SIGNATURE: u32 = 0x80_0f12;

/// Times launch digests against other programs.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Where the figures go.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// How often each digest is computed.
    #[arg(long, default_value_t = 100)]
    rounds: usize,
    /// The image, with metadata for SEV and for TDX.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// What was hidden from the programs, for the figures: a processor's instructions, if
    /// `OPENSSL_ia32cap` is set.
    #[arg(long, value_name = "TEXT")]
    hidden: Option<String>,
    /// Where the Python tool is installed, and an image is made up.
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Technology {
    Sev,
    SevEs,
    Snp,
    Tdx,
}

impl Technology {
    const ALL: [Self; 4] = [Self::Sev, Self::SevEs, Self::Snp, Self::Tdx];

    fn name(self) -> &'static str {
        match self {
            Self::Sev => "SEV",
            Self::SevEs => "SEV-ES",
            Self::Snp => "SEV-SNP",
            Self::Tdx => "TDX (MRTD)",
        }
    }

    /// The technology's name on the Python tool's command line.
    fn argument(self) -> &'static str {
        match self {
            Self::Sev => "sev",
            Self::SevEs => "seves",
            _ => "snp",
        }
    }

    /// The image that is measured.
    fn bytes<'a>(self, sev: &'a [u8], tdx: &'a [u8]) -> &'a [u8] {
        if self == Self::Tdx { tdx } else { sev }
    }

    fn hash(self) -> &'static str {
        match self {
            Self::Sev | Self::SevEs => "SHA-256",
            Self::Snp | Self::Tdx => "SHA-384",
        }
    }
}

/// Computes a digest with this project's code, from the file on.
fn ours(technology: Technology, image: &Image) -> Result<Vec<u8>, Box<dyn Error>> {
    if technology == Technology::Tdx {
        let image = fs::read(&image.tdx_file)?;
        return Ok(Tdvf::parse(&image)?.mrtd(Order::SinglePass).into());
    }
    let image = fs::read(&image.file)?;
    let launch = Launch::new(&image).vcpus(VCPUS).vcpu_sig(SIGNATURE);
    Ok(match technology {
        Technology::Sev => launch.sev()?.into(),
        Technology::SevEs => launch.sev_es()?.into(),
        _ => launch.snp()?.into(),
    })
}

/// The hash alone, with the implementation that this project's digests use, over so many bytes.
fn alone(technology: Technology, message: &[u8], length: u64) -> Vec<u8> {
    let message = message.get(..length as usize).unwrap_or(message);
    match technology.hash() {
        "SHA-256" if cfg!(feature = "openssl") => openssl::sha::sha256(message).to_vec(),
        "SHA-256" => sha2::Sha256::digest(message).to_vec(),
        _ if cfg!(feature = "openssl") => openssl::sha::sha384(message).to_vec(),
        _ => sha2::Sha384::digest(message).to_vec(),
    }
}

/// Computes the digest with the crate `sev`.
fn crate_sev(technology: Technology, image: &Image) -> Result<Vec<u8>, Box<dyn Error>> {
    let ovmf_file = image.file.clone();
    Ok(match technology {
        Technology::Sev => sev_calc_launch_digest(SevMeasurementArgs {
            ovmf_file,
            kernel_file: None,
            initrd_file: None,
            append: None,
        })?
        .into(),
        Technology::SevEs => seves_calc_launch_digest(SevEsMeasurementArgs {
            vcpus: VCPUS,
            vcpu_type: CpuType::EpycV4,
            ovmf_file,
            kernel_file: None,
            initrd_file: None,
            append: None,
            vmm_type: None,
        })?
        .into(),
        _ => snp_calc_launch_digest(SnpMeasurementArgs {
            vcpus: VCPUS,
            vcpu_type: CpuType::EpycV4,
            ovmf_file,
            guest_features: GuestFeatures(1),
            kernel_file: None,
            initrd_file: None,
            append: None,
            ovmf_hash_str: None,
            vmm_type: None,
        })?
        .try_into()?,
    })
}

/// Nanoseconds by the clock, and of processor time on all threads of the process.
#[derive(Clone, Copy, Debug)]
struct Time {
    clock: f64,
    processor: f64,
}

fn processor_time() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

fn timed<T>(f: impl FnOnce() -> T) -> (Time, T) {
    let (start, processor) = (Instant::now(), processor_time());
    let out = f();
    let time = Time {
        clock: start.elapsed().as_nanos() as f64,
        processor: processor_time() - processor,
    };
    (time, out)
}

/// What is timed.
#[derive(Clone, Copy, Debug)]
enum Program {
    Ours,
    CrateSev,
    Python,
    /// The digest's hash over as many bytes in memory as the digest has to hash.
    HashAlone,
}

/// The times of one program for one digest, one per round.
struct Column {
    program: Program,
    name: String,
    times: Vec<Time>,
}

/// The times of one technology; this project is the first column.
struct Row {
    technology: Technology,
    digest: Vec<u8>,
    columns: Vec<Column>,
}

impl Row {
    fn note(&mut self, column: usize, time: Time, digest: &[u8]) -> Result<(), Box<dyn Error>> {
        let column = &mut self.columns[column];
        if digest != self.digest {
            return Err(format!(
                "{} of {} is {}, that of {} {}",
                self.technology.name(),
                column.name,
                hex::encode(digest),
                "this project",
                hex::encode(&self.digest)
            )
            .into());
        }
        column.times.push(time);
        Ok(())
    }
}

/// The numbers below `count` in a random order. What a program leaves in caches and in the allocator
/// helps or hinders the next one, so each must follow each.
fn shuffled(random: &mut u64, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_cached_key(|_| {
        *random = random
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        *random >> 32
    });
    order
}

/// The speed of a hash alone, over the whole image.
struct Speed {
    hash: &'static str,
    by: &'static str,
    run: fn(&[u8]) -> Vec<u8>,
    ns: Vec<f64>,
}

fn speeds() -> Vec<Speed> {
    let speed = |hash, by, run| Speed {
        hash,
        by,
        run,
        ns: Vec::new(),
    };
    vec![
        speed("SHA-256", "crate sha2", |b| {
            sha2::Sha256::digest(b).to_vec()
        }),
        speed("SHA-256", "OpenSSL", |b| openssl::sha::sha256(b).to_vec()),
        speed("SHA-384", "crate sha2", |b| {
            sha2::Sha384::digest(b).to_vec()
        }),
        speed("SHA-384", "OpenSSL", |b| openssl::sha::sha384(b).to_vec()),
    ]
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = share * (sorted.len().saturating_sub(1)) as f64;
    sorted.get(at.round() as usize).copied().unwrap_or(f64::NAN)
}

fn contender(column: &Column, ours: &Column) -> Contender {
    let clock = |column: &Column| -> Vec<f64> { column.times.iter().map(|t| t.clock).collect() };
    let (times, own) = (clock(column), clock(ours));
    let ratios: Vec<f64> = times.iter().zip(&own).map(|(a, b)| a / b).collect();
    let processor: Vec<f64> = column.times.iter().map(|t| t.processor).collect();
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    Contender {
        name: column.name.clone(),
        ns: quantile(&times, 0.25).round(),
        processor_ns: quantile(&processor, 0.25).round(),
        ratio: round(quantile(&ratios, 0.5)),
        ratio_low: round(quantile(&ratios, 0.25)),
        ratio_high: round(quantile(&ratios, 0.75)),
    }
}

fn run(cli: &Cli) -> Result<Measurement, Box<dyn Error>> {
    let work_dir = match &cli.work_dir {
        Some(directory) => directory.clone(),
        // The folder `peers` beside this program.
        None => env::current_exe()?.with_file_name("peers"),
    };
    fs::create_dir_all(&work_dir)?;
    let image = Image::find(cli.image.as_deref(), &work_dir)?;
    let mut skipped = Vec::new();
    let mut tool = match Tool::start(&work_dir.join("python")) {
        Ok(tool) => Some(tool),
        Err(error) => {
            println!("skipped {}: {error}", Tool::name());
            skipped.push(format!("{}: {error}", Tool::name()));
            None
        }
    };

    let mut rows = Vec::new();
    for technology in Technology::ALL {
        let names = match technology {
            Technology::Tdx => vec![(Program::Ours, "kvm-ops-tdvf".to_owned())],
            _ => vec![
                (Program::Ours, "soft-amd-sp".to_owned()),
                (Program::CrateSev, "crate sev 8.0.0".to_owned()),
                (Program::Python, Tool::name()),
            ],
        };
        // The pages of SNP are messages of their own, so one hash over all is no measure for them.
        let alone = format!("{} alone, as many bytes", technology.hash());
        let alone = (technology != Technology::Snp).then_some((Program::HashAlone, alone));
        let column = |(program, name)| Column {
            program,
            name,
            times: Vec::new(),
        };
        let names = names.into_iter().chain(alone);
        rows.push(Row {
            technology,
            digest: ours(technology, &image)?,
            columns: names
                .filter(|(program, _)| tool.is_some() || !matches!(program, Program::Python))
                .map(column)
                .collect(),
        });
    }
    let mut speeds = speeds();
    let bytes = fs::read(&image.file)?;
    let tdx_bytes = fs::read(&image.tdx_file)?;
    let message = tdx_bytes.repeat(2);
    let mut random = 0x5eed;
    for _ in 0..cli.rounds.max(1) {
        for row in &mut rows {
            let technology = row.technology;
            for column in shuffled(&mut random, row.columns.len()) {
                let (time, digest) = match (row.columns[column].program, &mut tool) {
                    (Program::Ours, _) => timed(|| ours(technology, &image)),
                    (Program::CrateSev, _) => timed(|| crate_sev(technology, &image)),
                    (Program::HashAlone, _) => {
                        let hashed = work::bytes(technology, technology.bytes(&bytes, &tdx_bytes));
                        let (time, hash) = timed(|| alone(technology, &message, hashed));
                        std::hint::black_box(hash);
                        (time, Ok(row.digest.clone()))
                    }
                    (Program::Python, Some(tool)) => {
                        let (time, digest) = tool.digest(technology, &image)?;
                        (time, Ok(digest))
                    }
                    (Program::Python, None) => continue,
                };
                row.note(column, time, &digest?)?;
            }
        }
        for speed in &mut speeds {
            let (time, hash) = timed(|| (speed.run)(&bytes));
            std::hint::black_box(hash);
            speed.ns.push(time.clock);
        }
    }

    let digest = |row: &Row| Digest {
        technology: row.technology.name().to_owned(),
        digest: hex::encode(&row.digest),
        hash: row.technology.hash().to_owned(),
        hashed: work::bytes(row.technology, row.technology.bytes(&bytes, &tdx_bytes)),
        times: row
            .columns
            .iter()
            .map(|column| contender(column, &row.columns[0]))
            .collect(),
    };
    let hash = |speed: &Speed| Hash {
        hash: speed.hash.to_owned(),
        by: speed.by.to_owned(),
        mb_per_second: (bytes.len() as f64 * 1e3 / quantile(&speed.ns, 0.25)).round(),
    };
    Ok(Measurement {
        cpu: cpu(),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        hidden: cli.hidden.clone(),
        openssl: cfg!(feature = "openssl"),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        rustc: rustc(),
        image: image.name.clone(),
        bytes: bytes.len() as u64,
        vcpus: VCPUS,
        rounds: cli.rounds.max(1),
        python_process: tool
            .as_ref()
            .and_then(|_| python_process(&work_dir, &image)),
        skipped,
        digests: rows.iter().map(digest).collect(),
        hashes: speeds.iter().map(hash).collect(),
    })
}

/// Returns the fastest of several runs of the Python tool as a command.
fn python_process(work_dir: &Path, image: &Image) -> Option<f64> {
    let mut fastest = Duration::MAX;
    for _ in 0..10 {
        let start = Instant::now();
        let output = Command::new(work_dir.join("python/bin/sev-snp-measure"))
            .args(["--mode", "snp", "--vcpu-type", "EPYC-v4", "--vcpus"])
            .arg(VCPUS.to_string())
            .arg("--ovmf")
            .arg(&image.file)
            .output()
            .ok()?;
        if !output.status.success() {
            return None;
        }
        fastest = fastest.min(start.elapsed());
    }
    Some(fastest.as_nanos() as f64)
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

fn rustc() -> String {
    let output = Command::new("rustc").arg("--version").output();
    output.map_or_else(
        |_| "unknown".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}

fn print(measurement: &Measurement) {
    println!("{}, {} bytes", measurement.image, measurement.bytes);
    for digest in &measurement.digests {
        println!("{} {}", digest.technology, digest.digest);
        for time in &digest.times {
            println!(
                "  {:<24} {:>8.2} ms  {:>6.2} times ours ({:.2} - {:.2})",
                time.name,
                time.ns / 1e6,
                time.ratio,
                time.ratio_low,
                time.ratio_high
            );
        }
    }
    for hash in &measurement.hashes {
        println!(
            "{:<8} {:<12} {:>6.0} MB/s",
            hash.hash, hash.by, hash.mb_per_second
        );
    }
    if let Some(ns) = measurement.python_process {
        println!("{} as a command, SNP: {:.0} ms", Tool::name(), ns / 1e6);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let cli = Cli::parse();
    let measurement = run(&cli)?;
    print(&measurement);
    let mut text = serde_json::to_string_pretty(&measurement)?;
    text.push('\n');
    fs::write(&cli.out, text).map_err(|error| format!("{}: {error}", cli.out.display()).into())
}
