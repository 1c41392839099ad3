//! The first test of a kernel's SNP code.

use kvm_ops_guest::GpaRange;
use kvm_ops_guest::sev::{GhcbMsrPort, PvalidatePort, SevError, SevGuest};
use kvm_ops_guest_test::sev::TestSev;
use std::error::Error;

/// The kernel's code: takes memory into use, and shares its last page with a device.
fn set_up(cpu: impl GhcbMsrPort + PvalidatePort, memory: GpaRange) -> Result<(), SevError> {
    let mut guest = SevGuest::new(cpu, true);
    guest.validate(memory)?;
    let last = GpaRange::pages(memory.end() - 0x1000, 1)?;
    guest.share(last, |_flush| { /* the kernel's own */ })
}

#[test]
fn the_device_sees_the_last_page_only() -> Result<(), Box<dyn Error>> {
    let guest = TestSev::snp().assigned(0x8000..0xa000).build()?;
    guest.run(|cpu| {
        set_up(&mut *cpu, GpaRange::new(0x8000, 0x2000)?)?;
        cpu.write(0x8010, b"mine")?;
        cpu.write_shared(0x9000, b"hello")?;
        Ok::<_, Box<dyn Error>>(())
    })??;
    let host = guest.hypervisor();
    assert_eq!(host.read(host.behind(0x9000).unwrap(), 5)?, b"hello");
    Ok(())
}
