//! An SNP guest, and encrypted registers, move within a host: what goes along.

#[path = "common/mod.rs"]
mod common;

use std::sync::Arc;

use common::*;
use kvm_ops_core::guest::{Action, Script};
use kvm_ops_core::moves::{MoveToken, StagingTable};
use kvm_ops_core::{
    Answer, Backend, Error, Exit, Field, Gfn, Gpa, Host, Level, Privacy, Result, Step, Tech,
    VcpuId, VcpuOps, VmOps, VmParams,
};
use kvm_ops_sev::{SevVcpu, SevVm};
use kvm_ops_sim::SimHost;

type Sev = SevVm<SimHost>;

const PROTECTED: [Tech; 2] = [Tech::SevEs, Tech::SevSnp];

/// A guest that keeps one value in private memory, one in shared memory, and one in its registers.
fn keeper(tech: Tech) -> Vec<Action<'static>> {
    let private = Gpa::new(C | (RAM + 0x3008));
    let open = Gpa::new(RAM + 0x8010);
    let write = |gpa, data| Action::Write { gpa, data };
    let accept = Action::Accept {
        gpa: Gpa::new(RAM + 0x3000),
        level: Level::Size4K,
    };
    let share = Action::Share {
        gpa: Gpa::new(RAM + 0x8000),
        pages: 1,
    };
    let mut actions = vec![
        write(private, b"private".as_slice()),
        share,
        write(open, b"open".as_slice()),
        Action::Out {
            port: 0x80,
            data: &[1],
        },
        Action::Read {
            gpa: private,
            len: 7,
        },
        Action::Read { gpa: open, len: 4 },
        Action::Hypercall {
            nr: 7,
            args: [1, 2, 3, 4],
        },
    ];
    if tech == Tech::SevSnp {
        actions.insert(0, accept);
    }
    actions
}

const KEPT: [&str; 7] = [
    "Done",
    "Done",
    "Done",
    "Done",
    "Data([112, 114, 105, 118, 97, 116, 101])",
    "Data([111, 112, 101, 110])",
    "Value(99)",
];

/// Runs up to an exit that is no conversion; conversions are done as asked.
fn granting<H: Host>(vm: &SevVm<H>, vcpu: &mut SevVcpu<H>) -> Result<Exit> {
    loop {
        match vcpu.vcpu_run()? {
            Exit::MapGpaRange { gpa, pages, to } => {
                let done = vm.set_memory_attributes(Gfn::containing(gpa), pages, to)?;
                assert_eq!(done, pages);
                vcpu.answer(Answer::Value(0))?;
            }
            other => return Ok(other),
        }
    }
}

fn expect_log(log: &std::sync::Mutex<Vec<String>>, tech: Tech) {
    let log = log.lock().unwrap();
    let accepted = usize::from(tech == Tech::SevSnp);
    assert_eq!(log[accepted..], KEPT);
}

fn send<H: Host>(vm: &mut SevVm<H>, table: &Arc<StagingTable>) -> Result<MoveToken> {
    let (mut token, mut n) = (None, table.len() as u8);
    let mut random = |out: &mut [u8]| {
        n += 1;
        out.fill(n);
        Ok(())
    };
    vm.local_send(table, &mut random, &mut |made| {
        token = Some(*made);
        Ok(())
    })?;
    Ok(token.unwrap())
}

/// A runnable VM with its memory, and the vCPU that it was measured with.
fn launched<H: Host>(host: &H, tech: Tech, ram: &Ram) -> (SevVm<H>, SevVcpu<H>) {
    let (mut vm, vcpu) = waiting(host, tech, ram);
    vm.add_initial_page(&measured(RAM, &page(0x5a))).unwrap();
    vm.vm_finalize().unwrap();
    (vm, vcpu)
}

/// A VM that can take a guest, with its vCPU.
fn waiting<H: Host>(host: &H, tech: Tech, ram: &Ram) -> (SevVm<H>, SevVcpu<H>) {
    let params = VmParams::new(1);
    let mut vm = SevVm::create(host, host.next_vm_id(), tech, &params).unwrap();
    vm.vm_init().unwrap();
    vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    (vm, vcpu)
}

#[test]
fn the_guest_runs_on_with_its_memory_and_registers_wherever_it_goes() {
    for (tech, staged) in PROTECTED.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        let (host, ram) = (host(1), Ram::new(1 << 20));
        let (mut vm, mut vcpu) = launched(&host, tech, &ram);
        let (probe, log) = Probe::new(keeper(tech));
        load(&mut vcpu, probe);
        assert!(matches!(granting(&vm, &mut vcpu), Ok(Exit::IoOut { .. })));
        let facts = (
            vm.context_facts(),
            vm.measurement(),
            vm.identity(),
            vm.asid(),
        );
        let rmp = sp(&host).snapshot().rmp;
        let mut gone = Vec::new();
        for _ in 0..2 {
            let (mut to, next) = waiting(&host, tech, &ram);
            if staged {
                let table = Arc::default();
                let token = send(&mut vm, &table).unwrap();
                to.local_receive(&table, &token, &mut |_| Ok(())).unwrap();
            } else {
                Sev::move_context(&mut vm, &mut to).unwrap();
            }
            assert_eq!(vcpu.vcpu_run(), Err(Error::Poisoned));
            assert_eq!((vm.step(), to.step()), (Step::Poisoned, Step::Runnable));
            let moved = (
                to.context_facts(),
                to.measurement(),
                to.identity(),
                to.asid(),
            );
            assert_eq!(moved, facts);
            assert_eq!(sp(&host).snapshot().rmp, rmp, "each page is whose it was");
            let frame = Gfn::new((RAM + 0x8000) >> 12);
            assert_eq!(to.privacy(frame), Privacy::Shared);
            vcpu = next;
            gone.push(std::mem::replace(&mut vm, to));
        }
        let call = Exit::Hypercall {
            nr: 7,
            args: [1, 2, 3, 4, 0, 0],
        };
        assert_eq!(granting(&vm, &mut vcpu), Ok(call));
        vcpu.answer(Answer::Value(99)).unwrap();
        assert_eq!(granting(&vm, &mut vcpu), Ok(Exit::Shutdown));
        expect_log(&log, tech);
        assert_eq!(ram.read(0x8010, 4), b"open");
        // Pages that the guest gives up and takes are the new VM's.
        for to in [Privacy::Private, Privacy::Shared] {
            assert_eq!(
                vm.set_memory_attributes(Gfn::new((RAM >> 12) + 3), 6, to),
                Ok(6)
            );
        }
        drop(vcpu);
        gone.insert(if staged { 0 } else { 2 }, vm);
        gone.into_iter().for_each(free_clean);
        nothing_left(&host);
    }
}

#[test]
fn an_exit_that_waits_for_its_answer_keeps_the_guest_where_it_is() {
    for tech in PROTECTED {
        let (host, ram) = (host(2), Ram::new(1 << 20));
        let (mut vm, mut vcpu) = launched(&host, tech, &ram);
        let script = Script::new().input(0x70, 1).output(0x80, &[2]).halt();
        load(&mut vcpu, script);
        let (mut to, mut next) = waiting(&host, tech, &ram);
        assert!(matches!(vcpu.vcpu_run(), Ok(Exit::IoIn { .. })));
        vcpu.exit_data()[0] = 42;
        let own = (vm.asid(), to.asid());
        assert_eq!(Sev::move_context(&mut vm, &mut to), Err(Error::Busy));
        assert_eq!((vm.asid(), to.asid()), own);
        // The kick of the stop is answered by a run, which takes the answer; the guest stays out.
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
        Sev::move_context(&mut vm, &mut to).unwrap();
        assert!(matches!(next.vcpu_run(), Ok(Exit::IoOut { .. })));
        drop((vcpu, next));
        [vm, to].into_iter().for_each(free_clean);
        nothing_left(&host);
    }
}

#[test]
fn interrupts_that_wait_go_with_the_guest() {
    for tech in PROTECTED {
        let (host, ram) = (host(3), Ram::new(1 << 20));
        let (mut vm, mut vcpu) = launched(&host, tech, &ram);
        let (probe, log) = Probe::new(vec![Action::Halt]);
        load(&mut vcpu, probe);
        vcpu.inject_irq(0x41).unwrap();
        let (mut to, mut next) = waiting(&host, tech, &ram);
        Sev::move_context(&mut vm, &mut to).unwrap();
        assert_eq!(next.vcpu_run(), Ok(Exit::Shutdown));
        assert_eq!(*log.lock().unwrap(), ["Interrupt(65)"]);
        drop((vcpu, next));
        [vm, to].into_iter().for_each(free_clean);
        nothing_left(&host);
    }
}

#[test]
fn an_snp_guest_moves_once_it_is_finished() {
    let (host, ram) = (host(4), Ram::new(1 << 20));
    let new = || {
        let mut vm = create(&host, Tech::SevSnp, 1);
        vm.vm_init().unwrap();
        vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
        vm
    };
    let (mut vm, mut to) = (new(), new());
    vm.add_initial_page(&measured(RAM, &page(1))).unwrap();
    let early = Err(Error::Invalid(Field::Vm, vm.id().0));
    assert_eq!(Sev::move_context(&mut vm, &mut to), early);
    vm.vm_finalize().unwrap();
    assert_eq!(Sev::move_context(&mut vm, &mut to), Ok(()));
    [vm, to].into_iter().for_each(free_clean);
    nothing_left(&host);
}
