//! Owners and mirrors that end in every way: nothing that one of them uses is freed, nothing is
//! lost without a report, and nothing is reported twice.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::*;
use kvm_ops_core::guest::{Action, FnProgram, Outcome};
use kvm_ops_core::*;
use kvm_ops_sev::SevVm;
use kvm_ops_sim::SimHost;

/// A host whose VMs refuse to release their ASID as often as the counter says.
#[derive(Clone)]
struct Stubborn(SimHost, Arc<AtomicU32>);
struct StubbornVm(<SimHost as Host>::Vm, Arc<AtomicU32>);

impl Host for Stubborn {
    type Vm = StubbornVm;
    type Seam = <SimHost as Host>::Seam;
    type Psp = <SimHost as Host>::Psp;
    type Pages = <SimHost as Host>::Pages;

    fn name(&self) -> &'static str {
        "stubborn"
    }
    fn vendor(&self) -> Vendor {
        self.0.vendor()
    }
    fn next_vm_id(&self) -> VmId {
        self.0.next_vm_id()
    }
    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<StubbornVm> {
        Ok(StubbornVm(
            self.0.create_vm(tech, params)?,
            Arc::clone(&self.1),
        ))
    }
    fn psp(&self) -> Option<&Self::Psp> {
        self.0.psp()
    }
    fn pages(&self) -> Option<&Self::Pages> {
        self.0.pages()
    }
}

impl VmPort for StubbornVm {
    type Vcpu = <<SimHost as Host>::Vm as VmPort>::Vcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu> {
        self.0.create_vcpu(id)
    }
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.0.set_memory_slot(slot)
    }
    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.0.delete_memory_slot(slot)
    }
    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.0.dirty_log(slot, bitmap)
    }
    fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        self.0.set_tss_addr(gpa)
    }
    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        self.0.set_identity_map_addr(gpa)
    }
    fn has_emulated_msr(&self, index: u32) -> bool {
        self.0.has_emulated_msr(index)
    }
    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.0.deliver_interrupt(vcpu, vector)
    }
    fn sev(&self) -> Option<&dyn SevPort> {
        Some(self)
    }
    fn close(self) -> Result<()> {
        self.0.close()
    }
}

impl SharedMemory for StubbornVm {
    fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()> {
        self.0.set_shared(first, pages, shared)
    }
    fn read_slot(&self, gpa: Gpa, data: &mut [u8]) -> Result<()> {
        self.0.read_slot(gpa, data)
    }
    fn write_slot(&self, gpa: Gpa, data: &[u8]) -> Result<()> {
        self.0.write_slot(gpa, data)
    }
}

impl SevPort for StubbornVm {
    fn bind_asid(&self, asid: Option<Asid>, mask: SharedMask) -> Result<()> {
        let (order, refuse) = (Ordering::SeqCst, |left: u32| left.checked_sub(1));
        if asid.is_none() && self.1.fetch_update(order, order, refuse).is_ok() {
            return Err(Error::Busy);
        }
        self.0.bind_asid(asid, mask)
    }
    fn map_encrypted(&self, gfn: Gfn, level: Level, page: Option<&Page>) -> Result<()> {
        self.0.map_encrypted(gfn, level, page)
    }
    fn handle_nested_faults(&self, handler: Option<Arc<dyn NestedFaults>>) -> Result<()> {
        self.0.handle_nested_faults(handler)
    }
}

/// An owner with three measured pages and its mirror, on a host that refuses on demand.
fn pair(ram: &Ram) -> (Stubborn, SevVm<Stubborn>, SevVm<Stubborn>) {
    let host = Stubborn(host(1), Arc::default());
    let new = || {
        let id = host.next_vm_id();
        let mut vm = SevVm::create(&host, id, Tech::Sev, &VmParams::new(1)).unwrap();
        vm.vm_init().unwrap();
        vm
    };
    let (mut owner, mut mirror) = (new(), new());
    owner.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    for i in 0..3 {
        owner
            .add_initial_page(&measured(RAM + i * PAGE, &page(9)))
            .unwrap();
    }
    owner.vm_finalize().unwrap();
    SevVm::copy_context(&mut owner, &mut mirror).unwrap();
    (host, owner, mirror)
}

/// The whole teardown, each step as often as it takes.
fn destroy(mut vm: SevVm<Stubborn>) -> FreeReport {
    let key = loop {
        match vm.mmu_release_hkid() {
            Ok(key) => break key,
            Err(error) => assert_eq!(error, Error::Busy),
        }
    };
    let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
    vm.vm_free(drained)
}

fn freed(report: &FreeReport) -> (u64, u32) {
    assert_eq!(report.leaks, []);
    (report.pages_freed, report.keys_freed)
}

/// Everything that the owner and its mirror free: three pages, a page of answers for the
/// measurement, and its key.
const ALL: (u64, u32) = (4, 1);

#[test]
fn a_mirror_whose_port_was_busy_once_lets_its_owner_go() {
    let ram = Ram::new(0x4000);
    let (host, owner, mirror) = pair(&ram);
    host.1.store(1, Ordering::SeqCst);
    assert_eq!(freed(&destroy(mirror)), (0, 0));
    assert_eq!(freed(&destroy(owner)), ALL);
    nothing_left(&host.0);
}

#[test]
fn an_owner_whose_port_was_busy_once_keeps_its_guest_until_it_goes() {
    let ram = Ram::new(0x4000);
    let (host, owner, mirror) = pair(&ram);
    host.1.store(1, Ordering::SeqCst);
    assert_eq!(
        freed(&destroy(owner)),
        (1, 0),
        "what it freed at its launch"
    );
    assert_eq!(freed(&destroy(mirror)), (3, 1));
    nothing_left(&host.0);

    // The mirror goes between the owner's two tries: the owner frees it all.
    let (host, mut owner, mirror) = pair(&ram);
    host.1.store(1, Ordering::SeqCst);
    assert_eq!(owner.mmu_release_hkid().err(), Some(Error::Busy));
    assert_eq!(freed(&destroy(mirror)), (0, 0));
    assert_eq!(freed(&destroy(owner)), ALL);
    nothing_left(&host.0);
}

#[test]
fn a_mirror_that_is_dropped_without_its_teardown_lets_its_owner_go() {
    let ram = Ram::new(0x4000);
    for busy in [0, 1] {
        let (host, owner, mirror) = pair(&ram);
        host.1.store(busy, Ordering::SeqCst);
        drop(mirror);
        let report = destroy(owner);
        if busy == 0 {
            assert_eq!(freed(&report), ALL);
            nothing_left(&host.0);
        } else {
            // The mirror's processors may hold the key: nothing is used again, all of it is listed.
            assert_eq!((report.pages_freed, report.keys_freed), (1, 0));
            assert_eq!(report.leaks.len(), 3 + 2, "{:?}", report.leaks);
        }
    }
}

#[test]
fn an_owner_that_is_dropped_leaves_its_guest_to_the_last_mirror() {
    let ram = Ram::new(0x4000);
    let (host, owner, mirror) = pair(&ram);
    drop(owner);
    assert_eq!(freed(&destroy(mirror)), (3, 1));
    nothing_left(&host.0);
}

#[test]
fn the_context_of_a_mirror_that_was_given_up_is_listed_as_leaked_by_whoever_goes_last() {
    let ram = Ram::new(0x4000);
    for owner_first in [false, true] {
        let (host, owner, mirror) = pair(&ram);
        let reports = if owner_first {
            let first = destroy(owner);
            [first, mirror.vm_abandon(Error::Again)]
        } else {
            let first = mirror.vm_abandon(Error::Again);
            [first, destroy(owner)]
        };
        let leaks: Vec<_> = reports.iter().flat_map(|r| &r.leaks).collect();
        let count = |wanted: fn(&Leaked) -> bool| leaks.iter().filter(|l| wanted(&l.what)).count();
        assert_eq!(count(|what| matches!(what, Leaked::Page(_))), 3);
        assert_eq!(count(|what| matches!(what, Leaked::Key(_))), 1);
        assert_eq!(host.0.pages().unwrap().frames_out(), 3);
        assert_eq!(host.0.psp().unwrap().asid_pools().leaked(), 1);
    }
}

#[test]
fn a_mirror_has_no_mapping_of_a_large_page_that_its_owner_gave_up() {
    let (host, ram) = (host(2), Ram::new(4 << 20));
    let pages = host.pages().unwrap();
    for split in [false, true] {
        let mut owner = with_ram(&host, Tech::Sev, 1, &ram);
        owner.vm_finalize().unwrap();
        let mut mirror = with_ram(&host, Tech::Sev, 1, &ram);
        SevVm::copy_context(&mut owner, &mut mirror).unwrap();
        let mut vcpu = mirror.create_vcpu(VcpuId(0)).unwrap();
        let (gfn, level) = (Gfn::new(RAM >> 12), Level::Size2M);
        let large = pages.alloc(level).unwrap();
        // SAFETY: the test owns the page, and names what is there.
        let change = |old, new| unsafe { SpteChange::new(gfn, level, old, new) };
        let (absent, mapped) = (PrivateSpte::Absent, PrivateSpte::Mapped(large.pfn()));
        owner.set_private_spte(&change(absent, mapped)).unwrap();
        let gpa = Gpa::new(C | (RAM + PAGE));
        let touch = move |_: Outcome<'_>| Action::Write { gpa, data: b"mine" };
        let mut touches = 0;
        let program = move |last: Outcome<'_>| {
            touches += 1;
            match touches {
                1 | 3 => touch(last),
                2 => Action::Out {
                    port: 0x80,
                    data: b"x",
                },
                _ => Action::Shutdown,
            }
        };
        common::load(&mut vcpu, FnProgram(program));
        assert!(matches!(vcpu.vcpu_run(), Ok(Exit::IoOut { .. })));
        if split {
            let table = PrivateSpte::Table(large.pfn());
            owner.set_private_spte(&change(mapped, table)).unwrap();
            let shared = Privacy::Shared;
            assert_eq!(owner.set_memory_attributes(gfn, 512, shared), Ok(512));
        } else {
            owner.set_private_spte(&change(mapped, absent)).unwrap();
        }
        let touched_again = vcpu.vcpu_run();
        if split {
            let fault = matches!(touched_again, Ok(Exit::MemoryFault { .. }));
            assert!(fault, "{touched_again:?}");
        } else {
            // The memory is still there: another page stands for it.
            assert!(matches!(touched_again, Ok(Exit::Shutdown)));
            let page = owner.page_of(Gfn::new(gfn.get() + 1)).unwrap();
            assert_ne!(page, Pfn::new(large.pfn().get() + 1));
        }
        drop(vcpu);
        free_clean(mirror);
        free_clean(owner);
        if !split {
            pages.free(large).unwrap();
        }
        assert_eq!(pages.frames_out(), 0);
    }
}
