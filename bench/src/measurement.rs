//! The figures of launch digests: what bench/peers writes and `report` reads.

use serde::{Deserialize, Serialize};

/// One run of bench/peers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// The processor's name.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    /// The compiler.
    pub rustc: String,
    /// The image.
    pub image: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Virtual processors of the launch.
    pub vcpus: u32,
    /// How often each digest was computed.
    pub rounds: usize,
    /// Contenders that were not there, and why.
    pub skipped: Vec<String>,
    /// A digest each.
    pub digests: Vec<Digest>,
    /// Hashes alone.
    pub hashes: Vec<Hash>,
    /// A new process of the Python tool for SNP, in nanoseconds, its start included.
    pub python_process: Option<f64>,
}

/// The digest of one technology.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Digest {
    /// SEV, SEV-ES, SEV-SNP, or TDX with the order of its calls.
    pub technology: String,
    /// The digest itself, in hex: that of all contenders.
    pub digest: String,
    /// The hash it is made with.
    pub hash: String,
    /// Bytes that the hash works through, padding and records of pages included.
    pub hashed: u64,
    /// Who computed it; ours is the first.
    pub times: Vec<Contender>,
}

/// The time of one program for one digest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Contender {
    /// Which.
    pub name: String,
    /// Lower quartile of the rounds, in nanoseconds of processor time, the read of the file
    /// included.
    pub ns: f64,
    /// How many times ours: the median over the rounds, each round's own time against ours.
    pub ratio: f64,
    /// The lower quartile of that.
    pub ratio_low: f64,
    /// The upper quartile of that.
    pub ratio_high: f64,
}

/// The speed of a hash over the image as one message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hash {
    /// Which.
    pub hash: String,
    /// Whose: the first of a hash is the one that our digests use.
    pub by: String,
    /// Megabytes (10^6) in a second, in the lower quartile of the rounds' times.
    pub mb_per_second: f64,
}
