//! Safe calls in unusual orders. Each of these once freed the memory of a running guest, put one
//! page under two owners, or returned a key in use. Misuse that no longer compiles is shown by a
//! `compile_fail` example in the documentation: `Vm::back_end`, `Page`, `SpteChange`, the tokens,
//! `Machine::vm`.
#![cfg(all(feature = "sim", feature = "intel", feature = "amd"))]

use kvm_ops::guest::Script;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AnyVm, Error, Field, Gfn, Gpa, Host, HostRange, InitialPage, InitialPageKind, Kind, MemSlot,
    PagePort, Privacy, SeamPort, SlotId, Step, Tech, VcpuId, VcpuOps, Vm, VmConfig, VmOps, create,
};
use vm_memory::MmapRegion;

type Any = Vm<AnyVm<SimHost>>;

fn host(tech: Tech) -> SimHost {
    SimHost::new(tech.vendor().expect("a technology of this project"))
}

fn slot(memory: &MmapRegion<()>) -> MemSlot {
    let (at, len) = (memory.as_ptr() as u64, memory.size() as u64);
    // SAFETY: the tests free the VM before the memory, and hold no reference to it.
    let range = unsafe { HostRange::new(at, len) }.expect("whole pages");
    MemSlot::new(SlotId(0), Gpa::new(0), range)
}

/// A VM with 1 MiB of memory and, if confidential, one measured page.
fn vm(host: &SimHost, tech: Tech, memory: &MmapRegion<()>) -> Any {
    let mut vm = create(host, &VmConfig::new(Kind::Of(tech))).expect("a VM");
    vm.set_memory_slot(slot(memory)).expect("a slot");
    if tech.is_confidential() {
        let page = InitialPage {
            gpa: Gpa::new(0),
            contents: &[3; 4096],
            kind: InitialPageKind::Measured,
        };
        vm.add_initial_page(&page).expect("a page");
    }
    vm
}

fn load(vcpu: &mut impl VcpuOps, program: Script) {
    let programs = vcpu.programs().expect("a software host");
    programs.load_program(Box::new(program)).expect("a program");
}

#[test]
fn a_vcpu_that_outlives_its_vm_never_touches_the_memory() {
    for tech in Tech::ALL {
        let host = host(tech);
        let memory = MmapRegion::new(1 << 20).unwrap();
        let mut vm = vm(&host, tech, &memory);
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        vm.finalize().unwrap();
        load(&mut vcpu, Script::new().write(Gpa::new(0x1000), b"late"));
        let report = vm.destroy();
        assert!(report.is_clean(), "{tech}: {report:?}");
        // The contract of the range has ended, so the memory may be dropped.
        drop(memory);
        let ran = vcpu.vcpu_run();
        assert!(
            matches!(
                ran,
                Err(Error::WrongState(Step::KeyReleased | Step::Drained))
            ),
            "{tech}: {ran:?}"
        );
        drop(vcpu);
        assert_eq!(host.live_vms(), 0, "{tech}");
    }
}

#[test]
fn a_token_of_another_hosts_vm_of_the_same_number_proves_nothing() {
    let memory = MmapRegion::new(1 << 20).unwrap();
    for (tech, other) in [(Tech::Tdx, Tech::Vmx), (Tech::SevSnp, Tech::Svm)] {
        let (mine, theirs) = (host(tech), host(other));
        let mut td = vm(&mine, tech, &memory).into_back_end();
        let mut normal = vm(&theirs, other, &memory).into_back_end();
        assert_eq!(td.id(), normal.id(), "each host counts from 1");
        let token = normal.mmu_release_hkid().unwrap();
        let (error, token) = td.drain_private(token).unwrap_err();
        assert_eq!(error, Error::Invalid(Field::Token, normal.id().0), "{tech}");
        let drained = normal.drain_private(token).map_err(|(e, _)| e).unwrap();
        // The whole VM is leaked, and the report shows that.
        let report = td.vm_free(drained);
        assert!(!report.is_clean(), "{tech}: {report:?}");
    }
}

#[test]
fn a_slot_of_another_vm_deletes_nothing() {
    for tech in Tech::ALL {
        let host = host(tech);
        let (mine, other) = (
            MmapRegion::new(1 << 20).unwrap(),
            MmapRegion::new(1 << 20).unwrap(),
        );
        let vm = vm(&host, tech, &mine);
        let deleted = vm.back_end().delete_memory_slot(&slot(&other));
        assert_eq!(deleted, Err(Error::NotFound(Field::Slot, 0)), "{tech}");
        assert!(vm.destroy().is_clean(), "{tech}");
    }
}

#[test]
fn a_page_and_a_key_have_one_owner() {
    let (a, b) = (host(Tech::Tdx), host(Tech::Tdx));
    // A page from another machine's pool is not accepted.
    let page = a
        .pages()
        .unwrap()
        .alloc(kvm_ops::Level::Size4K)
        .expect("a page");
    let page = b.pages().unwrap().free(page).expect_err("not its page");
    a.pages().unwrap().free(page).expect("its page");
    assert_eq!(a.pages().unwrap().frames_out(), 0);
    let (pool, other) = (a.seam().unwrap().key_ids(), b.seam().unwrap().key_ids());
    let key = pool.lease().unwrap();
    let key = other.give_back(key).expect_err("not its key");
    pool.give_back(key).expect("its key");
    assert_eq!((pool.in_use(), other.in_use()), (0, 0));
}

/// The resident size of this process, in MiB.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4 / 1024
}

#[test]
fn conversions_outside_of_memory_are_refused_and_cost_nothing() {
    for tech in Tech::ALL.into_iter().filter(|tech| tech.is_confidential()) {
        let host = host(tech);
        let memory = MmapRegion::new(1 << 20).unwrap();
        let mut vm = vm(&host, tech, &memory);
        let _vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        vm.finalize().unwrap();
        let before = resident();
        for n in 0..50_000_u64 {
            let gfn = Gfn::new(0x1000 + 2 * n);
            let to = [Privacy::Shared, Privacy::Private][n as usize % 2];
            let converted = vm.set_memory_attributes(gfn, 1, to);
            assert!(converted.is_err(), "{tech}: {converted:?}");
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < 8, "{tech}: {grown} MiB for frames without memory");
        assert!(vm.destroy().is_clean(), "{tech}");
    }
}
