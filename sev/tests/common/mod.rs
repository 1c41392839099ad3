//! Helpers of the tests: machines, host memory to lend, and VMs in the steps of their life.
#![allow(dead_code)] // Each test file uses its part.

extern crate kvm_ops_core as kvm_ops;

use std::sync::Arc;

use kvm_ops::guest::{Action, GuestProgram, Outcome};
use kvm_ops::{
    Backend, EncParams, Exit, FreeReport, Gpa, Host, HostRange, InitialPage, InitialPageKind,
    MemSlot, PspPort, SevParams, SlotId, Tech, VcpuId, VcpuOps, Vendor, VmOps, VmParams,
};
use kvm_ops_sev::{SevVcpu, SevVm};
use kvm_ops_sim::{SevSetup, SimHost};
use soft_amd_sp::Platform;
use vm_memory::MmapRegion;

pub(crate) const TECHS: [Tech; 3] = [Tech::Sev, Tech::SevEs, Tech::SevSnp];
/// The C-bit of the default platform.
pub(crate) const C: u64 = 1 << 51;
pub(crate) const PAGE: u64 = 4096;
/// The address of the tests' memory.
pub(crate) const RAM: u64 = 0x20_0000;

pub(crate) fn platform(seed: u64) -> soft_amd_sp::Builder {
    Platform::builder()
        .memory(32 << 20)
        .cores(2)
        .asids(4, 7)
        .seed(seed)
}

/// A machine with ASIDs 1 to 3 for SEV-ES and SNP, 4 to 7 for SEV.
pub(crate) fn host(seed: u64) -> SimHost {
    host_from(SevSetup::new(platform(seed)))
}

pub(crate) fn host_from(setup: SevSetup) -> SimHost {
    SimHost::builder(Vendor::Amd).sev(setup).build().unwrap()
}

pub(crate) fn sp(host: &SimHost) -> &Arc<Platform> {
    host.sev_platform().unwrap()
}

/// Anonymous memory, kept until the end of the test.
pub(crate) struct Ram(MmapRegion<()>);

impl Ram {
    pub(crate) fn new(bytes: u64) -> Self {
        Self(MmapRegion::new(bytes as usize).unwrap())
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    pub(crate) fn range(&self) -> HostRange {
        // SAFETY: the tests drop their VMs before their `Ram`, and use it through `read` and
        // `write` alone, which copy.
        unsafe { HostRange::new(self.address(), self.0.size() as u64).unwrap() }
    }

    pub(crate) fn slot(&self, id: u32, gpa: u64) -> MemSlot {
        MemSlot::new(SlotId(id), Gpa::new(gpa), self.range())
    }

    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.0.size());
        // SAFETY: the region is mapped for as long as `self`, and the range lies in it.
        (at..at + len)
            .map(|i| unsafe { self.0.as_ptr().add(i).read_volatile() })
            .collect()
    }

    pub(crate) fn write(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.0.size());
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { self.0.as_ptr().add(at + i).write_volatile(*byte) };
        }
    }
}

pub(crate) fn params(vcpus: u32, sev: SevParams) -> VmParams {
    VmParams {
        enc: EncParams::Sev(Box::new(sev)),
        ..VmParams::new(vcpus)
    }
}

pub(crate) fn create(host: &SimHost, tech: Tech, vcpus: u32) -> SevVm<SimHost> {
    SevVm::create(host, host.next_vm_id(), tech, &VmParams::new(vcpus)).unwrap()
}

/// Initialised, with `ram` at [`RAM`].
pub(crate) fn with_ram(host: &SimHost, tech: Tech, vcpus: u32, ram: &Ram) -> SevVm<SimHost> {
    let mut vm = create(host, tech, vcpus);
    vm.vm_init().unwrap();
    vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    vm
}

pub(crate) fn page(byte: u8) -> Box<[u8; 4096]> {
    Box::new([byte; 4096])
}

pub(crate) fn measured(gpa: u64, contents: &[u8; 4096]) -> InitialPage<'_> {
    InitialPage {
        gpa: Gpa::new(gpa),
        contents,
        kind: InitialPageKind::Measured,
    }
}

/// Takes the whole teardown.
pub(crate) fn free<V: VmOps>(mut vm: V) -> FreeReport {
    let key = vm.mmu_release_hkid().unwrap();
    let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
    vm.vm_free(drained)
}

/// Frees it and expects everything back.
#[track_caller]
pub(crate) fn free_clean<V: VmOps>(vm: V) {
    let report = free(vm);
    assert_eq!(report.leaks, []);
}

/// Nothing of any VM is left on the machine.
#[track_caller]
pub(crate) fn nothing_left(host: &SimHost) {
    let snapshot = sp(host).snapshot();
    assert_eq!(snapshot.guests, []);
    assert_eq!(snapshot.snp_guests, []);
    assert_eq!(host.pages().unwrap().frames_out(), 0);
    assert_eq!(host.psp().unwrap().asid_pools().in_use(), 0);
    assert_eq!(host.live_vms(), 0);
    // The trusted memory region alone is not the hypervisor's.
    let ours = snapshot.rmp.iter().filter(|r| r.spa != 2 << 20);
    assert_eq!(ours.count(), 0, "{snapshot}");
}

/// A program that does its actions one by one and keeps what they came to.
pub(crate) struct Probe {
    actions: Vec<Action<'static>>,
    next: usize,
    log: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Probe {
    pub(crate) fn new(actions: Vec<Action<'static>>) -> (Self, Arc<std::sync::Mutex<Vec<String>>>) {
        let log = Arc::default();
        let next = 0;
        let probe = Self {
            actions,
            next,
            log: Arc::clone(&log),
        };
        (probe, log)
    }
}

impl GuestProgram for Probe {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if !matches!(last, Outcome::Start { .. }) {
            self.log.lock().unwrap().push(format!("{last:?}"));
        }
        let action = self.actions.get(self.next).copied();
        self.next += 1;
        action.unwrap_or(Action::Shutdown)
    }
}

/// Gives a program to a vCPU.
pub(crate) fn load(vcpu: &mut impl VcpuOps, program: impl GuestProgram + 'static) {
    let programs = vcpu.programs().expect("the software machine runs programs");
    programs.load_program(Box::new(program)).unwrap();
}

/// Runs until the guest shuts down; conversions are done as asked, memory faults as touched.
pub(crate) fn run(vm: &SevVm<SimHost>, vcpu: &mut SevVcpu<SimHost>) {
    for _ in 0..1000 {
        let (gpa, pages, to) = match vcpu.vcpu_run().unwrap() {
            Exit::Shutdown => return,
            Exit::MapGpaRange { gpa, pages, to } => (gpa, pages, to),
            Exit::MemoryFault { gpa, bytes, access } => (gpa, bytes / PAGE, access),
            other => panic!("{other:?}"),
        };
        let first = kvm_ops::Gfn::containing(gpa);
        assert_eq!(vm.set_memory_attributes(first, pages, to), Ok(pages));
    }
    panic!("the guest does not end");
}

/// Runs a list of actions on vCPU 0 of a runnable VM and answers what they came to.
pub(crate) fn outcomes(
    vm: &SevVm<SimHost>,
    vcpu: &mut SevVcpu<SimHost>,
    actions: Vec<Action<'static>>,
) -> Vec<String> {
    let (probe, log) = Probe::new(actions);
    load(vcpu, probe);
    run(vm, vcpu);
    let log = log.lock().unwrap();
    log.clone()
}

pub(crate) fn vcpu(vm: &SevVm<SimHost>, id: u32) -> SevVcpu<SimHost> {
    vm.create_vcpu(VcpuId(id)).unwrap()
}
