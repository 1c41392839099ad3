//! Making a TD for tests.

use super::hosts;
use super::machine::{Config, Machine, MachineError};
use super::td::TestTd;
use super::{Host, QuoteStatus};
use crate::layout::{Layout, LayoutError};
use kvm_ops_guest::PageSize;
use kvm_ops_guest::tdx::{Gpaw, REPORT_LEN, TdInfo};
use soft_tdx_module::Platform;
use std::fmt;
use std::ops::Range;

/// The largest guest.
const MAX_RAM: u64 = 64 << 30;
const MAX_VCPUS: usize = 64;

/// The service that answers GetQuote: it makes a quote of a TDREPORT.
pub(super) type Quoting =
    Box<dyn FnMut(&[u8; REPORT_LEN], &Platform) -> Result<Vec<u8>, QuoteStatus> + Send>;

/// Makes a [`TestTd`]. The default has one vCPU, 1 GiB of memory, 48-bit addresses and
/// ATTRIBUTES.SEPT_VE_DISABLE, which Linux insists on; no page is there at first, and an honest host
/// gives pages when the guest asks for them.
///
/// Addresses come without the shared bit.
pub struct TestTdBuilder {
    config: Config,
    host: Box<dyn Host>,
    quoting: Option<Quoting>,
    quote_delay: u64,
}

impl fmt::Debug for TestTdBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestTdBuilder")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Default for TestTdBuilder {
    fn default() -> Self {
        Self {
            config: Config {
                gpaw: Gpaw::Bits48,
                attributes: TdInfo::SEPT_VE_DISABLE,
                vcpus: 1,
                ram: 1 << 30,
                seed: 1,
                measurement_ids: [[0; 48]; 3],
                layout: Layout::default(),
            },
            host: Box::new(hosts::honest()),
            quoting: None,
            quote_delay: 0,
        }
    }
}

impl TestTdBuilder {
    /// The width of addresses: 48 bits, or 52.
    #[must_use]
    pub fn gpaw(mut self, gpaw: Gpaw) -> Self {
        self.config.gpaw = gpaw;
        self
    }

    /// ATTRIBUTES. Without [`TdInfo::SEPT_VE_DISABLE`] a page that is not accepted raises #VE.
    #[must_use]
    pub fn attributes(mut self, attributes: u64) -> Self {
        self.config.attributes = attributes;
        self
    }

    /// The number of vCPUs, 1 to 64.
    #[must_use]
    pub fn vcpus(mut self, vcpus: usize) -> Self {
        self.config.vcpus = vcpus;
        self
    }

    /// The size of memory in bytes, from address 0 on: whole pages, at most 64 GiB. Above it are
    /// devices.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.ram = bytes;
        self
    }

    /// The seed of memory keys and of the module's random numbers; 1 unless told, so that runs
    /// repeat.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.config.seed = seed;
        self
    }

    /// MRCONFIGID, MROWNER and MROWNERCONFIG; zeros unless told.
    #[must_use]
    pub fn measurement_ids(mut self, ids: [[u8; 48]; 3]) -> Self {
        self.config.measurement_ids = ids;
        self
    }

    /// Private pages with contents that the launch measures into MRTD, accepted from the start. The
    /// last page is filled up with zeros.
    #[must_use]
    pub fn measured(mut self, gpa: u64, contents: &[u8]) -> Self {
        self.config.layout.launch(gpa, contents, true);
        self
    }

    /// Private pages of zeros, accepted from the start. MRTD has their addresses, and not their
    /// contents.
    #[must_use]
    pub fn accepted(mut self, range: Range<u64>) -> Self {
        self.config.layout.accepted(range);
        self
    }

    /// Private pages of 4 KiB that the host has given and the guest has to accept.
    #[must_use]
    pub fn pending(mut self, range: Range<u64>) -> Self {
        self.config.layout.pending_pages(range, PageSize::Size4K);
        self
    }

    /// The same in pages of 2 MiB.
    #[must_use]
    pub fn pending_large(mut self, range: Range<u64>) -> Self {
        self.config.layout.pending_pages(range, PageSize::Size2M);
        self
    }

    /// Pages that are shared from the start.
    #[must_use]
    pub fn shared(mut self, range: Range<u64>) -> Self {
        self.config.layout.share(range);
        self
    }

    /// The host: an honest one unless told. [`hosts`] has some that are not.
    #[must_use]
    pub fn host(mut self, host: impl Host + 'static) -> Self {
        self.host = Box::new(host);
        self
    }

    /// The quoting service, with which an honest host answers GetQuote: it gets the TDREPORT and the
    /// platform, which knows its reports (`Platform::verify_report`). Without one the answer is
    /// [`QuoteStatus::UNAVAILABLE`].
    #[must_use]
    pub fn quoting(
        mut self,
        service: impl FnMut(&[u8; REPORT_LEN], &Platform) -> Result<Vec<u8>, QuoteStatus>
        + Send
        + 'static,
    ) -> Self {
        self.quoting = Some(Box::new(service));
        self
    }

    /// Instructions of the guest until a quote is ready; 0 unless told. The buffer says IN_FLIGHT
    /// meanwhile.
    #[must_use]
    pub fn quote_delay(mut self, instructions: u64) -> Self {
        self.quote_delay = instructions;
        self
    }

    /// The TD, launched.
    ///
    /// # Errors
    /// The parts do not fit together, or the module refused them: [`BuildError`] has which.
    pub fn build(self) -> Result<TestTd, BuildError> {
        let config = &self.config;
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(BuildError::Vcpus(config.vcpus));
        }
        let ram = config.ram;
        if ram == 0 || ram > MAX_RAM || !ram.is_multiple_of(PageSize::Size4K.bytes()) {
            return Err(BuildError::Memory(ram));
        }
        config.layout.check(ram).map_err(BuildError::Layout)?;
        let (machine, pool) = Machine::new(config).map_err(BuildError::Machine)?;
        let shared = config.layout.shared().collect();
        Ok(TestTd::new(
            machine,
            pool,
            shared,
            self.host,
            self.quoting,
            self.quote_delay,
        ))
    }
}

/// Why there is no TD.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// There must be 1 to 64 vCPUs, and are so many.
    Vcpus(usize),
    /// Memory must be whole pages, and at most 64 GiB; this is its size.
    Memory(u64),
    /// The pages with which the TD starts cannot be.
    Layout(LayoutError),
    /// The module refused, for instance these attributes.
    Machine(MachineError),
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus(n) => write!(f, "{n} vcpus: there must be 1 to 64"),
            Self::Memory(n) => write!(f, "{n:#x} bytes of memory: not pages, or more than 64 GiB"),
            Self::Layout(error) => error.fmt(f),
            Self::Machine(_) => f.write_str("the td cannot be launched"),
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
