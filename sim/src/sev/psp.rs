//! The mailbox and the RMP instructions of the host.

use std::fmt;
use std::sync::Arc;

use kvm_ops::{AsidPools, Error, Field, Hpa, PspPort, Result};
use soft_amd_sp::{PageSize, Platform, RmpError, RmpUpdate};

/// The port of the software AMD SP.
#[derive(Clone)]
pub struct SoftPsp {
    platform: Arc<Platform>,
    pools: Arc<AsidPools>,
}

impl SoftPsp {
    pub(super) fn new(platform: Arc<Platform>, pools: AsidPools) -> Self {
        Self {
            platform,
            pools: Arc::new(pools),
        }
    }
}

fn word<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

/// EAX of an RMP instruction; #UD where SNP is off.
fn code(result: Result<(), RmpError>) -> Result<u32> {
    match result {
        Ok(()) => Ok(0),
        Err(error) => match error.code() {
            Some(code) => Ok(code),
            None => kvm_ops::not_offered!("an RMP instruction without SNP"),
        },
    }
}

impl PspPort for SoftPsp {
    unsafe fn command(&self, id: u32, buffer: &mut [u8]) -> Result<u32> {
        Ok(self.platform.command(id, buffer).0.into())
    }

    fn wbinvd_all(&self) {
        self.platform.wbinvd_all();
    }

    unsafe fn rmpupdate(&self, page: Hpa, entry: &[u8; 16]) -> Result<u32> {
        let new = RmpUpdate {
            gpa: u64::from_le_bytes(word(&entry[..8])),
            assigned: entry[8] & 1 != 0,
            size: match entry[9] & 1 {
                0 => PageSize::Size4K,
                _ => PageSize::Size2M,
            },
            immutable: entry[10] & 1 != 0,
            asid: u32::from_le_bytes(word(&entry[12..])),
        };
        code(self.platform.rmpupdate(page.get(), &new))
    }

    unsafe fn psmash(&self, page: Hpa) -> Result<u32> {
        code(self.platform.psmash(page.get()))
    }

    fn rmpread(&self, page: Hpa) -> Result<[u8; 16]> {
        let entry = self.platform.rmpread(page.get());
        let entry = entry.ok_or(Error::Invalid(Field::HostAddress, page.get()))?;
        Ok(entry.to_rmpread())
    }

    fn relax(&self) {
        std::thread::yield_now();
    }

    fn asid_pools(&self) -> &AsidPools {
        &self.pools
    }

    fn c_bit(&self) -> u32 {
        self.platform.c_bit()
    }

    fn asids(&self) -> (u32, u32) {
        let sev = self.platform.sev_asids();
        (*sev.end(), *sev.start())
    }
}

impl fmt::Debug for SoftPsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftPsp")
            .field("pools", &self.pools)
            .finish_non_exhaustive()
    }
}
