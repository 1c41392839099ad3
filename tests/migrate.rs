//! Moves and mirrors guests of every technology through the owner that embedders hold, and through the
//! enum of all technologies.
#![cfg(all(feature = "sim", feature = "intel", feature = "amd"))]

use std::sync::{Arc, Mutex};
use std::thread;

use kvm_ops::guest::Script;
use kvm_ops::moves::{MoveToken, StagingTable};
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AnyVm, EncParams, Error, Exit, Gpa, Host, InitialPage, InitialPageKind, Kind, MemSlot, PspPort,
    Result, SevParams, SlotId, Step, Tech, VcpuId, VcpuOps, Vendor, Vm, VmConfig, create,
};
use vm_memory::MmapRegion;

type Any = Vm<AnyVm<SimHost>>;

const EINVAL: i32 = 22;

fn vm(host: &SimHost, tech: Tech) -> Any {
    create(host, &VmConfig::new(Kind::Of(tech))).unwrap()
}

fn slot(memory: &MmapRegion<()>) -> MemSlot {
    let (at, len) = (memory.as_ptr() as u64, memory.size() as u64);
    // SAFETY: the tests drop their VMs before the memory, and hold no reference to it.
    let host = unsafe { kvm_ops::HostRange::new(at, len).unwrap() };
    MemSlot::new(SlotId(0), Gpa::new(0), host)
}

fn launched(host: &SimHost, tech: Tech, memory: &MmapRegion<()>) -> Any {
    let mut vm = vm(host, tech);
    vm.set_memory_slot(slot(memory)).unwrap();
    let page = InitialPage {
        gpa: Gpa::new(0),
        contents: &[3; 4096],
        kind: InitialPageKind::Measured,
    };
    vm.add_initial_page(&page).unwrap();
    vm.finalize().unwrap();
    vm
}

fn errno(result: kvm_ops::Result<()>) -> i32 {
    result.unwrap_err().errno()
}

#[test]
fn m05_m16_a_vm_without_a_context_gives_none() {
    let (amd, intel) = (SimHost::new(Vendor::Amd), SimHost::new(Vendor::Intel));
    for (host, normal) in [(&amd, Tech::Svm), (&intel, Tech::Vmx)] {
        let mut normal = vm(host, normal);
        let mut other = vm(&amd, Tech::Sev);
        assert_eq!(errno(normal.move_to(&mut other)), EINVAL);
        assert_eq!(errno(normal.copy_to(&mut other)), EINVAL);
        assert_eq!(errno(other.move_to(&mut normal)), EINVAL);
        assert!(normal.destroy().is_clean() && other.destroy().is_clean());
    }
}

#[test]
fn a_context_takes_its_slots_along_where_none_are() {
    let (host, memory) = (SimHost::new(Vendor::Amd), MmapRegion::new(1 << 20).unwrap());
    let mut source = launched(&host, Tech::Sev, &memory);
    let slots: Vec<_> = source.slots().collect();
    let mut target = vm(&host, Tech::Sev);
    source.move_to(&mut target).unwrap();
    assert!(target.slots().eq(slots));
    assert_eq!(
        (source.step(), target.step()),
        (Step::Poisoned, Step::Runnable)
    );
    assert_eq!(errno(target.move_to(&mut source)), 5);
    assert_eq!(target.step(), Step::Runnable);
    assert!(source.destroy().is_clean() && target.destroy().is_clean());
}

#[test]
fn a_vm_that_awaits_a_guest_takes_no_asid_and_launches_nothing() {
    let arrives = SevParams {
        arrives: true,
        ..SevParams::default()
    };
    for tech in [Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        let (host, memory) = (SimHost::new(Vendor::Amd), MmapRegion::new(1 << 20).unwrap());
        let in_use = || host.psp().unwrap().asid_pools().in_use();
        let mut source = launched(&host, tech, &memory);
        let config = VmConfig::new(Kind::Of(tech)).enc(EncParams::Sev(Box::new(arrives.clone())));
        let mut target = create(&host, &config).unwrap();
        assert_eq!(in_use(), 1, "{tech}");
        assert_eq!(target.finalize(), Err(Error::WrongState(Step::Initialized)));
        source.move_to(&mut target).unwrap();
        assert_eq!((target.step(), in_use()), (Step::Runnable, 1));
        assert!(source.destroy().is_clean() && target.destroy().is_clean());
        let unused = create(&host, &config).unwrap();
        assert!(unused.destroy().is_clean());
        assert_eq!(in_use(), 0);
    }
}

/// The technologies whose guests move with all their registers.
const PROTECTED: [Tech; 3] = [Tech::Tdx, Tech::SevEs, Tech::SevSnp];

fn send(vm: &mut Any, table: &Arc<StagingTable>) -> Result<MoveToken> {
    let mut token = None;
    let mut random = |out: &mut [u8]| {
        out.fill(table.len() as u8 + 1);
        Ok(())
    };
    vm.local_send(table, &mut random, &mut |made| {
        token = Some(*made);
        Ok(())
    })?;
    Ok(token.unwrap())
}

#[test]
fn an_encrypted_guest_runs_on_where_it_went_with_its_slots() {
    for (tech, staged) in PROTECTED.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let vendor = if tech == Tech::Tdx {
            Vendor::Intel
        } else {
            Vendor::Amd
        };
        let (host, memory) = (SimHost::new(vendor), MmapRegion::new(1 << 20).unwrap());
        let mut source = vm(&host, tech);
        source.set_memory_slot(slot(&memory)).unwrap();
        let mut old = source.create_vcpu(VcpuId(0)).unwrap();
        source.finalize().unwrap();
        let script = Script::new().output(0x80, &[1]).output(0x81, &[2]);
        old.programs()
            .unwrap()
            .load_program(Box::new(script))
            .unwrap();
        assert!(matches!(old.vcpu_run(), Ok(Exit::IoOut { port: 0x80, .. })));

        let mut target = vm(&host, tech);
        // The vCPUs of a TD come with it; those of SEV-ES and SNP guests are there.
        let there = (tech != Tech::Tdx).then(|| target.create_vcpu(VcpuId(0)).unwrap());
        if staged {
            let table = Arc::new(StagingTable::new());
            let token = send(&mut source, &table).unwrap();
            target.set_memory_slot(slot(&memory)).unwrap();
            target
                .local_receive(&table, &token, &mut |_| Ok(()))
                .unwrap();
            assert!(table.is_empty());
        } else {
            source.move_to(&mut target).unwrap();
        }
        assert_eq!(target.slots().count(), 1);
        let vcpu = there.map_or_else(|| target.create_vcpu(VcpuId(0)), Ok);
        let mut vcpu = vcpu.unwrap();
        assert_eq!(old.vcpu_run(), Err(Error::Poisoned));
        assert!(matches!(
            vcpu.vcpu_run(),
            Ok(Exit::IoOut { port: 0x81, .. })
        ));
        drop((old, vcpu));
        assert!(source.destroy().is_clean() && target.destroy().is_clean());
        assert_eq!(host.live_vms(), 0);
    }
}

#[test]
fn a_token_names_a_guest_of_one_technology() {
    let (host, memory) = (SimHost::new(Vendor::Amd), MmapRegion::new(1 << 20).unwrap());
    let table = Arc::new(StagingTable::new());
    let mut source = launched(&host, Tech::Sev, &memory);
    let token = send(&mut source, &table).unwrap();
    let mut normal = vm(&host, Tech::Svm);
    let refused = normal.local_receive(&table, &token, &mut |_| Ok(()));
    assert!(matches!(refused, Err(Error::NotOffered(_))), "{refused:?}");
    assert!(matches!(
        send(&mut normal, &table),
        Err(Error::NotOffered(_))
    ));
    let mut snp = vm(&host, Tech::SevSnp);
    let refused = snp.local_receive(&table, &token, &mut |_| Ok(()));
    assert_eq!(refused.unwrap_err().errno(), EINVAL);
    // A TD of another machine, which shares the table: another type finds no VM of its own.
    let intel = SimHost::new(Vendor::Intel);
    let mut td = vm(&intel, Tech::Tdx);
    let refused = td.local_receive(&table, &token, &mut |_| Ok(()));
    assert_eq!(refused.unwrap_err().errno(), EINVAL);
    assert_eq!(table.len(), 1);
    source.local_cancel().unwrap();
    assert!(table.is_empty());
    for vm in [source, normal, snp, td] {
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn a_refused_context_is_back_with_its_source_and_no_slot_stays_behind() {
    let (host, memory) = (SimHost::new(Vendor::Amd), MmapRegion::new(1 << 20).unwrap());
    let mut source = launched(&host, Tech::Sev, &memory);
    let abroad = SimHost::new(Vendor::Amd);
    let mut target = vm(&abroad, Tech::Sev);
    assert_eq!(errno(source.move_to(&mut target)), EINVAL);
    assert_eq!((source.step(), target.slots().count()), (Step::Runnable, 0));
    assert!(source.destroy().is_clean() && target.destroy().is_clean());
}

/// Moves a context between VMs that threads share. No thread waits for a VM while it holds another,
/// so moves in opposite directions cannot deadlock. (A VM cannot move to itself: `&mut` excludes
/// it.)
fn move_between(source: &Mutex<Any>, destination: &Mutex<Any>) -> kvm_ops::Result<()> {
    let mut to = destination.try_lock().map_err(|_| Error::Busy)?;
    let mut from = source.try_lock().map_err(|_| Error::Busy)?;
    from.move_to(&mut to)
}

#[test]
fn threads_that_cross_end_without_a_deadlock() {
    let (host, memory) = (SimHost::new(Vendor::Amd), MmapRegion::new(1 << 20).unwrap());
    let vms = [
        Mutex::new(launched(&host, Tech::Sev, &memory)),
        Mutex::new(vm(&host, Tech::Sev)),
        Mutex::new(vm(&host, Tech::Sev)),
    ];
    let moved: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..3usize)
            .map(|n| {
                let vms = &vms;
                scope.spawn(move || {
                    let pass = |i: usize| move_between(&vms[i % 3], &vms[n]);
                    (0..3_000).filter(|i| pass(*i).is_ok()).count()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    // The scheduler decides the order: every attempt may have found a VM in use.
    assert!(moved <= 2, "{moved}");
    if moved == 0 {
        assert_eq!(move_between(&vms[0], &vms[1]), Ok(()));
    }
    for vm in vms {
        assert!(vm.into_inner().unwrap().destroy().is_clean());
    }
}
