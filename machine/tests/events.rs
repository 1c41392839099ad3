//! The log of a VM's life: spans of the VM and of each vCPU, an event for each step at debug, for each
//! SEAMCALL, SP command and RMP instruction at trace with operands and status by name, and for each
//! failure at warn or error with everything named.

#[path = "support/log.rs"]
mod log;

use std::sync::Arc;

use kvm_ops::guest::Script;
use kvm_ops::sim::SimHost;
use kvm_ops::{Fault, FaultPlan, Gpa, Host, InjectedHost, Kind, Level, PspPort, Tech};
use kvm_ops_machine::{
    ConsoleSink, LaunchPage, LaunchStep, Machine, MachineConfig, RunLimits, RunReport,
};
use log::{has, log_of};

const PAGE: Gpa = Gpa::new(0x3000);

/// The address by which a guest means private memory.
fn private(tech: Tech, gpa: Gpa) -> Gpa {
    match tech {
        Tech::Tdx => gpa,
        _ => Gpa::new(gpa.get() | 1 << 51),
    }
}

/// A whole life: a measured page, a run that reads it and another, the teardown.
fn life(tech: Tech, plan: &Arc<FaultPlan>) -> RunReport {
    let host = SimHost::new(tech.vendor().expect("a technology of this project"));
    let host = InjectedHost::new(host, Arc::clone(plan));
    let second = Gpa::new(0x8000);
    let program = Script::new()
        .read(private(tech, PAGE), 1)
        .accept(second, Level::Size4K)
        .read(private(tech, second), 1)
        .halt();
    let page = LaunchPage::measured(PAGE, Box::new([0xa5; 4096]));
    let config = MachineConfig::new()
        .kind(Kind::Of(tech))
        .memory(4 << 20)
        .launch([LaunchStep::Add(page)])
        .program(program);
    let mut machine = Machine::build(&host, config).expect("a machine");
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, RunLimits::none()).expect("a run");
    drop(machine.destroy());
    report
}

#[track_caller]
fn is_quiet(log: &[String]) {
    let loud: Vec<_> = log
        .iter()
        .filter(|line| line.starts_with("WARN") || line.starts_with("ERROR"))
        .collect();
    assert!(loud.is_empty(), "{loud:#?}");
}

#[test]
fn a_td_logs_its_steps_and_each_seamcall_with_operands_and_status() {
    let log = log_of(|| {
        let report = life(Tech::Tdx, &Arc::default());
        assert!(!report.is_failure(), "{report}");
    });
    is_quiet(&log);
    let vm = "vm=1}";
    for step in [
        "vm_init",
        "TD created and initialised technology=\"tdx\" vm=1 key=",
        "vCPU created technology=\"tdx\" vm=1 vcpu=0",
        "measurement closed",
        "key released",
        "private pages given back",
        "torn down",
    ] {
        has(&log, &["DEBUG", step]);
    }
    for (seamcall, operand) in [
        ("TDH.MNG.CREATE", "rdx=0x"),
        ("TDH.MNG.INIT", "rcx=0x"),
        ("TDH.VP.INIT", "rcx=0x"),
        ("TDH.MEM.PAGE.ADD", "rcx=0x3000"),
        ("TDH.MR.EXTEND", "rcx=0x3f00"),
        ("TDH.MR.FINALIZE", "rcx=0x"),
        ("TDH.MNG.KEY.FREEID", "rcx=0x"),
        ("TDH.PHYMEM.PAGE.RECLAIM", "rcx=0x"),
    ] {
        let call = format!("seamcall=\"{seamcall}\"");
        has(
            &log,
            &["TRACE", vm, &call, operand, "status=TDX_SUCCESS (0x"],
        );
    }
    has(
        &log,
        &[
            "TRACE",
            "vm{technology=tdx vm=1}:tdx{operation=\"vm_finalize\" vm=1}",
        ],
    );
    let vcpu = "vcpu{technology=tdx vm=1 vcpu=0}:vcpu_run{technology=\"tdx\" vm=1 vcpu=0}";
    has(
        &log,
        &["TRACE", vcpu, "seamcall=\"TDH.VP.ENTER\"", "exit_reason="],
    );
    has(
        &log,
        &["TRACE", vcpu, "seamcall=\"TDH.MEM.PAGE.AUG\"", "rcx=0x8000"],
    );
    has(
        &log,
        &["TRACE", "vcpu{technology=tdx vm=1 vcpu=0}", "exit exit=Hlt"],
    );
}

#[test]
fn sev_guests_log_their_steps_and_each_command_and_rmp_instruction_with_its_status() {
    for (tech, commands) in [
        (
            Tech::Sev,
            [
                "LAUNCH_START",
                "ACTIVATE",
                "LAUNCH_UPDATE_DATA",
                "DECOMMISSION",
            ],
        ),
        (
            Tech::SevSnp,
            [
                "SNP_LAUNCH_START",
                "SNP_ACTIVATE",
                "SNP_LAUNCH_UPDATE",
                "SNP_DECOMMISSION",
            ],
        ),
    ] {
        let log = log_of(|| {
            life(tech, &Arc::default());
        });
        is_quiet(&log);
        // The VM's first span is that of its initialisation.
        let vm = "vm=1";
        for step in [
            "ASID leased",
            "launch started",
            "vCPU created",
            "launch finished",
            "key given up",
            "private pages given back",
            "torn down",
        ] {
            has(&log, &["DEBUG", vm, step]);
        }
        for command in commands {
            let command = format!("command=\"{command}\"");
            has(&log, &["TRACE", vm, &command, "status=SUCCESS (0x0)"]);
        }
        let vcpu = format!("vcpu_run{{technology={tech} vm=1 vcpu=0}}");
        has(
            &log,
            &["TRACE", &format!("vcpu{{technology={tech} vm=1 vcpu=0}}")],
        );
        if tech == Tech::SevSnp {
            let update = [
                "TRACE",
                &vcpu,
                "instruction=\"RMPUPDATE\"",
                "page=0x",
                "SUCCESS",
            ];
            has(&log, &update);
        }
    }
}

#[test]
fn a_failure_that_ends_a_vm_is_an_error_with_everything_named() {
    let plan = Arc::new(FaultPlan::new());
    const PAGE_AUG: u64 = 6;
    plan.arm(Fault::nth(1).of(PAGE_AUG).status(0xc000_0b0d_0000_0001));
    let mut said = String::new();
    let log = log_of(|| said = life(Tech::Tdx, &plan).to_string());
    assert!(said.contains("TDX_EPT_ENTRY_STATE_INCORRECT"), "{said}");
    has(&log, &["ERROR", "vcpu{technology=tdx vm=1 vcpu=0}", &said]);
}

#[test]
fn an_exhausted_pool_of_keys_is_a_warning_with_the_way_to_more() {
    for tech in [Tech::Tdx, Tech::SevSnp] {
        let log = log_of(|| {
            let host = SimHost::new(tech.vendor().expect("a vendor"));
            let (mut keys, mut asids) = (Vec::new(), Vec::new());
            if let Some(seam) = host.seam() {
                let pool = kvm_ops::SeamPort::key_ids(seam);
                keys.extend(std::iter::from_fn(|| pool.lease().ok()));
            }
            if let Some(psp) = host.psp() {
                let lease = || psp.asid_pools().lease(tech, || (), || Ok(())).ok();
                asids.extend(std::iter::from_fn(lease));
            }
            let config = MachineConfig::new().kind(Kind::Of(tech)).memory(1 << 20);
            assert!(Machine::build(&host, config).is_err());
        });
        has(
            &log,
            &["WARN", tech.name(), "vm=1", "no free KeyID or ASID", "give"],
        );
    }
}
