//! Off-line measurement: the launch digests a guest owner expects.
//!
//! Nothing here needs a platform. The same functions are what the software AMD SP calls when it
//! measures, so a digest computed from an image and one read back from a launched guest meet in
//! one implementation of each rule, and the [recorded vectors](crate#the-vectors) hold that
//! implementation to independent ones.
//!
//! | technology | digest | covers |
//! |---|---|---|
//! | SEV | SHA-256 | the image bytes, then the table of kernel hashes |
//! | SEV-ES | SHA-256 | the same, then one VMSA page per vCPU |
//! | SEV-SNP | chain of SHA-384 | every page with its type, permissions and guest address |
//!
//! A digest of SNP is computed on all processors: the contents of the pages side by side, equal ones
//! once, then the chain. Those of SEV and SEV-ES are one message each, which cannot be split; the
//! feature `openssl` hashes them with OpenSSL.
//!
//! ```
//! use soft_amd_sp::measure::{cpu_signature, Launch};
//!
//! let image = vec![0x90_u8; 4096];
//! let launch = Launch::new(&image).vcpu_sig(cpu_signature("EPYC-v4").unwrap());
//! assert_eq!(launch.snp()?.len(), 48);
//! # Ok::<(), soft_amd_sp::measure::MeasureError>(())
//! ```

mod cpu;
mod digest;
mod id_block;
mod launch;
mod pages;
mod stream;
mod vmsa;

pub use cpu::{cpu_signature, cpu_types, signature_of};
pub use digest::{PAGE_SIZE, PageInfo, PageType, SevDigest, SnpDigest, VmplPermissions, sha384};
pub use id_block::{IdAuth, IdBlock};
pub use kvm_ops_ovmf::{
    HASH_TABLE_LEN, KernelHashes, Ovmf, OvmfError, Region, Section, SectionKind,
};
pub use launch::{Launch, MeasureError};
pub use vmsa::{BSP_EIP, InitialVmsa, VMSA_GPA, Vmm};

/// The 48-byte answer of LAUNCH_MEASURE: the keyed hash and the nonce it was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchMeasure {
    /// HMAC-SHA256 with the transport integrity key.
    pub measure: [u8; 32],
    /// The nonce the firmware drew.
    pub mnonce: [u8; 16],
}

impl LaunchMeasure {
    /// Computes MEASURE as the firmware does: over the byte 0x04, the firmware's version and
    /// build, the policy, the launch digest and the nonce.
    pub fn compute(
        tik: &[u8; 16],
        version: ApiVersion,
        policy: u32,
        launch_digest: &[u8; 32],
        mnonce: [u8; 16],
    ) -> Self {
        let measure = crate::crypto::hmac_sha256(
            tik,
            &[
                &[0x04, version.major, version.minor, version.build],
                &policy.to_le_bytes(),
                launch_digest,
                &mnonce,
            ],
        );
        Self { measure, mnonce }
    }

    /// The bytes LAUNCH_MEASURE writes.
    pub fn to_bytes(&self) -> [u8; 48] {
        let mut out = [0; 48];
        out[..32].copy_from_slice(&self.measure);
        out[32..].copy_from_slice(&self.mnonce);
        out
    }

    /// Reads what LAUNCH_MEASURE wrote.
    pub fn from_bytes(bytes: &[u8; 48]) -> Self {
        let mut out = Self {
            measure: [0; 32],
            mnonce: [0; 16],
        };
        out.measure.copy_from_slice(&bytes[..32]);
        out.mnonce.copy_from_slice(&bytes[32..]);
        out
    }
}

/// Version of the firmware interface, as PLATFORM_STATUS reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiVersion {
    /// Major number.
    pub major: u8,
    /// Minor number.
    pub minor: u8,
    /// Build number.
    pub build: u8,
}
