//! Private and shared memory of a running TD: faults, conversions asked for and not, MapGPA.

mod run_support;

use kvm_ops_core::guest::Script;
use kvm_ops_core::{
    Answer, Error, Exit, ExitKind, Field, Gfn, Gpa, Host, Level, PagePort, Privacy, Step, TdParams,
    VcpuOps, VmOps,
};
use kvm_ops_sim::SimHost;
use kvm_ops_tdx::TdxVm;
use run_support::{
    ALIGN_ERROR, INVALID_OPERAND, Load, MIB, Made, PAGE, RETRY, Ram, SHARED, SUBFUNC_UNSUPPORTED,
    Vcpu, convert, refused, td, transcript, values, words,
};
use soft_tdx_module::{Code, Fault, HostLeaf, LockMode, LockTarget, Operand};

const MAP_GPA: u64 = 0x10001;

/// Runs, grants every conversion that the guest asks for, and stops at any other exit.
fn granting(vm: &TdxVm<SimHost>, vcpu: &mut Vcpu) -> Result<ExitKind, Error> {
    loop {
        match vcpu.vcpu_run()? {
            Exit::MapGpaRange { gpa, pages, to } => {
                convert(vm, gpa, pages, to);
                vcpu.answer(Answer::Value(0))?;
            }
            other => return Ok(other.kind()),
        }
    }
}

/// The page that the guest touched as what it is not.
#[track_caller]
fn memory_fault(vcpu: &mut Vcpu) -> (Gpa, Privacy) {
    match vcpu.vcpu_run().unwrap() {
        Exit::MemoryFault {
            gpa,
            bytes: PAGE,
            access,
        } => (gpa, access),
        other => panic!("{other:?}"),
    }
}

#[test]
fn shared_mem() {
    let at = Gpa::new(SHARED | 0x5010);
    let script = Script::new()
        .share(Gpa::new(0x5000), 1)
        .write(at, &0xcafe_cafe_u32.to_le_bytes())
        .output(1, &[1])
        .read(at, 4);
    let (mut td, transcript) = td(script);
    assert_eq!(granting(&td.vm, &mut td.vcpus[0]), Ok(ExitKind::IoOut));
    assert_eq!(td.ram.read(0x5010, 4), 0xcafe_cafe_u32.to_le_bytes());
    td.ram.write(0x5010, &0xabcd_abcd_u32.to_le_bytes());
    assert_eq!(granting(&td.vm, &mut td.vcpus[0]), Ok(ExitKind::Shutdown));
    transcript.expect(["Done", "Done", "Done", "Data([205, 171, 205, 171])"]);
    td.destroy();
}

/// Pages of an area, each filled with its pattern.
const AREA: [(u64, u8); 4] = [
    (0x10000, 0x11),
    (0x11000, 0x22),
    (0x12000, 0x33),
    (0x13000, 0x44),
];
const FOCUS: u64 = 0x11000;

fn fill() -> Script {
    AREA.iter().fold(Script::new(), |script, (gpa, pattern)| {
        let gpa = Gpa::new(*gpa);
        script
            .accept(gpa, Level::Size4K)
            .write(gpa, &[*pattern; 4096])
    })
}

fn look(script: Script) -> Script {
    AREA.iter()
        .filter(|(gpa, _)| *gpa != FOCUS)
        .fold(script, |script, (gpa, _)| script.read(Gpa::new(*gpa), 4))
}

fn rest_is_unchanged(transcript: &[String]) {
    let patterns = AREA.iter().filter(|(gpa, _)| *gpa != FOCUS);
    let expected: Vec<String> = patterns
        .map(|(_, p)| format!("Data({:?})", [*p; 4]))
        .collect();
    assert_eq!(transcript, expected);
}

#[test]
fn upm_explicit_conversions_leave_the_rest_alone_and_bring_a_page_back_empty() {
    let shared = Gpa::new(SHARED | FOCUS);
    let mut script = look(fill().share(Gpa::new(FOCUS), 1));
    script = script.read(shared, 4).write(shared, &[0x99; 8]);
    script = look(script.unshare(Gpa::new(FOCUS), 1)).read(Gpa::new(FOCUS), 8);
    let (mut td, transcript) = td(script);
    td.ram.write(FOCUS, &[0x77; 8]);
    assert_eq!(granting(&td.vm, &mut td.vcpus[0]), Ok(ExitKind::Shutdown));
    assert_eq!(td.ram.read(FOCUS, 8), [0x99; 8]);
    let transcript = transcript.all();
    assert!(
        transcript[..9].iter().all(|t| t == "Done"),
        "{transcript:?}"
    );
    rest_is_unchanged(&transcript[9..12]);
    assert_eq!(
        transcript[12..15],
        ["Data([119, 119, 119, 119])", "Done", "Done"]
    );
    rest_is_unchanged(&transcript[15..18]);
    assert_eq!(transcript[18], "Data([0, 0, 0, 0, 0, 0, 0, 0])");
    td.destroy();
}

#[test]
fn upm_implicit_conversions_are_memory_faults_of_the_page_that_was_touched() {
    let (private, shared) = (Gpa::new(FOCUS), Gpa::new(SHARED | FOCUS | 0x18));
    let mut script = look(fill().write(shared, &[0x99; 8]));
    script = look(script.accept(private, Level::Size4K)).read(private, 4);
    let (mut td, transcript) = td(script);
    for access in [Privacy::Shared, Privacy::Private] {
        for _ in 0..2 {
            let fault = memory_fault(td.vcpu());
            assert_eq!(fault, (Gpa::new(FOCUS), access), "until something is done");
        }
        td.convert(Gpa::new(FOCUS), 1, access);
        if access == Privacy::Private {
            assert_eq!(td.ram.read(FOCUS + 0x18, 8), [0x99; 8]);
        }
    }
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    let transcript = transcript.all();
    rest_is_unchanged(&transcript[9..12]);
    rest_is_unchanged(&transcript[13..16]);
    assert_eq!(transcript[16], "Data([0, 0, 0, 0])");
    td.destroy();
}

#[test]
fn gmem_private_and_shared_private_memory_is_only_where_a_slot_is() {
    let ram = Ram::new(MIB);
    let at = 0x4000_0000;
    let script = Script::new()
        .accept(Gpa::new(at), Level::Size4K)
        .read(Gpa::new(at), 2)
        .output(1, &[1])
        .accept(Gpa::new(at), Level::Size4K);
    let (mut td, transcript) = td(script);
    for _ in 0..20 {
        // More than zero-step filtering lets pass: the module then faults without the guest.
        assert_eq!(memory_fault(td.vcpu()), (Gpa::new(at), Privacy::Private));
    }
    let slot = ram.slot(1, at);
    td.vm.set_memory_slot(&slot).unwrap();
    assert_eq!(td.vcpu().vcpu_run().unwrap().kind(), ExitKind::IoOut);
    // With its slot the memory goes.
    td.vm.delete_memory_slot(&slot).unwrap();
    assert_eq!(td.private_page(at / PAGE), None);
    assert_eq!(memory_fault(td.vcpu()), (Gpa::new(at), Privacy::Private));
    td.vm.set_memory_slot(&slot).unwrap();
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Done", "Data([0, 0])", "Done", "Done"]);
    td.destroy();
    drop(ram);
}

#[test]
fn a_fault_that_repeats_meets_zero_step_filtering_and_still_ends() {
    // The private access itself faults, not an accept, so the module counts it.
    let at = 0x4000_0000;
    let ram = Ram::new(MIB);
    let mut td = Made {
        td: TdParams {
            attributes: 0,
            ..TdParams::default()
        },
        ..Made::default()
    }
    .td();
    let script = Script::new()
        .read(Gpa::new(at), 1)
        .accept(Gpa::new(at), Level::Size4K);
    let (program, transcript) = transcript(script.read(Gpa::new(at), 1));
    td.vcpu().load(Box::new(program));
    for _ in 0..20 {
        assert_eq!(memory_fault(td.vcpu()), (Gpa::new(at), Privacy::Private));
    }
    td.vm.set_memory_slot(&ram.slot(1, at)).unwrap();
    // The page comes, but it is pending, and the filter waits for one that is mapped.
    let vcpu = td.vcpu();
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kick.kick();
        });
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
    });
    transcript.expect::<&str>([]);
    td.destroy();
    drop(ram);
}

#[test]
fn vm_huge_page_accepted_at_2m_is_a_size_mismatch_and_falls_back_to_4k() {
    let at = Gpa::new(2 * MIB);
    let script = Script::new()
        .accept(at, Level::Size2M)
        .unshare(at, 512)
        .read(Gpa::new(4 * MIB - 1), 1);
    let (mut td, transcript) = td(script);
    assert_eq!(granting(&td.vm, &mut td.vcpus[0]), Ok(ExitKind::Shutdown));
    let mismatch = Code::PAGE_SIZE_MISMATCH.detail(1).0;
    transcript.expect([refused(mismatch), "Done".into(), "Data([0])".into()]);
    assert_eq!(td.vm.private_stats().pages_4k, 512);
    assert_eq!(
        td.calls("TDH.MEM.PAGE.AUG", "SUCCESS"),
        512,
        "no page faults twice"
    );
    td.destroy();
}

#[test]
fn pages_that_are_there_cost_no_call() {
    let script = (0..8u64).fold(Script::new(), |script, page| {
        let at = Gpa::new(0x8000 + page * PAGE);
        script.accept(at, Level::Size4K).write(at, &[1])
    });
    let (mut td, _told) = td(script);
    assert_eq!(td.vm.pre_fault_memory(Gfn::new(8), 8), Ok(8));
    let before = td.calls("TDH.MEM.PAGE.AUG", "SUCCESS");
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    assert_eq!(td.calls("TDH.MEM.PAGE.AUG", "SUCCESS"), before);
    assert_eq!(td.calls("TDH.VP.ENTER", "NON_RECOVERABLE_VCPU"), 0);
    td.destroy();
}

#[test]
fn a_shared_access_without_a_slot_is_mmio_and_never_a_fault() {
    let script = Script::new().write(Gpa::new(SHARED | 0x7000_0000), &[5]);
    let (mut td, _told) = td(script);
    let (gpa, len) = (Gpa::new(0x7000_0000), 1);
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::MmioWrite { gpa, len }));
    assert_eq!(td.vcpu().exit_data(), [5]);
    td.destroy();
}

#[test]
fn mapgpa_comes_in_pieces_of_2m_and_takes_every_answer() {
    let pages = 1025;
    let bytes = pages * PAGE;
    let call = |gpa| [gpa, bytes, 0, 0];
    let script = Script::new()
        .tdvmcall(MAP_GPA, call(SHARED))
        .tdvmcall(MAP_GPA, call(SHARED))
        .tdvmcall(MAP_GPA, call(SHARED))
        .tdvmcall(MAP_GPA, call(0x1000))
        .tdvmcall(MAP_GPA, call(SHARED));
    let (mut td, transcript) = td(script);
    let mut answers = |ret_of: &[(u64, u64, Privacy, u64)]| {
        for (at, count, wanted, answer) in ret_of {
            let (gpa, pages, to) = (Gpa::new(*at), *count, *wanted);
            let exit = td.vcpu().vcpu_run();
            assert_eq!(exit, Ok(Exit::MapGpaRange { gpa, pages, to }));
            // Not answered is answered with success.
            if *answer != 0 {
                td.vcpu().answer(Answer::Value(*answer)).unwrap();
            }
        }
    };
    use Privacy::{Private, Shared};
    let rest = 4 * MIB;
    answers(&[
        (0, 512, Shared, 0),
        (2 * MIB, 512, Shared, 0),
        (rest, 1, Shared, 0),
    ]);
    answers(&[(0, 512, Shared, 0), (2 * MIB, 512, Shared, 22)]); // EINVAL
    answers(&[(0, 512, Shared, 0), (2 * MIB, 512, Shared, 11)]); // EAGAIN
    answers(&[(0x1000, 512, Private, 5)]); // EIO
    answers(&[(0, 512, Shared, 38)]); // ENOSYS
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    let values_of = |status, at, gpa| values([status, at, gpa, bytes, 0, 0]);
    transcript.expect([
        values_of(0, MAP_GPA, SHARED),
        values_of(INVALID_OPERAND, SHARED + 2 * MIB, SHARED),
        values_of(RETRY, SHARED + 2 * MIB, SHARED),
        values_of(INVALID_OPERAND, 0x1000, 0x1000),
        values_of(SUBFUNC_UNSUPPORTED, SHARED, SHARED),
    ]);
}

#[test]
fn mapgpa_with_a_kick_pending_lets_the_guest_call_again_for_the_rest() {
    let (mut td, transcript) = td(Script::new().share(Gpa::new(0), 2 * 512 + 3));
    let kick = td.vcpu().kick_handle();
    let mut pieces = Vec::new();
    loop {
        match td.vcpu().vcpu_run().unwrap() {
            Exit::MapGpaRange { gpa, pages, .. } => pieces.push((gpa.get(), pages)),
            Exit::Interrupted => pieces.push((u64::MAX, 0)),
            Exit::Shutdown => break,
            other => panic!("{other:?}"),
        }
        if pieces.len() == 1 {
            kick.kick();
        }
    }
    let kicked = (u64::MAX, 0);
    assert_eq!(pieces, [(0, 512), kicked, (2 * MIB, 512), (4 * MIB, 3)]);
    transcript.expect(["Done"]);
}

#[test]
fn mapgpa_of_what_is_no_range_never_reaches_the_embedder() {
    let bad = [
        (0, 0, INVALID_OPERAND),
        (SHARED, 0, INVALID_OPERAND),
        (!0xfff, PAGE, INVALID_OPERAND),
        (SHARED << 1, PAGE, INVALID_OPERAND),
        (SHARED - PAGE, 2 * PAGE, INVALID_OPERAND),
        (0x800, PAGE, ALIGN_ERROR),
        (SHARED, 0x800, ALIGN_ERROR),
    ];
    let script = bad.iter().fold(Script::new(), |script, (gpa, bytes, _)| {
        script.tdvmcall(MAP_GPA, [*gpa, *bytes, 0, 0])
    });
    let (mut td, transcript) = td(script);
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(bad.map(|(gpa, bytes, status)| values([status, gpa, gpa, bytes, 0, 0])));
}

#[test]
fn a_host_without_memory_is_told_so_and_the_guest_goes_on_when_there_is_some() {
    let (mut td, transcript) = td(Script::new().accept(Gpa::new(0x3000), Level::Size4K));
    let pages = td.host.pages().unwrap();
    let mut all = Vec::new();
    for level in [Level::Size2M, Level::Size4K] {
        all.extend(std::iter::from_fn(|| pages.alloc(level).ok()));
    }
    assert_eq!(td.vcpu().vcpu_run(), Err(Error::NoMemory));
    assert_eq!(td.vcpu().vcpu_run(), Err(Error::NoMemory));
    assert_eq!(td.vm.step(), Step::Runnable);
    let pages = td.host.pages().unwrap();
    all.drain(..).for_each(|page| pages.free(page).unwrap());
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Done"]);
    td.destroy();
}

#[test]
fn an_entry_that_finds_a_lock_taken_is_made_again() {
    let (mut td, transcript) = td(Script::new().output(1, &[1]));
    let platform = td.host.tdx_platform().unwrap();
    let statuses = [
        Code::OPERAND_BUSY.on(Operand::TD_EPOCH),
        Code::OPERAND_BUSY.on(Operand::SEPT_TREE),
        Code::HOST_PRIORITY_BUSY_TIMEOUT.status(),
    ];
    for (nth, status) in (1..).zip(statuses) {
        let leaf = HostLeaf::VpEnter;
        platform.inject(Fault::ForceStatus { leaf, nth, status });
    }
    assert_eq!(td.vcpu().vcpu_run().unwrap().kind(), ExitKind::IoOut);
    assert_eq!(td.calls("TDH.VP.ENTER", "OPERAND_BUSY"), 2);
    assert_eq!(td.vcpu().vcpu_run(), Ok(Exit::Shutdown));
    transcript.expect(["Done"]);
    td.destroy();
}

#[test]
fn a_status_that_no_entry_should_have_is_an_internal_error_and_the_td_is_over() {
    let (mut td, _told) = td(Script::new());
    let status = Code::TD_FATAL.status();
    let (leaf, nth) = (HostLeaf::VpEnter, 1);
    let platform = td.host.tdx_platform().unwrap();
    platform.inject(Fault::ForceStatus { leaf, nth, status });
    let exit = td.vcpu().vcpu_run();
    assert_eq!(exit, Ok(Exit::InternalError { suberror: 4 }));
    assert_eq!(words(td.vcpu().exit_data())[0], status.0);
    assert_eq!(td.vcpu().vcpu_run(), Err(Error::Poisoned));
    td.destroy();
}

#[test]
fn a_fault_waits_for_a_lock_that_another_holds_and_a_kick_ends_the_wait() {
    let (mut td, transcript) = td(Script::new().accept(Gpa::new(0x3000), Level::Size4K));
    assert_eq!(
        td.vm.pre_fault_memory(Gfn::new(0x10), 1),
        Ok(1),
        "the tables"
    );
    let platform = std::sync::Arc::clone(td.host.tdx_platform().unwrap());
    let tree = LockTarget::SeptTree {
        tdr: td.vm.tdr().unwrap().get(),
    };
    assert!(platform.hold(tree, LockMode::Exclusive));
    let vcpu = td.vcpu();
    let kick = vcpu.kick_handle();
    std::thread::scope(|scope| {
        let releases = scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            kick.kick();
            std::thread::sleep(std::time::Duration::from_millis(10));
            platform.release(tree, LockMode::Exclusive);
        });
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Interrupted));
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
        releases.join().unwrap();
    });
    transcript.expect(["Done"]);
    assert!(td.calls("TDH.MEM.PAGE.AUG", "OPERAND_BUSY") > 0);
    td.destroy();
}

/// A guest asks for conversions of frames that are no memory, 8 KiB apart so that no two join. Each
/// is refused, and nothing of them is kept: a slot that comes later finds the frames private.
#[test]
fn conversions_outside_of_memory_are_refused_and_leave_no_trace() {
    const OUTSIDE: u64 = 64 * MIB;
    let at = |n: u64| Gpa::new(OUTSIDE + n * 2 * PAGE);
    let script = (0..32).fold(Script::new(), |script, n| script.share(at(n), 1));
    let (mut td, transcript) = td(script);
    let mut asked = 0;
    while let Exit::MapGpaRange { gpa, pages, to } = td.vcpus[0].vcpu_run().unwrap() {
        let first = Gfn::containing(gpa);
        let error = Error::NotFound(Field::Gfn, first.get());
        for to in [to, Privacy::Private] {
            assert_eq!(td.vm.set_memory_attributes(first, pages, to), Err(error));
        }
        let errno = error.errno() as u64;
        td.vcpus[0].answer(Answer::Value(errno)).unwrap();
        asked += 1;
    }
    assert_eq!(asked, 32);
    transcript.expect([refused(INVALID_OPERAND)].into_iter().cycle().take(32));
    td.vm.set_memory_slot(&td.ram.slot(1, OUTSIDE)).unwrap();
    for n in 0..32 {
        let done = td.vm.pre_fault_memory(Gfn::containing(at(n)), 1);
        assert_eq!(done, Ok(1), "private, as every frame begins");
    }
    td.destroy();
}

/// A range that memory covers in part is converted up to the gap, which the next call names.
#[test]
fn a_conversion_stops_where_memory_ends() {
    let (td, _) = td(Script::new());
    let pages = 8 * MIB / PAGE;
    let (vm, first) = (&td.vm, Gfn::new(pages - 3));
    let convert = |first, n| vm.set_memory_attributes(first, n, Privacy::Shared);
    assert_eq!(convert(first, 100), Ok(3));
    let gap = Error::NotFound(Field::Gfn, pages);
    assert_eq!(convert(Gfn::new(pages), 97), Err(gap));
    assert_eq!(vm.pre_fault_memory(Gfn::new(pages - 4), 1), Ok(1));
    let shared = Error::NotFound(Field::Gfn, first.get());
    assert_eq!(vm.pre_fault_memory(first, 1), Err(shared));
    td.destroy();
}
