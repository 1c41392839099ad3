//! The figures of launch digests, written by bench/peers and read by `report`.

use serde::{Deserialize, Serialize};

/// One run of bench/peers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// The processor's name.
    pub cpu: String,
    /// The processors that the run could use.
    pub processors: usize,
    /// What was hidden from the programs, if anything.
    pub hidden: Option<String>,
    /// True if this project was built with its feature `openssl`.
    pub openssl: bool,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// The image's name.
    pub image: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Virtual processors of the launch.
    pub vcpus: u32,
    /// The number of computations of each digest.
    pub rounds: usize,
    /// Contenders that were missing, with the reasons.
    pub skipped: Vec<String>,
    /// The digests, one per technology.
    pub digests: Vec<Digest>,
    /// The hashes alone.
    pub hashes: Vec<Hash>,
    /// The time of a new process of the Python tool for SNP, in nanoseconds, its start included.
    pub python_process: Option<f64>,
}

/// The digest of one technology.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Digest {
    /// SEV, SEV-ES, SEV-SNP, or TDX with the order of its calls.
    pub technology: String,
    /// The digest in hex, on which all contenders agree.
    pub digest: String,
    /// The hash function.
    pub hash: String,
    /// The number of hashed bytes, padding and page records included.
    pub hashed: u64,
    /// The contenders; the first is this project.
    pub times: Vec<Contender>,
}

/// The time of one program for one digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Contender {
    /// The program's name.
    pub name: String,
    /// Nanoseconds by the clock, including the read of the file: the lower quartile of the rounds.
    pub ns: f64,
    /// Nanoseconds of processor time on all threads: the lower quartile of the rounds.
    pub processor_ns: f64,
    /// The time by the clock relative to ours: the median of the rounds, each compared with our time in that
    /// round.
    pub ratio: f64,
    /// The lower quartile of the ratio.
    pub ratio_low: f64,
    /// The upper quartile of the ratio.
    pub ratio_high: f64,
}

/// The speed of a hash over the image as one message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hash {
    /// The hash function's name.
    pub hash: String,
    /// The implementation.
    pub by: String,
    /// Megabytes (10^6 bytes) per second, from the lower quartile of the rounds' times.
    pub mb_per_second: f64,
}

/// The hashes alone, of a machine on which the digests of this version were not measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hashes {
    /// The processor's name.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// The hashes.
    pub hashes: Vec<Hash>,
}
