//! Each way in which a VM can end says technology, VM, vCPU, address, access, firmware call and status
//! by name, and what to do, through the public interface, on the software platform.

use std::error::Error as _;
use std::sync::Arc;

use kvm_ops::guest::Script;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AnyVm, Error, Events, Fault, FaultPlan, Gpa, Host, InjectedHost, Kind, Privacy, PspPort,
    SeamPort, Tech, VcpuId, Vm,
};
use kvm_ops_machine::{
    ConsoleSink, End, LaunchPage, LaunchStep, Machine, MachineConfig, MachineError, RunLimits,
    RunReport,
};

const MIB: u64 = 1 << 20;
const PAGE: Gpa = Gpa::new(0x3000);

type TestHost = InjectedHost<SimHost>;

/// A host whose calls fail as the plan says.
fn host(tech: Tech) -> (TestHost, Arc<FaultPlan>) {
    let plan = Arc::new(FaultPlan::new());
    let vendor = tech.vendor().expect("a technology of this project");
    (
        InjectedHost::new(SimHost::new(vendor), Arc::clone(&plan)),
        plan,
    )
}

fn config(tech: Tech, program: Script) -> MachineConfig {
    MachineConfig::new()
        .kind(Kind::Of(tech))
        .memory(4 * MIB)
        .program(program)
}

/// The address by which a guest means private memory: with the C-bit for a SEV guest.
fn private(tech: Tech, gpa: Gpa) -> Gpa {
    match tech {
        Tech::Tdx => gpa,
        _ => Gpa::new(gpa.get() | 1 << 51),
    }
}

/// Runs the program; `prepare` gets the machine and the plan before.
fn run(
    tech: Tech,
    program: Script,
    prepare: impl FnOnce(&mut Machine<TestHost>, &FaultPlan),
) -> RunReport {
    let (host, plan) = host(tech);
    let mut machine = Machine::build(&host, config(tech, program)).expect("a machine");
    prepare(&mut machine, &plan);
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, RunLimits::none()).expect("a run");
    plan.disarm();
    drop(machine.destroy());
    report
}

/// The error with its causes, without those that the text before says already, as `kvm-ops` prints it.
fn chain(error: &MachineError) -> String {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !texts.last().is_some_and(|last| last.contains(&text)) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts.join(": ")
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
    assert!(!text.ends_with('.') && !text.contains('\n'), "{text}");
}

#[test]
fn an_unaccepted_page_names_vcpu_address_and_the_call_that_accepts() {
    let report = run(Tech::Tdx, Script::new().read(PAGE, 1), |_, _| ());
    assert_eq!(report.end, End::Failed(Error::Poisoned));
    assert_eq!(
        report.to_string(),
        format!(
            "tdx VM {}, vCPU 0, private access at 0x3000: the guest uses a page that it has not \
             accepted, with #VE disabled; the guest must accept the page first with \
             TDG.MEM.PAGE.ACCEPT, or share it with MapGPA; the TD is poisoned: destroy it",
            report.vm
        )
    );
    let why = report.diagnosis().expect("a failure");
    assert_eq!(why.access, Some((PAGE, Privacy::Private)));
    assert_eq!((why.tech, why.vcpu), (Tech::Tdx, Some(VcpuId(0))));
}

/// The program ends at its first access, which the plan lets fail.
#[test]
fn a_seamcall_that_poisons_a_running_td_is_named_with_its_status_and_operand() {
    const PAGE_AUG: u64 = 6;
    const STATUS: u64 = 0xc000_0b0d_0000_0001;
    let report = run(Tech::Tdx, Script::new().read(PAGE, 1), |_, plan| {
        plan.arm(Fault::nth(1).of(PAGE_AUG).status(STATUS));
    });
    assert_eq!(report.end, End::Failed(Error::Firmware(STATUS)));
    assert_eq!(
        report.to_string(),
        format!(
            "tdx VM {}, vCPU 0, private access at 0x3000: TDH.MEM.PAGE.AUG answered \
             TDX_EPT_ENTRY_STATE_INCORRECT (0xc0000b0d00000001) because of RCX; the TD is poisoned: \
             destroy it",
            report.vm
        )
    );
}

#[test]
fn a_td_that_the_module_gave_up_is_named_with_the_status_of_its_entry() {
    const VP_ENTER: u64 = 0;
    const TD_FATAL: u64 = 0xe000_0604_0000_0000;
    let report = run(Tech::Tdx, Script::new().halt(), |_, plan| {
        plan.arm(Fault::nth(1).of(VP_ENTER).status(TD_FATAL));
    });
    assert!(matches!(report.end, End::InternalError { suberror: 4, .. }));
    says(
        &report.to_string(),
        &[
            "tdx VM",
            "vCPU 0",
            "TDH.VP.ENTER answered TDX_TD_FATAL (0xe000060400000000)",
            "the TD ended",
            "destroy it",
        ],
    );
}

#[test]
fn a_failure_of_one_vcpu_explains_what_the_others_are_refused() {
    let (host, _) = host(Tech::Tdx);
    let config = config(Tech::Tdx, Script::new().read(PAGE, 1)).vcpus(2);
    let mut machine = Machine::build(&host, config).expect("a machine");
    let devices = machine.devices(ConsoleSink::discard());
    machine.run(&devices, RunLimits::none()).expect("a run");
    let other = VcpuId(1);
    let refused = machine.vcpu_mut(other).expect("a vCPU").vcpu_run();
    assert_eq!(refused, Err(Error::Poisoned));
    let why = machine.vm().explain(Error::Poisoned);
    assert_eq!(why.vcpu, Some(VcpuId(0)), "the vCPU that poisoned the TD");
    let program = Box::new(Script::new().halt());
    let error = machine.load_program(other, program).unwrap_err();
    says(
        &chain(&error),
        &[
            "program of vCPU 1: tdx VM ",
            ", vCPU 0, ",
            "0x3000",
            "TDG.MEM.PAGE.ACCEPT",
        ],
    );
    drop(machine.destroy());
}

#[test]
fn a_refused_rmp_update_names_the_instruction_its_code_and_the_touched_page() {
    let program = Script::new().read(private(Tech::SevSnp, PAGE), 1);
    let report = run(Tech::SevSnp, program, |_, plan| {
        // FAIL_OVERLAP, for as long as the back end tries.
        let overlap = Fault::nth(1).of(FaultPlan::RMPUPDATE).status(4);
        plan.arm(overlap.times(u64::from(u16::MAX)));
    });
    assert!(matches!(report.end, End::Failed(Error::Firmware(_))));
    assert_eq!(
        report.to_string(),
        format!(
            "sev-snp VM {}, vCPU 0, private access at 0x3000: the page that the guest touched could \
             not be given to it: RMPUPDATE answered FAIL_OVERLAP (0x4); split the large page first \
             (PSMASH), or take the pages in it back",
            report.vm
        )
    );
}

#[test]
fn memory_that_runs_out_under_a_guest_names_the_touched_page() {
    for tech in [Tech::Tdx, Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        let program = Script::new().read(private(tech, PAGE), 1);
        let report = run(tech, program, |_, plan| {
            plan.arm(Fault::nth(1).of(FaultPlan::ALLOC).error(Error::NoMemory));
        });
        assert_eq!(report.end, End::Failed(Error::NoMemory), "{tech}");
        let parts = [
            tech.name(),
            "vCPU 0, private access at 0x3000: the page that the guest touched could not be given",
            "out of memory; give the host more memory",
        ];
        says(&report.to_string(), &parts);
    }
}

#[test]
fn an_access_outside_of_the_memory_names_address_access_and_vcpu() {
    let outside = Gpa::new(0x4000_0000);
    for tech in [Tech::Tdx, Tech::Sev, Tech::SevSnp] {
        let report = run(
            tech,
            Script::new().read(private(tech, outside), 1),
            |_, _| (),
        );
        let access = Privacy::Private;
        assert_eq!(
            report.end,
            End::MemoryFault {
                gpa: outside,
                access
            },
            "{tech}"
        );
        says(
            &report.to_string(),
            &[
                &format!("{tech} VM {}, vCPU 0", report.vm),
                "private access at 0x40000000",
                "no memory of the VM is there",
                "give the VM memory there",
            ],
        );
    }
}

#[test]
fn a_triple_fault_names_technology_and_vm_and_is_no_failure_of_the_platform() {
    let report = run(Tech::Vmx, Script::new().halt(), |machine, _| {
        let vcpu = machine.vcpu_mut(VcpuId(0)).expect("a vCPU");
        let triple_fault = Events {
            triple_fault: true,
            ..Events::default()
        };
        vcpu.set_events(&triple_fault).expect("events");
    });
    assert_eq!((&report.end, report.is_failure()), (&End::Shutdown, false));
    assert_eq!(
        report.to_string(),
        format!("vmx VM {}: shut down", report.vm)
    );
}

#[test]
fn a_guest_that_left_is_an_end_of_its_own_and_no_failure() {
    for tech in [Tech::Tdx, Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        let host = SimHost::new(tech.vendor().expect("a technology of this project"));
        let build = |config| Machine::build(&host, config).expect("a machine");
        let program = Script::new().print(0x3f8, "not here");
        let mut from = build(config(tech, program));
        let empty = MachineConfig::new().kind(Kind::Of(tech)).memory(4 * MIB);
        let mut to = build(empty.awaits_guest(true));
        from.move_to(&mut to).expect("a move");
        let devices = from.devices(ConsoleSink::discard());
        let report = from.run(&devices, RunLimits::none()).expect("a run");
        assert_eq!((&report.end, report.is_failure()), (&End::Left, false));
        assert_eq!(report.diagnosis(), None);
        let vm = report.vm;
        assert_eq!(
            report.to_string(),
            format!("{tech} VM {vm}: the guest left")
        );
        assert!(from.vm().explain(Error::Poisoned).gone);
        assert!(from.destroy().is_clean() && to.destroy().is_clean());
    }
}

/// The kinds of key that a host runs out of.
#[test]
fn an_exhausted_pool_of_keys_names_the_technology_and_the_way_to_more() {
    for (tech, way) in [
        (Tech::Tdx, "private KeyIDs"),
        (Tech::Sev, "minimum SEV ASID"),
        (Tech::SevEs, "minimum SEV ASID"),
        (Tech::SevSnp, "minimum SEV ASID"),
    ] {
        let (host, _) = host(tech);
        let mut keys = Vec::new();
        let mut asids = Vec::new();
        match tech {
            Tech::Tdx => {
                let pool = host.seam().expect("a TDX module").key_ids();
                keys.extend(std::iter::from_fn(|| pool.lease().ok()));
            }
            _ => {
                let pools = host.psp().expect("an AMD SP").asid_pools();
                let lease = || pools.lease(tech, || (), || Ok(())).ok();
                asids.extend(std::iter::from_fn(lease));
            }
        }
        assert!(keys.len() + asids.len() > 1, "{tech}");
        let error = Machine::build(&host, config(tech, Script::new())).unwrap_err();
        let MachineError::Create(failed) = &error else {
            panic!("{error:?}")
        };
        assert_eq!(failed.error, Error::NoKeyId, "{tech}");
        says(
            &chain(&error),
            &[
                "cannot create the VM",
                tech.name(),
                "no free KeyID or ASID",
                way,
            ],
        );
        says(error.hint().expect("a hint"), &["destroy another", way]);
    }
}

/// A TD whose life makes every call of the list once.
fn whole_life(host: &TestHost) -> Result<RunReport, MachineError> {
    let page = LaunchPage::measured(PAGE, Box::new([0xa5; 4096]));
    let config = config(Tech::Tdx, Script::new().read(PAGE, 1).halt());
    let mut machine = Machine::build(host, config.launch([LaunchStep::Add(page)]))?;
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, RunLimits::none());
    drop(machine.destroy());
    report
}

#[test]
fn a_seamcall_refused_at_any_step_of_a_life_is_named_with_its_status() {
    const REFUSED: u64 = 0xc000_0100_0000_0002;
    const BUILDING: [(u64, &str); 11] = [
        (9, "TDH.MNG.CREATE"),
        (8, "TDH.MNG.KEY.CONFIG"),
        (1, "TDH.MNG.ADDCX"),
        (21, "TDH.MNG.INIT"),
        (10, "TDH.VP.CREATE"),
        (4, "TDH.VP.ADDCX"),
        (22, "TDH.VP.INIT"),
        (3, "TDH.MEM.SEPT.ADD"),
        (2, "TDH.MEM.PAGE.ADD"),
        (16, "TDH.MR.EXTEND"),
        (17, "TDH.MR.FINALIZE"),
    ];
    for (leaf, name) in BUILDING {
        let (host, plan) = host(Tech::Tdx);
        plan.arm(Fault::nth(1).of(leaf).status(REFUSED));
        let error = whole_life(&host).expect_err(name);
        let answer =
            format!("{name} answered TDX_OPERAND_INVALID (0xc000010000000002) because of RDX");
        says(&chain(&error), &["cannot ", "tdx VM ", &answer, "; "]);
        assert_eq!(plan.happened(), 1, "{name}");
    }
}

#[test]
fn a_seamcall_refused_in_the_teardown_is_named_in_the_leaks_that_it_causes() {
    for (leaf, name) in [
        (18, "TDH.VP.FLUSH"),
        (19, "TDH.MNG.VPFLUSHDONE"),
        (40, "TDH.PHYMEM.CACHE.WB"),
        (20, "TDH.MNG.KEY.FREEID"),
        (28, "TDH.PHYMEM.PAGE.RECLAIM"),
    ] {
        let (host, plan) = host(Tech::Tdx);
        let program = Script::new().halt();
        let mut machine = Machine::build(&host, config(Tech::Tdx, program)).expect("a machine");
        let devices = machine.devices(ConsoleSink::discard());
        machine.run(&devices, RunLimits::none()).expect("a run");
        let refused = Fault::nth(1).of(leaf).status(0xc000_0100_0000_0001);
        plan.arm(refused.times(u64::from(u16::MAX)));
        let report = machine.destroy();
        assert!(!report.is_clean(), "{name}");
        assert!(
            report.leaks.iter().all(|leak| leak.operation == name),
            "{report:?}"
        );
    }
}

#[test]
fn a_command_refused_at_any_step_of_a_launch_is_named_with_its_status() {
    const INVALID_GUEST_STATE: u64 = 2;
    let legacy: &[(u64, &str)] = &[
        (0x30, "LAUNCH_START"),
        (0x21, "ACTIVATE"),
        (0x31, "LAUNCH_UPDATE_DATA"),
        (0x33, "LAUNCH_MEASURE"),
        (0x35, "LAUNCH_FINISH"),
    ];
    let es: &[(u64, &str)] = &[(0x32, "LAUNCH_UPDATE_VMSA")];
    let snp: &[(u64, &str)] = &[
        (0x93, "SNP_GCTX_CREATE"),
        (0xa0, "SNP_LAUNCH_START"),
        (0x91, "SNP_ACTIVATE"),
        (0xa1, "SNP_LAUNCH_UPDATE"),
        (0xa2, "SNP_LAUNCH_FINISH"),
    ];
    for (tech, commands) in [
        (Tech::Sev, legacy),
        (Tech::SevEs, legacy),
        (Tech::SevEs, es),
        (Tech::SevSnp, snp),
    ] {
        for (id, name) in commands {
            let (host, plan) = host(tech);
            plan.arm(Fault::nth(1).of(*id).status(INVALID_GUEST_STATE));
            let page = LaunchPage::measured(PAGE, Box::new([0xa5; 4096]));
            let config = config(tech, Script::new().halt()).launch([LaunchStep::Add(page)]);
            let error = Machine::build(&host, config).expect_err(name);
            let answer = format!("{name} answered INVALID_GUEST_STATE (0x2)");
            let who = format!("{tech} VM ");
            says(
                &chain(&error),
                &["cannot ", &who, &answer, "check the order of the calls"],
            );
            assert_eq!(plan.happened(), 1, "{tech} {name}");
        }
    }
}

#[test]
fn a_vm_explains_an_error_that_it_does_not_remember_by_the_error_alone() {
    let (host, _) = host(Tech::Tdx);
    let machine = Machine::build(&host, config(Tech::Tdx, Script::new())).expect("a machine");
    let vm: &Vm<AnyVm<TestHost>> = machine.vm();
    let text = vm
        .explain(Error::Firmware(0x8000_0200_0000_0092))
        .to_string();
    says(
        &text,
        &["TDX_OPERAND_BUSY (0x8000020000000092) because of SEPT_TREE"],
    );
    assert!(machine.destroy().is_clean());
}

/// Ends for the manual: each line as a program prints it.
fn lines() -> Vec<String> {
    let poisons = |_: &mut Machine<TestHost>, plan: &FaultPlan| {
        plan.arm(Fault::nth(1).of(6).status(0xc000_0b0d_0000_0001));
    };
    let overlaps = |_: &mut Machine<TestHost>, plan: &FaultPlan| {
        let overlap = Fault::nth(1).of(FaultPlan::RMPUPDATE).status(4);
        plan.arm(overlap.times(u64::from(u16::MAX)));
    };
    let read = |tech, gpa| Script::new().read(private(tech, gpa), 1);
    let outside = Gpa::new(0x4000_0000);
    let refused = |tech, call, status| {
        let (host, plan) = host(tech);
        plan.arm(Fault::nth(1).of(call).status(status));
        let built = Machine::build(&host, config(tech, Script::new().halt()));
        chain(&built.map(drop).unwrap_err())
    };
    let (empty, _) = host(Tech::Tdx);
    let pool = empty.seam().expect("a TDX module").key_ids();
    let _leases: Vec<_> = std::iter::from_fn(|| pool.lease().ok()).collect();
    let exhausted = Machine::build(&empty, config(Tech::Tdx, Script::new())).map(drop);
    vec![
        run(Tech::Tdx, read(Tech::Tdx, PAGE), |_, _| ()).to_string(),
        run(Tech::Tdx, read(Tech::Tdx, PAGE), poisons).to_string(),
        run(Tech::SevSnp, read(Tech::SevSnp, PAGE), overlaps).to_string(),
        run(Tech::Sev, read(Tech::Sev, outside), |_, _| ()).to_string(),
        refused(Tech::Tdx, 17, 0xc000_0608_0000_0000),
        refused(Tech::SevSnp, 0xa2, 0x7),
        chain(&exhausted.unwrap_err()),
    ]
}

/// `BLESS=1` writes them.
#[test]
fn the_manual_shows_these_texts() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/when-a-vm-ends.md");
    let text = std::fs::read_to_string(page).expect("the page");
    let fence = "```text\n";
    let start = text.find(fence).expect("a block") + fence.len();
    let end = start + text[start..].find("```").expect("the end of the block");
    let block = lines().join("\n\n") + "\n";
    if std::env::var_os("BLESS").is_some() {
        let new = [&text[..start], &block, &text[end..]].concat();
        std::fs::write(page, new).expect("the page can be written");
    } else {
        assert_eq!(&text[start..end], block, "BLESS=1 writes the page");
    }
}
