//! Making an SEV guest for tests.

use super::hypervisor::HostError;
use super::launch::{Machine, Technology};
use super::{Host, TestSev, hosts};
use crate::layout::{Layout, LayoutError};
use kvm_ops_guest::PageSize;
use std::fmt;
use std::ops::Range;

/// The largest guest.
const MAX_RAM: u64 = 16 << 30;

/// What a guest is made of.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) technology: Technology,
    pub(super) ram: u64,
    pub(super) seed: u64,
    pub(super) coherent: bool,
    pub(super) layout: Layout,
    pub(super) secrets: Option<u64>,
    pub(super) vlek: Option<u64>,
    pub(super) certificates: Vec<u8>,
}

/// Makes a [`TestSev`]. The default has 256 MiB of memory and an honest host, which gives pages when the
/// guest asks for them.
///
/// Addresses come without the C-bit.
pub struct TestSevBuilder {
    config: Config,
    host: Box<dyn Host>,
}

impl fmt::Debug for TestSevBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestSevBuilder")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl TestSevBuilder {
    pub(super) fn new(technology: Technology) -> Self {
        Self {
            config: Config {
                technology,
                ram: 256 << 20,
                seed: 1,
                coherent: true,
                layout: Layout::default(),
                secrets: None,
                vlek: None,
                certificates: Vec::new(),
            },
            host: Box::new(hosts::honest()),
        }
    }

    /// The size of memory in bytes, from address 0 on: whole pages, at most 16 GiB.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.ram = bytes;
        self
    }

    /// The seed of the platform's keys; 1 unless told, so that runs repeat.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.config.seed = seed;
        self
    }

    /// SME_COHERENT as the kernel of [`TestSev::kernel`](super::Vcpu::kernel) is told; true unless told.
    #[must_use]
    pub fn coherent(mut self, coherent: bool) -> Self {
        self.config.coherent = coherent;
        self
    }

    /// Private pages with contents that the launch measures, validated from the start. The last page is
    /// filled up with zeros.
    #[must_use]
    pub fn measured(mut self, gpa: u64, contents: &[u8]) -> Self {
        self.config.layout.launch(gpa, contents, true);
        self
    }

    /// Private pages of zeros, validated from the start.
    #[must_use]
    pub fn validated(mut self, range: Range<u64>) -> Self {
        self.config.layout.accepted(range);
        self
    }

    /// Private pages of 4 KiB that the host has assigned and the guest has to validate. For SNP.
    #[must_use]
    pub fn assigned(mut self, range: Range<u64>) -> Self {
        self.config.layout.pending_pages(range, PageSize::Size4K);
        self
    }

    /// The same in pages of 2 MiB.
    #[must_use]
    pub fn assigned_large(mut self, range: Range<u64>) -> Self {
        self.config.layout.pending_pages(range, PageSize::Size2M);
        self
    }

    /// Pages that are shared from the start.
    #[must_use]
    pub fn shared(mut self, range: Range<u64>) -> Self {
        self.config.layout.share(range);
        self
    }

    /// The secrets page, with the keys of guest messages: validated from the start. For SNP. It is no
    /// other part of the layout.
    #[must_use]
    pub fn secrets(mut self, gpa: u64) -> Self {
        self.config.secrets = Some(gpa);
        self
    }

    /// The seed of the provider's VLEK, which the host loads before the guest starts (SNP_VLEK_LOAD). For
    /// SNP.
    #[must_use]
    pub fn vlek(mut self, seed: u64) -> Self {
        self.config.vlek = Some(seed);
        self
    }

    /// The certificates that an honest host adds to extended guest requests: none unless told.
    #[must_use]
    pub fn certificates(mut self, table: &[u8]) -> Self {
        self.config.certificates = table.to_vec();
        self
    }

    /// The host: an honest one unless told. [`hosts`] has some that are not.
    #[must_use]
    pub fn host(mut self, host: impl Host + 'static) -> Self {
        self.host = Box::new(host);
        self
    }

    /// The guest, launched.
    ///
    /// # Errors
    /// The parts do not fit together, or the firmware refused them: [`BuildError`] has which.
    pub fn build(mut self) -> Result<TestSev, BuildError> {
        let ram = self.config.ram;
        if ram == 0 || ram > MAX_RAM || !ram.is_multiple_of(PageSize::Size4K.bytes()) {
            return Err(BuildError::Memory(ram));
        }
        let is_snp = self.config.technology == Technology::Snp;
        let needs_snp = self.config.secrets.is_some()
            || self.config.vlek.is_some()
            || self.config.layout.pending().next().is_some();
        if needs_snp && !is_snp {
            return Err(BuildError::NeedsSnp);
        }
        if let Some(gpa) = self.config.secrets {
            self.config.layout.reserve(gpa);
        }
        self.config.layout.check(ram).map_err(BuildError::Layout)?;
        let (machine, world) = Machine::new(&self.config).map_err(BuildError::Machine)?;
        let coherent = self.config.coherent;
        Ok(TestSev::new(machine, world, self.host, coherent))
    }
}

/// Why there is no guest.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// Memory must be whole pages, and at most 16 GiB; this is its size.
    Memory(u64),
    /// The pages with which the guest starts cannot be.
    Layout(LayoutError),
    /// Pages to validate, a secrets page and a VLEK are SNP's.
    NeedsSnp,
    /// The firmware refused.
    Machine(HostError),
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(n) => write!(f, "{n:#x} bytes of memory: not pages, or more than 16 GiB"),
            Self::Layout(error) => error.fmt(f),
            Self::NeedsSnp => f.write_str("pages to validate, a secrets page and a vlek need snp"),
            Self::Machine(_) => f.write_str("the guest cannot be launched"),
        }
    }
}

impl std::error::Error for BuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Machine(error) => Some(error),
            _ => None,
        }
    }
}
