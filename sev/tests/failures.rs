//! Every command and instruction of a guest's life fails, at every place where it is issued, with
//! every plausible status: the error names it, every leak is listed, and the machine goes on.
//!
//! `BLESS=1 cargo test -p kvm-ops-sev --test failures` writes the table, docs/sev-failures.md.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use common::{RAM, Ram, TECHS, create, host_from, measured, page, params, platform, sp};
use kvm_ops_core::{
    Backend, EncCmd, Error, Fault, FaultPlan, Gfn, Host, InjectedHost, Leak, Leaked, Privacy,
    PspPort, SevParams, Tech, VcpuId, VcpuOps, VmOps,
};
use kvm_ops_sev::kvm::layout::{SevAttestation, SevDbg, SevLaunchSecret, SevRange};
use kvm_ops_sev::{Failure, SevVm};
use kvm_ops_sim::{SevSetup, SimHost};
use rand_chacha::rand_core::SeedableRng;
use soft_amd_sp::crypto::GuestOwner;
use soft_amd_sp::measure::LaunchMeasure;
use soft_amd_sp::{Command, Instruction, Operation, Status};
use zerocopy::{Immutable, IntoBytes};

/// Statuses that commands give for reasons that a host cannot rule out, and one without a name.
const STATUSES: [Status; 7] = [
    Status::INVALID_PLATFORM_STATE,
    Status::INVALID_GUEST_STATE,
    Status::INVALID_PARAM,
    Status::RESOURCE_LIMIT,
    Status::HWERROR_PLATFORM,
    Status::HWERROR_UNSAFE,
    Status(0x1234),
];
/// Codes of instructions that no retry changes. FAIL_INUSE and FAIL_OVERLAP are transient.
const CODES: [u32; 3] = [1, 2, 99];
/// Calls of one operation that fail in turn, beside the last.
const PLACES: u64 = 8;
const MIB: u64 = 1 << 20;

type Machine = InjectedHost<SimHost>;

/// One ASID for SEV-ES and SNP, one for SEV, each used up: leasing flushes. Its ports fail by the
/// plan.
fn worn_host() -> (Machine, Arc<FaultPlan>) {
    let host = host_from(SevSetup::new(platform(7).asids(2, 2)));
    for tech in [Tech::Sev, Tech::SevSnp] {
        let mut vm = create(&host, tech, 1);
        vm.vm_init().unwrap();
        vm.vm_finalize().unwrap();
        common::free_clean(vm);
    }
    let plan = Arc::new(FaultPlan::new());
    (InjectedHost::new(host, plan.clone()), plan)
}

/// The outcome of a life: its end before time, and its losses.
struct Life {
    stopped: Option<(&'static str, Error)>,
    leaks: Vec<Leak>,
    leaked_frames: u64,
}

/// A life that issues every command there is, up to the first failure, and then the teardown.
fn life(host: &Machine, tech: Tech, ram: &Ram) -> Life {
    let policy = if tech == Tech::SevEs { 4 } else { 0 };
    let mut rng = rand_chacha::ChaCha20Rng::seed_from_u64(1);
    let owner = GuestOwner::new(&sp(host.inner()).pdh_cert(), policy, &mut rng).unwrap();
    let session = (
        owner.certificate().as_bytes().to_vec(),
        owner.session().to_bytes().to_vec(),
    );
    let sev = SevParams {
        session: (tech != Tech::SevSnp).then_some(session),
        ..SevParams::default()
    };
    let id = host.next_vm_id();
    let mut vm = SevVm::create(host, id, tech, &params(1, sev)).unwrap();
    let stopped = live(&mut vm, tech, ram, &owner).err();
    let account = vm.account();
    let before = host.inner().pages().unwrap().frames_out();
    assert!(account.held() + account.leaked <= before);
    let report = match vm.mmu_release_hkid() {
        Ok(key) => {
            let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
            vm.vm_free(drained)
        }
        // The VM is poisoned now: nothing of it is used again.
        Err(error) => vm.vm_abandon(error),
    };
    let leaked_frames = host.inner().pages().unwrap().frames_out();
    Life {
        stopped,
        leaks: report.leaks,
        leaked_frames,
    }
}

type Stop = (&'static str, Error);

fn live(vm: &mut SevVm<Machine>, tech: Tech, ram: &Ram, owner: &GuestOwner) -> Result<(), Stop> {
    let at = |step: &'static str| move |error: Error| (step, error);
    vm.vm_init().map_err(at("vm_init"))?;
    vm.set_memory_slot(&ram.slot(0, RAM))
        .map_err(at("set_memory_slot"))?;
    let vcpu = vm.create_vcpu(VcpuId(0)).map_err(at("create_vcpu"))?;
    for gpa in [RAM, RAM + 0x1000] {
        let contents = page(0x5a);
        vm.add_initial_page(&measured(gpa, &contents))
            .map_err(at("add_initial_page"))?;
    }
    if tech != Tech::SevSnp {
        put_secret(vm, tech, ram, owner)?;
    }
    vm.vm_finalize().map_err(at("vm_finalize"))?;
    vm.guest_status().map_err(at("guest_status"))?;
    if tech != Tech::SevSnp {
        debug(vm, ram)?;
    }
    let large = Gfn::new((RAM + 2 * MIB) >> 12);
    if tech == Tech::SevSnp {
        let done = vm
            .pre_fault_memory(large, 512)
            .map_err(at("pre_fault_memory"))?;
        if done != 512 {
            return Err(("pre_fault_memory", Error::NoMemory));
        }
    }
    vm.set_memory_attributes(Gfn::new(large.get() + 1), 1, Privacy::Shared)
        .map_err(at("set_memory_attributes"))?;
    vcpu.vcpu_free().map_err(at("vcpu_free"))
}

/// One of the kernel's commands: a structure with blobs behind it.
fn command(
    vm: &mut SevVm<Machine>,
    id: u32,
    head: &(impl IntoBytes + Immutable),
    blobs: &[&[u8]],
) -> Result<Vec<u8>, Stop> {
    let mut data = head.as_bytes().to_vec();
    blobs.iter().for_each(|blob| data.extend_from_slice(blob));
    let mut cmd = EncCmd {
        id,
        flags: 0,
        data: &mut data,
        firmware_status: 0,
    };
    let done = vm.mem_enc_op(&mut cmd);
    // The status is in the command too.
    let status = done.as_ref().err().and_then(Failure::of);
    let status = status.and_then(|failure| failure.status());
    assert_eq!(cmd.firmware_status, status.map_or(0, |s| s.0.into()));
    done.map(|()| data).map_err(|error| ("mem_enc_op", error))
}

/// VMSA, measurement and the owner's secret, by command.
fn put_secret(
    vm: &mut SevVm<Machine>,
    tech: Tech,
    ram: &Ram,
    owner: &GuestOwner,
) -> Result<(), Stop> {
    if tech == Tech::SevEs {
        command(vm, 4, &[0_u8; 0], &[])?;
    }
    let range = SevRange {
        uaddr: 16.into(),
        len: 48.into(),
        ..SevRange::default()
    };
    let measure = command(vm, 6, &range, &[&[0; 48]])?;
    let measure = LaunchMeasure::from_bytes(measure[16..].try_into().unwrap());
    let mut secret = [0x17; 16];
    let header = owner.seal_secret(&mut secret, [3; 16], &measure).to_bytes();
    let packet = SevLaunchSecret {
        hdr: 48.into(),
        hdr_len: (header.len() as u32).into(),
        guest: ram.address().into(),
        guest_len: 16.into(),
        trans: (48 + header.len() as u64).into(),
        trans_len: 16.into(),
        ..SevLaunchSecret::default()
    };
    command(vm, 5, &packet, &[&header, &secret]).map(drop)
}

/// A report, and the host's debugging that the policy allows.
fn debug(vm: &mut SevVm<Machine>, ram: &Ram) -> Result<(), Stop> {
    let report = SevAttestation {
        uaddr: 32.into(),
        len: 0xd0.into(),
        ..SevAttestation::default()
    };
    command(vm, 20, &report, &[&[0; 0xd0]])?;
    let dbg = |src: u64, dst: u64| SevDbg {
        src: src.into(),
        dst: dst.into(),
        len: 16.into(),
        ..SevDbg::default()
    };
    command(vm, 17, &dbg(ram.address(), 24), &[&[0; 16]])?;
    command(vm, 18, &dbg(24, ram.address()), &[&[0; 16]]).map(drop)
}

/// The operations of a life with their numbers of calls.
fn calls(tech: Tech, ram: &Ram) -> BTreeMap<Operation, u64> {
    let (host, _) = worn_host();
    let before = sp(host.inner()).counters();
    let life = life(&host, tech, ram);
    assert!(
        life.stopped.is_none() && life.leaks.is_empty(),
        "{:?}",
        life.stopped
    );
    common::nothing_left(host.inner());
    let after = sp(host.inner()).counters();
    let operations: Vec<Operation> = after.iter().map(|(operation, ..)| operation).collect();
    let made = |op: &Operation| after.calls(*op) - before.calls(*op);
    operations
        .into_iter()
        .map(|op| (op, made(&op)))
        .filter(|(_, calls)| *calls != 0)
        .collect()
}

fn leaked(leaks: &[Leak]) -> String {
    let mut counts: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    for leak in leaks {
        let what = match leak.what {
            Leaked::Page(_) => "page",
            Leaked::Key(_) => "ASID",
            Leaked::Handle(_) => "handle",
            _ => "?",
        };
        *counts.entry((what, leak.operation)).or_default() += 1;
    }
    if counts.is_empty() {
        return String::from("nothing");
    }
    let each = |((what, by), n): (&(&str, &str), &u32)| match n {
        1 => format!("{what} ({by})"),
        n => format!("{n} × {what} ({by})"),
    };
    counts.iter().map(each).collect::<Vec<_>>().join(", ")
}

/// Lets the nth call fail with `code`. Returns the step of the life that failed, and the leaks.
fn failed(tech: Tech, ram: &Ram, operation: Operation, nth: u64, code: u32) -> [String; 2] {
    let what = format!("{tech} {operation} {nth} {code:#x}");
    let (host, plan) = worn_host();
    let of = |call| plan.arm(Fault::nth(nth).of(call).status(code.into()));
    match operation {
        Operation::Command(command) => of(u64::from(command as u32)),
        Operation::Instruction(Instruction::RmpUpdate) => of(FaultPlan::RMPUPDATE),
        Operation::Instruction(Instruction::Psmash) => of(FaultPlan::PSMASH),
        // No port tells how WBINVD went: a core of the machine leaves it out.
        _ => assert!(sp(host.inner()).fail(soft_amd_sp::Failure {
            operation,
            nth,
            code
        })),
    }
    let life = life(&host, tech, ram);
    assert!(plan.disarm(), "{what}: it did not happen");
    sp(host.inner()).clear_failures();

    // An error names it.
    let errors = life.leaks.iter().map(|leak| leak.error);
    let errors: Vec<Error> = life.stopped.iter().map(|(_, e)| *e).chain(errors).collect();
    let names = |error: &Error| {
        let Some(failure) = Failure::of(error) else {
            return false;
        };
        let name = failure.operation.name().to_lowercase();
        match operation {
            // A core that did not write back its caches makes the flush fail.
            Operation::Instruction(Instruction::Wbinvd) => {
                name.ends_with("df_flush") && failure.code == u32::from(Status::WBINVD_REQUIRED.0)
            }
            _ => name == operation.to_string().to_lowercase() && failure.code == code,
        }
    };
    // No error shows the WBINVD at the end of a life: firmware does not check that one.
    let unseen = errors.is_empty() && operation == Instruction::Wbinvd.into();
    assert!(
        unseen || errors.iter().all(names) && !errors.is_empty(),
        "{what}: {errors:?}"
    );

    // A page that is not back is in the list.
    let is_page = |leak: &&Leak| matches!(leak.what, Leaked::Page(_));
    let pages = life.leaks.iter().filter(is_page).count() as u64;
    assert_eq!(life.leaked_frames, pages, "{what}");
    let pools = host.psp().unwrap().asid_pools();
    let keys = life
        .leaks
        .iter()
        .filter(|l| matches!(l.what, Leaked::Key(_)))
        .count();
    assert_eq!(
        (pools.in_use(), pools.leaked()),
        (keys as u32, keys as u32),
        "{what}"
    );
    assert_eq!(host.inner().live_vms(), 0, "{what}");
    let snapshot = sp(host.inner()).snapshot();
    let guests = snapshot.guests.len() + snapshot.snp_guests.len();
    let kept = |l: &&Leak| l.operation.ends_with("COMMISSION") || l.operation == "DEACTIVATE";
    assert!(
        guests == 0 || life.leaks.iter().any(|l| kept(&l)),
        "{what}: {snapshot}"
    );

    // The machine goes on, if an ASID is left.
    if keys == 0 {
        let after = self::life(&host, tech, ram);
        assert!(
            after.stopped.is_none() && after.leaks.is_empty(),
            "{what}: {:?}",
            after.stopped
        );
    }
    let stopped = life.stopped.map_or("the report", |(step, _)| step);
    [String::from(stopped), leaked(&life.leaks)]
}

fn rows(tech: Tech, ram: &Ram) -> Vec<[String; 4]> {
    let mut rows = Vec::new();
    for (operation, calls) in calls(tech, ram) {
        let instruction = matches!(operation, Operation::Instruction(_));
        let codes: Vec<u32> = match instruction {
            true => CODES.to_vec(),
            false => STATUSES.map(|status| status.0.into()).to_vec(),
        };
        let mut seen = Vec::new();
        for nth in (1..=calls.min(PLACES)).chain((calls > PLACES).then_some(calls)) {
            let outcomes: Vec<_> = codes
                .iter()
                .map(|code| failed(tech, ram, operation, nth, *code))
                .collect();
            // One rule for all statuses: the host does not interpret them.
            assert!(
                outcomes.windows(2).all(|w| w[0] == w[1]),
                "{tech} {operation} {nth}"
            );
            let [step, leaks] = outcomes[0].clone();
            if !seen.contains(&(step.clone(), leaks.clone())) {
                seen.push((step, leaks));
            }
        }
        for (step, leaks) in seen {
            let name = operation.to_string().to_uppercase();
            rows.push([name, calls.to_string(), step, leaks]);
        }
    }
    rows
}

const INTRO: &str = "\
# When the AMD SP fails

Printed by `BLESS=1 cargo test -p kvm-ops-sev --test failures`. The test lets every command and every RMP
instruction of a guest's life fail once at each place where it is issued (`FaultInjector`), and fails when an outcome
differs from this table.

A life is `vm_init` on a machine whose ASIDs are all used up, a slot, a vCPU, two measured pages, `vm_finalize`, a status,
and the teardown. SEV and SEV-ES add an owner's session and secret, a report, and a debugger's read and write; SNP adds a
2 MiB page of which 4 KiB become shared. VMSA, measurement, secret, report and debugging of SEV and SEV-ES go through
`mem_enc_op`, whose `firmware_status` is compared too.

Each command fails with seven statuses, one of them without a name, each instruction with three codes; the test demands the
same outcome for all of them. In every row the error names the command and the status, the pages and ASIDs that did not
come back are exactly those listed, and the next guest on the machine lives and dies without a leak (unless the only ASID is
lost). FAIL_INUSE and FAIL_OVERLAP of the instructions are tried again and never seen.

Tables of guests that are swapped out, carried to another platform, and sent over a byte stream whose messages are
lost, late, repeated, changed or cut are in [migration.md].

[migration.md]: migration.md
";

#[test]
fn every_failure_is_named_and_accounted_and_the_table_is_the_documented_one() {
    // Each kind on a thread: a few hundred lives each, with real cryptography.
    let tables = std::thread::scope(|scope| {
        let threads = TECHS.map(|tech| scope.spawn(move || rows(tech, &Ram::new(4 * MIB))));
        threads.map(|thread| thread.join().unwrap())
    });
    let mut text = String::from(INTRO);
    for (tech, rows) in TECHS.into_iter().zip(tables) {
        write!(text, "\n## {tech}\n\n").unwrap();
        text += "| fails | calls | shows in | leaks |\n|---|---|---|---|\n";
        for [operation, calls, step, leaks] in rows {
            writeln!(text, "| {operation} | {calls} | {step} | {leaks} |").unwrap();
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/sev-failures.md");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let documented = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        text == documented,
        "docs/sev-failures.md differs; now it is:\n{text}"
    );
}

#[test]
fn transient_codes_of_the_rmp_are_tried_again_and_not_seen() {
    let ram = Ram::new(4 * MIB);
    let (host, plan) = worn_host();
    for (instruction, codes) in [
        (FaultPlan::RMPUPDATE, &[3, 4][..]),
        (FaultPlan::PSMASH, &[3][..]),
    ] {
        for code in codes {
            plan.arm(Fault::nth(1).times(9).of(instruction).status(*code));
            let life = life(&host, Tech::SevSnp, &ram);
            assert!(life.stopped.is_none() && life.leaks.is_empty());
            assert!(plan.disarm(), "nine calls failed");
        }
    }
    common::nothing_left(host.inner());
    let ends = sp(host.inner()).counters().calls(Command::SNP_DECOMMISSION);
    assert_eq!(ends, 4);
}

#[test]
fn a_vm_port_that_fails_loses_nothing_that_the_report_does_not_list() {
    let calls = [
        ("create_vcpu", FaultPlan::CREATE_VCPU),
        ("set_memory_slot", FaultPlan::SET_SLOT),
        ("close", FaultPlan::CLOSE),
        ("bind_asid", FaultPlan::BIND_ASID),
        ("map_encrypted", FaultPlan::MAP_ENCRYPTED),
        ("set_shared", FaultPlan::SET_SHARED),
    ];
    let ram = Ram::new(4 * MIB);
    for (name, call) in calls {
        let mut happened = 0;
        for (tech, nth) in TECHS.into_iter().flat_map(|t| (1..=3).map(move |n| (t, n))) {
            let what = format!("{tech}, call {nth} of {name}");
            let (host, plan) = worn_host();
            let error = Error::NoMemory;
            plan.arm(Fault::nth(nth).of(call).error(error));
            let first = life(&host, tech, &ram);
            if !plan.disarm() {
                continue; // A life has fewer calls of this kind.
            }
            happened += 1;
            if let Some((_, stopped)) = first.stopped {
                assert_eq!(stopped, error, "{what}");
            }
            let pages = first
                .leaks
                .iter()
                .filter(|leak| matches!(leak.what, Leaked::Page(_)));
            assert_eq!(first.leaked_frames, pages.count() as u64, "{what}");
            let keys = first
                .leaks
                .iter()
                .filter(|leak| matches!(leak.what, Leaked::Key(_)));
            let pools = host.psp().unwrap().asid_pools();
            assert_eq!(pools.in_use(), keys.count() as u32, "{what}");
            let vms = first.leaks.iter();
            let vms = vms.filter(|leak| matches!(leak.what, Leaked::Vm(_)));
            assert!(
                host.inner().live_vms() <= vms.count(),
                "{what}: a VM is left and not listed"
            );
            if pools.in_use() == 0 {
                let next = life(&host, tech, &ram);
                assert!(
                    next.stopped.is_none() && next.leaks.is_empty(),
                    "{what}: {:?}",
                    next.stopped
                );
            }
        }
        assert_ne!(happened, 0, "{name} is never called");
    }
}
