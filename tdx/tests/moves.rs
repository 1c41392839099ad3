//! A TD moves between two VMs of its host, as a call and by token: its guest runs on, and each page and
//! key has one owner.

mod run_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use kvm_ops_core::guest::Script;
use kvm_ops_core::moves::{GuestName, MoveToken, StagingTable};
use kvm_ops_core::{
    Answer, Backend, EncParams, Error, Exit, Field, Gfn, Gpa, Gpaw, Host, Irqchip, Level, Privacy,
    Result, SeamPort, Step, TdParams, VcpuId, VcpuOps, Vendor, VmOps, VmParams, VmPort,
};
use kvm_ops_sim::SimHost;
use kvm_ops_tdx::TdxVm;
use run_support::{Load, MIB, Made, Ram, SHARED, Td, convert, destroy, transcript};

type Vm = TdxVm<SimHost>;

/// The parameters of the tests' VMs.
fn params(vcpus: u32, td: TdParams) -> VmParams {
    VmParams {
        enc: EncParams::Td(Box::new(td)),
        ..VmParams::new(vcpus)
    }
}

/// A VM that the module knows nothing of.
fn created(host: &SimHost, vcpus: u32) -> Vm {
    let params = params(vcpus, TdParams::default());
    TdxVm::create(host, host.next_vm_id(), &params).unwrap()
}

/// A VM with a TD that is not used, and the slot of the guest.
fn waiting(host: &SimHost, vcpus: u32, ram: &Ram) -> Vm {
    let mut vm = created(host, vcpus);
    vm.vm_init().unwrap();
    vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
    vm
}

fn errno<T>(result: Result<T>) -> i32 {
    result.map_or_else(|error| error.errno(), |_| 0)
}

const EINVAL: i32 = 22;
const EIO: i32 = 5;
const EBUSY: i32 = 16;

/// All parts of a TD back; the slots' memory goes last.
fn end(vms: impl IntoIterator<Item = Vm>, host: &SimHost) {
    for vm in vms {
        let report = destroy(vm);
        assert!(report.is_clean(), "{report:?}");
    }
    assert_eq!(host.pages().unwrap().frames_out(), 0);
    assert_eq!(host.seam().unwrap().key_ids().in_use(), 0);
    assert_eq!(host.live_vms(), 0);
}

/// Runs up to an exit that is no conversion; conversions are done as asked.
fn granting(vm: &Vm, vcpu: &mut run_support::Vcpu) -> Result<Exit> {
    loop {
        match vcpu.vcpu_run()? {
            Exit::MapGpaRange { gpa, pages, to } => {
                convert(vm, gpa, pages, to);
                vcpu.answer(Answer::Value(0))?;
            }
            other => return Ok(other),
        }
    }
}

fn random() -> impl FnMut(&mut [u8]) -> Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    |out| {
        let number = NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes();
        out.iter_mut()
            .zip(number.iter().cycle())
            .for_each(|(to, from)| *to = *from);
        Ok(())
    }
}

fn send(vm: &mut Vm, table: &Arc<StagingTable>) -> Result<MoveToken> {
    let mut token = None;
    vm.local_send(table, &mut random(), &mut |made| {
        token = Some(*made);
        Ok(())
    })?;
    Ok(token.unwrap())
}

fn receive(vm: &mut Vm, table: &StagingTable, token: &MoveToken) -> Result<GuestName> {
    vm.local_receive(table, token, &mut |_| Ok(()))
}

/// A guest that keeps one value in private memory, one in shared memory, and one in its registers.
fn keeper() -> Script {
    let (private, open) = (Gpa::new(0x3000), Gpa::new(SHARED | 0x8010));
    Script::new()
        .accept(private, Level::Size4K)
        .write(private, b"private")
        .share(Gpa::new(0x8000), 1)
        .write(open, b"open")
        .output(0x80, &[1])
        .read(private, 7)
        .read(open, 4)
        .hypercall(7, [1, 2, 3, 4])
        .unshare(Gpa::new(0x8000), 1)
}

const KEPT: [&str; 9] = [
    "Done",
    "Done",
    "Done",
    "Done",
    "Done",
    "Data([112, 114, 105, 118, 97, 116, 101])",
    "Data([111, 112, 101, 110])",
    "Value(99)",
    "Done",
];

/// The second half of [`keeper`].
fn run_to_the_end(vm: &Vm, vcpu: &mut run_support::Vcpu) {
    let call = Exit::Hypercall {
        nr: 7,
        args: [1, 2, 3, 4, 0, 0],
    };
    assert_eq!(granting(vm, vcpu), Ok(call));
    vcpu.answer(Answer::Value(99)).unwrap();
    assert_eq!(granting(vm, vcpu), Ok(Exit::Shutdown));
}

#[test]
fn the_guest_runs_on_with_its_memory_and_registers_wherever_its_td_goes() {
    for staged in [false, true] {
        let (
            Td {
                mut vcpus,
                mut vm,
                host,
                ram,
            },
            log,
        ) = run_support::td(keeper());
        let out = granting(&vm, &mut vcpus[0]);
        assert!(matches!(out, Ok(Exit::IoOut { port: 0x80, .. })));
        let (mrtd, tdr, stats) = (vm.measurement().unwrap(), vm.tdr(), vm.private_stats());
        let mut gone = Vec::new();
        for hop in 0..3 {
            let mut to = match hop {
                0 => created(&host, 1),
                _ => waiting(&host, 1, &ram),
            };
            if hop == 0 {
                // The TD's shared frames stay shared where the slot comes last.
                TdxVm::move_context(&mut vm, &mut to).unwrap();
                to.set_memory_slot(&ram.slot(0, 0)).unwrap();
            } else if staged {
                let table = Arc::default();
                let token = send(&mut vm, &table).unwrap();
                let name = receive(&mut to, &table, &token);
                assert_eq!(name, Ok(GuestName::Page(tdr.unwrap())));
                assert!(table.is_empty());
            } else {
                TdxVm::move_context(&mut vm, &mut to).unwrap();
            }
            assert_eq!((vm.step(), to.step()), (Step::Poisoned, Step::Runnable));
            assert_eq!((to.tdr(), to.private_stats()), (tdr, stats));
            assert_eq!(to.measurement(), Ok(mrtd));
            assert_eq!(to.privacy(Gfn::new(8)), Privacy::Shared);
            let vcpu = to.create_vcpu(VcpuId(0)).unwrap();
            assert_eq!(vcpus[0].vcpu_run(), Err(Error::Poisoned));
            vcpus = vec![vcpu];
            gone.push(std::mem::replace(&mut vm, to));
        }
        run_to_the_end(&vm, &mut vcpus[0]);
        log.expect(KEPT);
        assert_eq!(ram.read(0x8010, 4), b"open");
        drop(vcpus);
        // In turn the oldest first and the newest first.
        gone.insert(if staged { 0 } else { 3 }, vm);
        end(gone, &host);
        drop(ram);
    }
}

#[test]
fn no_seamcall_is_made_and_the_cost_does_not_grow_with_the_guest() {
    let mut calls = Vec::new();
    for pages in [1u64, 512, 4096] {
        let Td {
            vcpus,
            mut vm,
            host,
            ram,
        } = Made {
            ram_bytes: 32 * MIB,
            ..Made::default()
        }
        .td();
        assert_eq!(vm.pre_fault_memory(Gfn::new(0), pages), Ok(pages));
        let mut to = waiting(&host, 1, &ram);
        let total = || host.tdx_platform().unwrap().counts().total();
        let before = (total(), host.pages().unwrap().frames_out());
        TdxVm::move_context(&mut vm, &mut to).unwrap();
        calls.push(total() - before.0);
        assert_eq!(host.pages().unwrap().frames_out(), before.1);
        assert_eq!(to.private_stats().pages_4k, pages);
        assert_eq!(vm.private_stats().pages_4k, 0);
        drop(vcpus);
        end([vm, to], &host);
    }
    assert_eq!(calls, [0, 0, 0], "SEAMCALLs and TDCALLs");
}

#[test]
fn pages_and_keys_are_on_the_books_of_the_vm_that_has_them() {
    let Td {
        vcpus,
        mut vm,
        host,
        ram,
    } = Made::default().td();
    vm.pre_fault_memory(Gfn::new(0), 64).unwrap();
    let mut to = waiting(&host, 1, &ram);
    TdxVm::move_context(&mut vm, &mut to).unwrap();
    drop(vcpus);
    // The source has the unused TD of the destination: a key, and its TDR and TDCS.
    let unused = destroy(vm);
    assert!(unused.is_clean());
    assert_eq!(unused.keys_freed, 1);
    assert_eq!(host.seam().unwrap().key_ids().in_use(), 1);
    let left = host.pages().unwrap().frames_out();
    let used = destroy(to);
    assert_eq!((used.keys_freed, used.pages_freed), (1, left));
    assert!(used.is_clean() && left > 64 + unused.pages_freed / 2);
    end([], &host);

    // One that the module knows nothing of leaves nothing.
    let Td {
        vcpus,
        vm: mut from,
        ..
    } = Made {
        host: host.clone(),
        ..Made::default()
    }
    .td();
    let mut to = created(&host, 1);
    TdxVm::move_context(&mut from, &mut to).unwrap();
    drop(vcpus);
    assert_eq!(destroy(from).keys_freed, 0);
    assert_eq!(destroy(to).keys_freed, 1);
    end([], &host);
}

#[test]
fn who_does_not_fit_is_named_and_nothing_changes() {
    let Td {
        mut vcpus,
        mut vm,
        host,
        ram,
    } = Made::default().td();
    let abroad = SimHost::new(Vendor::Intel);
    let mut foreign = waiting(&abroad, 1, &ram);
    let (from, there) = (vm.id().0, foreign.id().0);
    let refused = |result, vm| assert_eq!(result, Err(Error::Invalid(Field::Vm, vm)));
    refused(TdxVm::move_context(&mut vm, &mut foreign), from);
    refused(TdxVm::move_context(&mut foreign, &mut vm), there);
    end([foreign], &abroad);

    let wide = TdParams {
        gpaw: Gpaw::Bits52,
        ..TdParams::default()
    };
    let new = |params| TdxVm::create(&host, host.next_vm_id(), &params).unwrap();
    let mut wide = new(params(1, wide));
    let mut more = new(params(2, TdParams::default()));
    let mut with_vcpu = waiting(&host, 1, &ram);
    drop(with_vcpu.create_vcpu(VcpuId(0)).unwrap());
    let id = wide.id().0;
    refused(TdxVm::move_context(&mut vm, &mut wide), id);
    let vcpu_count = Err(Error::Invalid(Field::VcpuCount, 2));
    assert_eq!(TdxVm::move_context(&mut vm, &mut more), vcpu_count);
    let id = with_vcpu.id().0;
    refused(TdxVm::move_context(&mut vm, &mut with_vcpu), id);
    with_vcpu.vm_finalize().unwrap();
    refused(TdxVm::move_context(&mut vm, &mut with_vcpu), id);

    // Sources that are not ready.
    let (mut fresh, mut early) = (created(&host, 1), waiting(&host, 1, &ram));
    let ids = (fresh.id().0, early.id().0);
    refused(TdxVm::move_context(&mut fresh, &mut early), ids.0);
    refused(TdxVm::move_context(&mut early, &mut fresh), ids.1);
    assert_eq!(errno(send(&mut early, &Arc::default())), EINVAL);

    // After all that the guest runs, and its TD moves.
    let (program, log) = transcript(keeper());
    vcpus[0].load(Box::new(program));
    assert!(matches!(
        granting(&vm, &mut vcpus[0]),
        Ok(Exit::IoOut { .. })
    ));
    TdxVm::move_context(&mut vm, &mut early).unwrap();
    drop(vcpus);
    let mut vcpu = early.create_vcpu(VcpuId(0)).unwrap();
    run_to_the_end(&early, &mut vcpu);
    log.expect(KEPT);
    drop(vcpu);
    end([vm, wide, more, with_vcpu, fresh, early], &host);
}

#[test]
fn a_dead_source_takes_its_teardown_only_and_says_why() {
    let Td {
        mut vcpus,
        mut vm,
        host,
        ram,
    } = Made::default().td();
    let (mut to, mut third) = (waiting(&host, 1, &ram), waiting(&host, 1, &ram));
    TdxVm::move_context(&mut vm, &mut to).unwrap();
    for _ in 0..2 {
        assert_eq!(vcpus[0].vcpu_run(), Err(Error::Poisoned));
        assert_eq!(vcpus[0].inject_nmi(), Err(Error::Poisoned));
        let program = Box::new(Script::new());
        let loaded = vcpus[0].programs().unwrap().load_program(program);
        assert_eq!(loaded, Err(Error::Poisoned));
        assert_eq!(errno(vm.set_memory_slot(&ram.slot(1, 64 * MIB))), EIO);
        assert_eq!(errno(vm.pre_fault_memory(Gfn::new(0), 1)), EIO);
        assert_eq!(errno(vm.create_vcpu(VcpuId(0))), EIO);
        assert_eq!(errno(TdxVm::move_context(&mut vm, &mut third)), EIO);
        assert_eq!(errno(TdxVm::move_context(&mut to, &mut vm)), EIO);
        assert_eq!(errno(send(&mut vm, &Arc::default())), EIO);
    }
    let why = vm.explain(Error::Poisoned).to_string();
    assert!(why.contains("its guest moved to another VM"), "{why}");
    // Kicks of old handles reach nothing.
    vcpus[0].kick_handle().kick();
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    assert_eq!(
        errno(to.create_vcpu(VcpuId(0))),
        EINVAL,
        "one handle for each"
    );
    vcpu.load(Box::new(Script::new()));
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
    drop((vcpu, vcpus));
    end([to, vm, third], &host);
}

#[test]
fn an_exit_that_waits_for_its_answer_keeps_the_td_where_it_is() {
    let (
        Td {
            mut vcpus,
            mut vm,
            host,
            ram,
        },
        log,
    ) = run_support::td(Script::new().input(0x70, 1).output(0x80, &[1]));
    let mut to = waiting(&host, 1, &ram);
    let table = Arc::new(StagingTable::new());
    assert!(matches!(vcpus[0].vcpu_run(), Ok(Exit::IoIn { .. })));
    vcpus[0].exit_data()[0] = 42;
    assert_eq!(errno(TdxVm::move_context(&mut vm, &mut to)), EBUSY);
    assert_eq!(errno(send(&mut vm, &table)), EBUSY);
    assert!(table.is_empty());
    // As with immediate_exit on KVM: a run that is kicked takes the answer, and the guest stays out.
    vcpus[0].kick_handle().kick();
    assert_eq!(vcpus[0].vcpu_run(), Ok(Exit::Interrupted));
    TdxVm::move_context(&mut vm, &mut to).unwrap();
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    assert!(matches!(vcpu.vcpu_run(), Ok(Exit::IoOut { .. })));
    log.expect(["Data([42])"]);
    drop((vcpu, vcpus));
    end([vm, to], &host);
}

/// A TD with local APICs.
fn with_apics() -> Td {
    let made = Made {
        irqchip: Irqchip::Split,
        ..Made::default()
    };
    made.td()
}

/// A VM to which it can move.
fn target_with_apics(host: &SimHost) -> Vm {
    let params = VmParams {
        irqchip: Irqchip::Split,
        ..params(1, TdParams::default())
    };
    TdxVm::create(host, host.next_vm_id(), &params).unwrap()
}

#[test]
fn interrupts_that_wait_and_halts_go_with_the_td() {
    let Td {
        mut vcpus,
        mut vm,
        host,
        ram,
    } = with_apics();
    let (program, log) = transcript(Script::new().halt().output(0x80, &[1]).halt());
    vcpus[0].load(Box::new(program));
    vcpus[0].kick_handle().kick();
    assert_eq!(
        vcpus[0].vcpu_run(),
        Ok(Exit::Interrupted),
        "before its halt"
    );
    vm.deliver_interrupt(VcpuId(0), 0x41).unwrap();
    let mut to = target_with_apics(&host);
    TdxVm::move_context(&mut vm, &mut to).unwrap();
    to.set_memory_slot(&ram.slot(0, 0)).unwrap();
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    assert!(matches!(vcpu.vcpu_run(), Ok(Exit::IoOut { .. })));
    log.expect(["Interrupt(65)"]);
    // One that halts waits in its run, and the next interrupt is the destination's.
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| vcpu.vcpu_run());
        while log.all().is_empty() {
            std::thread::yield_now();
        }
        to.deliver_interrupt(VcpuId(0), 0x42).unwrap();
        assert_eq!(run.join().unwrap(), Ok(Exit::Shutdown));
    });
    drop((kick, vcpu, vcpus));
    end([vm, to], &host);
}

#[test]
fn an_interrupt_that_comes_before_the_new_handle_ends_the_halt() {
    let Td {
        mut vcpus,
        mut vm,
        host,
        ram,
    } = with_apics();
    let (program, log) = transcript(Script::new().output(0x80, &[1]).halt());
    vcpus[0].load(Box::new(program));
    assert!(matches!(vcpus[0].vcpu_run(), Ok(Exit::IoOut { .. })));
    // It halts, and is kicked out of its wait.
    let kick = vcpus[0].kick_handle();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| vcpus[0].vcpu_run());
        std::thread::sleep(Duration::from_millis(20));
        kick.kick();
        assert_eq!(run.join().unwrap(), Ok(Exit::Interrupted));
    });
    let mut to = target_with_apics(&host);
    TdxVm::move_context(&mut vm, &mut to).unwrap();
    to.set_memory_slot(&ram.slot(0, 0)).unwrap();
    to.deliver_interrupt(VcpuId(0), 0x41).unwrap();
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    // A vCPU that waits on is kicked out of it.
    let (done, ended) = mpsc::channel::<()>();
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if ended.recv_timeout(Duration::from_secs(5)) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
        drop(done);
    });
    log.expect(["Done", "Interrupt(65)"]);
    drop((vcpu, vcpus));
    end([vm, to], &host);
}

#[test]
fn a_token_is_good_once_and_only_while_its_source_is_staged() {
    let (
        Td {
            mut vcpus,
            mut vm,
            host,
            ram,
        },
        log,
    ) = run_support::td(keeper());
    assert!(matches!(
        granting(&vm, &mut vcpus[0]),
        Ok(Exit::IoOut { .. })
    ));
    let table = Arc::new(StagingTable::new());
    let mut to = waiting(&host, 1, &ram);
    // What cannot be delivered has not happened.
    let undelivered = vm.local_send(&table, &mut random(), &mut |_| Err(Error::Busy));
    assert_eq!((undelivered, table.len()), (Err(Error::Busy), 0));
    let token = send(&mut vm, &table).unwrap();
    assert_eq!(errno(send(&mut vm, &table)), 17);
    assert_eq!(vm.step(), Step::Poisoned);
    assert_eq!(vcpus[0].vcpu_run(), Err(Error::Poisoned));
    assert_eq!(errno(TdxVm::move_context(&mut vm, &mut to)), EBUSY);
    let lost = to.local_receive(&table, &token, &mut |_| Err(Error::Again));
    assert_eq!((lost, table.len()), (Err(Error::Again), 1));
    assert_eq!(to.step(), Step::Initialized);
    // Taken back, it is worthless, and the guest runs.
    vm.local_cancel().unwrap();
    assert_eq!(errno(vm.local_cancel()), 2);
    let worthless = Err(Error::NotFound(Field::Token, 0));
    assert_eq!(receive(&mut to, &table, &token), worthless);
    assert_eq!((vm.step(), table.len()), (Step::Runnable, 0));
    // A source that goes makes its token worthless too.
    let Td {
        vcpus: others,
        vm: mut other,
        ram: other_ram,
        ..
    } = Made {
        host: host.clone(),
        ..Made::default()
    }
    .td();
    let gone = send(&mut other, &table).unwrap();
    drop(others);
    assert!(destroy(other).is_clean());
    drop(other_ram);
    assert_eq!(receive(&mut to, &table, &gone), worthless);
    assert!(table.is_empty());

    let token = send(&mut vm, &table).unwrap();
    receive(&mut to, &table, &token).unwrap();
    assert_eq!(receive(&mut to, &table, &token), worthless);
    drop(vcpus);
    let mut vcpu = to.create_vcpu(VcpuId(0)).unwrap();
    run_to_the_end(&to, &mut vcpu);
    log.expect(KEPT);
    drop(vcpu);
    end([vm, to], &host);
}

#[test]
fn a_machine_takes_no_guest_of_another_technology() {
    let host = SimHost::new(Vendor::Intel);
    let new = |tech| host.create_vm(tech, &VmParams::new(1)).unwrap();
    let (normal, td) = (new(kvm_ops_core::Tech::Vmx), new(kvm_ops_core::Tech::Tdx));
    assert!(td.take_guest(&normal).is_err() && normal.take_guest(&td).is_err());
}
