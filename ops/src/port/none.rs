//! The port of a machine that has none.

use super::{PagePort, PspPort, SeamPort, SeamRegs};
use crate::{
    AsidPools, CpuId, FieldCache, Hkid, Hpa, KeyPool, Level, PackageId, Page, PortId, Result,
};

/// The port of a machine that has none: a type without values.
#[derive(Clone, Copy, Debug)]
pub enum NoPort {}

impl SeamPort for NoPort {
    unsafe fn seamcall(&self, _: CpuId, _: u64, _: &mut SeamRegs) -> Result<u64> {
        match *self {}
    }

    fn package_of(&self, _: CpuId) -> Option<PackageId> {
        match *self {}
    }

    fn cpus(&self) -> u32 {
        match *self {}
    }

    fn packages(&self) -> u32 {
        match *self {}
    }

    fn this_cpu(&self) -> CpuId {
        match *self {}
    }

    fn kick(&self, _: CpuId) {
        match *self {}
    }

    fn fields(&self) -> &FieldCache {
        match *self {}
    }

    fn key_ids(&self) -> &KeyPool {
        match *self {}
    }

    fn with_key_id(&self, _: Hpa, _: Option<Hkid>) -> Hpa {
        match *self {}
    }
}

impl PspPort for NoPort {
    unsafe fn command(&self, _: u32, _: &mut [u8]) -> Result<u32> {
        match *self {}
    }

    fn wbinvd_all(&self) {
        match *self {}
    }

    fn asid_pools(&self) -> &AsidPools {
        match *self {}
    }

    fn c_bit(&self) -> u32 {
        match *self {}
    }

    fn asids(&self) -> (u32, u32) {
        match *self {}
    }
}

impl PagePort for NoPort {
    fn id(&self) -> PortId {
        match *self {}
    }

    fn alloc(&self, _: Level) -> Result<Page> {
        match *self {}
    }

    fn free(&self, _: Page) -> Result<(), Page> {
        match *self {}
    }

    fn write(&self, _: Hpa, _: &[u8]) -> Result<()> {
        match *self {}
    }

    fn read(&self, _: Hpa, _: &mut [u8]) -> Result<()> {
        match *self {}
    }
}
