//! Records of a real program: the client of this project, run again with the library in front of libc.

mod common;
#[path = "client/guest.rs"]
#[allow(dead_code)] // The client's tests use the rest.
mod guest;

use std::path::{Path, PathBuf};

use common::{again_with, run_again};
use kvm_ops::{
    Exit, Gpa, HostRange, MemSlot, Regs, SevParams, SlotId, VcpuId, VcpuOps, VmConfig, create,
};
use vm_memory::MmapRegion;

/// Set where the program shall differ from the one that was recorded.
const OTHER: &str = "KVM_OPS_TEST_OTHER";

/// A file of its own, which is gone when the test is over.
struct Record(PathBuf);

impl Record {
    fn new(name: &str) -> Self {
        let file = format!("kvm-ops-{}-{name}.txt", std::process::id());
        Self(std::env::temp_dir().join(file))
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.0).unwrap()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Guests of each SEV technology up to the end of their launch, with their measurements.
fn launches() {
    let host = guest::host();
    let policy = std::env::var_os(OTHER).map(|_| 1);
    for tech in guest::TECHS {
        let memory = guest::memory();
        let params = SevParams {
            policy: policy.filter(|_| tech == kvm_ops::Tech::Sev),
            ..SevParams::default()
        };
        let mut vm = create(&host, &guest::config(tech, params)).unwrap();
        vm.set_memory_slot(guest::slot(&memory)).unwrap();
        guest::add_pages(&mut vm);
        vm.finalize().unwrap();
        assert!(vm.destroy().is_clean());
    }
}

/// A normal VM whose guest writes a word to 0x2000, says it at a port and halts.
fn executes() {
    const CODE: [u8; 12] = [
        0xc7, 0x06, 0x00, 0x20, 0x34, 0x12, 0xa1, 0x00, 0x20, 0xe7, 0x80, 0xf4,
    ];
    let host = guest::host();
    let memory: MmapRegion<()> = MmapRegion::new(0x1_0000).unwrap();
    let at = memory.as_ptr();
    // SAFETY: nothing else uses the region yet, and it has room.
    unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), at.add(0x1000), CODE.len()) };
    let mut vm = create(&host, &VmConfig::normal()).unwrap();
    // SAFETY: the region outlives the VM, and nothing references its contents while guests run.
    let range = unsafe { HostRange::new(at as u64, memory.size() as u64) }.unwrap();
    vm.set_memory_slot(MemSlot::new(SlotId(0), Gpa::new(0), range))
        .unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.selector, sregs.cs.base) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = Regs {
        rip: 0x1000,
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_regs(&regs).unwrap();
    vm.finalize().unwrap();
    let exit = vcpu.vcpu_run().unwrap();
    assert!(matches!(exit, Exit::IoOut { port: 0x80, .. }), "{exit:?}");
    // SAFETY: the vCPU is out of the guest.
    let word = unsafe { at.add(0x2000).cast::<u16>().read_volatile() };
    assert_eq!(word, 0x1234);
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::Hlt));
    drop(vcpu);
    assert!(vm.destroy().is_clean());
}

/// Records a test's run on a machine, and serves it from the record.
fn both(test: &str, vendor: &str, record: &Record) {
    let path: &Path = &record.0;
    let recorded = again_with(test, vendor, &[("KVM_OPS_RECORD", path)]).expect("the outer run");
    let calls = |log: &str| {
        log.lines()
            .filter(|line| line.starts_with("ioctl("))
            .count()
    };
    let served = again_with(test, "none", &[("KVM_OPS_REPLAY", path)]).expect("the outer run");
    assert!(calls(&recorded) > 10);
    assert_eq!(calls(&recorded), calls(&served));
}

#[test]
fn launches_of_sev_guests_are_served_from_their_record_and_a_changed_one_is_stopped() {
    const NAME: &str =
        "launches_of_sev_guests_are_served_from_their_record_and_a_changed_one_is_stopped";
    if common::is_inside() {
        return launches();
    }
    let record = Record::new("launches");
    both(NAME, "amd", &record);
    assert!(record.text().contains("KVM_MEMORY_ENCRYPT_OP"));
    let variables = [
        ("KVM_OPS_REPLAY", record.0.as_path()),
        (OTHER, Path::new("1")),
    ];
    let (output, _) = run_again(NAME, "none", &variables);
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("kvm-ops replay: call ") && text.contains("arg*8+0 differs from byte 0x4 on"),
        "{text}"
    );
}

#[test]
fn a_guest_that_ran_is_served_from_the_record_with_what_it_wrote() {
    const NAME: &str = "a_guest_that_ran_is_served_from_the_record_with_what_it_wrote";
    if common::is_inside() {
        return executes();
    }
    for vendor in ["amd", "intel"] {
        let record = Record::new(vendor);
        both(NAME, vendor, &record);
        assert!(
            record.text().contains(" memory 0 2000 3412\n"),
            "{}",
            record.text()
        );
    }
}

#[test]
fn a_record_is_not_written_over() {
    const NAME: &str = "a_record_is_not_written_over";
    if common::is_inside() {
        return executes();
    }
    let record = Record::new("kept");
    std::fs::write(&record.0, "mine").unwrap();
    let (output, _) = run_again(NAME, "amd", &[("KVM_OPS_RECORD", &record.0)]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(record.text(), "mine");
}
