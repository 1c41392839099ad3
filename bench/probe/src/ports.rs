//! SEAMCALL, AMD SP and page ports whose answers are opaque to the compiler.

use std::hint::black_box;
use std::sync::LazyLock;

use kvm_ops::{
    AsidPools, CpuId, FieldCache, Hkid, Hpa, KeyPool, Level, PackageId, Page, PagePort, Pfn,
    PortId, PspPort, Result, SeamPort, SeamRegs, SnpAsids,
};

/// All ports in one type.
#[derive(Debug)]
pub(crate) struct Ports {
    id: PortId,
    keys: KeyPool,
    fields: FieldCache,
    asids: AsidPools,
}

/// The only value.
pub(crate) fn get() -> &'static Ports {
    static PORTS: LazyLock<Ports> = LazyLock::new(|| Ports {
        id: PortId::new(),
        keys: KeyPool::new(black_box(1)..black_box(64)),
        fields: FieldCache::default(),
        asids: AsidPools::new(black_box(64), black_box(32), SnpAsids::Shared),
    });
    &PORTS
}

impl SeamPort for Ports {
    unsafe fn seamcall(&self, _: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        black_box(regs);
        Ok(black_box(rax))
    }

    fn package_of(&self, cpu: CpuId) -> Option<PackageId> {
        black_box(Some(PackageId(cpu.0)))
    }

    fn cpus(&self) -> u32 {
        black_box(2)
    }

    fn packages(&self) -> u32 {
        black_box(1)
    }

    fn this_cpu(&self) -> CpuId {
        black_box(CpuId(0))
    }

    fn kick(&self, cpu: CpuId) {
        black_box(cpu);
    }

    fn fields(&self) -> &FieldCache {
        &self.fields
    }

    fn key_ids(&self) -> &KeyPool {
        &self.keys
    }

    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa {
        black_box(key);
        page
    }
}

impl PspPort for Ports {
    unsafe fn command(&self, id: u32, buffer: &mut [u8]) -> Result<u32> {
        black_box(buffer);
        Ok(black_box(id))
    }

    fn wbinvd_all(&self) {}

    fn asid_pools(&self) -> &AsidPools {
        &self.asids
    }

    fn c_bit(&self) -> u32 {
        black_box(51)
    }

    fn asids(&self) -> (u32, u32) {
        black_box((64, 32))
    }
}

impl PagePort for Ports {
    fn id(&self) -> PortId {
        self.id
    }

    fn alloc(&self, level: Level) -> Result<Page> {
        // SAFETY: the page number is not backed by memory; reads and writes have no effect.
        black_box(Ok(unsafe { Page::from_raw(Pfn::new(1), level, self.id) }))
    }

    fn free(&self, page: Page) -> Result<(), Page> {
        drop(page);
        black_box(Ok(()))
    }

    fn write(&self, _: Hpa, data: &[u8]) -> Result<()> {
        black_box(data);
        black_box(Ok(()))
    }

    fn read(&self, _: Hpa, data: &mut [u8]) -> Result<()> {
        black_box(data);
        black_box(Ok(()))
    }
}
