//! The first test of a kernel's TDX code.

use kvm_ops_guest::GpaRange;
use kvm_ops_guest::tdx::{TdGuest, TdcallPort};
use kvm_ops_guest_test::tdx::TestTd;
use std::error::Error;

/// The kernel's code: takes memory into use, and shares its last page with a device.
fn set_up(cpu: impl TdcallPort, memory: GpaRange) -> Result<(), Box<dyn Error>> {
    let mut td = TdGuest::new(cpu)?;
    td.accept(memory)?;
    let last = GpaRange::pages(memory.end() - 0x1000, 1)?;
    td.share(last, |_flush| { /* the kernel's own */ })?;
    Ok(())
}

#[test]
fn the_device_sees_the_last_page_only() -> Result<(), Box<dyn Error>> {
    const SHARED: u64 = 1 << 47;
    let td = TestTd::builder().pending(0x8000..0xa000).build()?;
    td.run(|cpu| {
        set_up(&mut *cpu, GpaRange::new(0x8000, 0x2000)?)?;
        cpu.write(0x8010, b"mine")?;
        cpu.write(SHARED | 0x9000, b"hello")?;
        Ok::<_, Box<dyn Error>>(())
    })??;
    assert_eq!(td.hypervisor().read(0x9000, 5)?, b"hello");
    Ok(())
}
