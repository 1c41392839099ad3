//! The software machine's SEV side by itself: what comes up, and what its guests' VMGEXITs, page
//! validation and accesses come to without a back end.
#![cfg(feature = "sev")]

#[allow(dead_code)] // Each test file uses its part.
mod common;

use std::sync::{Arc, Mutex};

use kvm_ops_core::guest::{Action, FnProgram, GuestFault, Outcome, Script};
use kvm_ops_core::{
    Answer, Asid, Error, Exit, Gfn, Gpa, Host, Level, NestedFaultAnswer, NestedFaults, PagePort,
    Privacy, PspPort, SevPort, SharedMask, Tech, VcpuId, VcpuOps, Vendor, VmParams, VmPort,
};
use kvm_ops_sim::{BuildStage, SevSetup, SimHost, SimVm};
use soft_amd_sp::{Platform, Status};

const C: u64 = 1 << 51;

fn host() -> SimHost {
    let platform = Platform::builder().memory(16 << 20).seed(1);
    SimHost::builder(Vendor::Amd).sev(platform).build().unwrap()
}

fn mask() -> SharedMask {
    SharedMask::private_bit(51).unwrap()
}

fn vm(host: &SimHost, tech: Tech) -> SimVm {
    let vm = host.create_vm(tech, &VmParams::new(1)).unwrap();
    vm.bind_asid(Some(Asid(1)), mask()).unwrap();
    vm
}

/// Runs one action and answers what it came to, if it did not leave.
fn outcome(vm: &SimVm, action: Action<'static>) -> std::result::Result<String, String> {
    let told = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&told);
    let mut first = true;
    let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let program = FnProgram(move |last: Outcome<'_>| {
        if std::mem::take(&mut first) {
            return action;
        }
        *seen.lock().unwrap() = Some(format!("{last:?}"));
        Action::Shutdown
    });
    common::load(&mut vcpu, program);
    let exit = vcpu.vcpu_run();
    let exit = exit.map(|exit| format!("{exit:?} {:?}", vcpu.exit_data()));
    let told = told.lock().unwrap().take();
    told.ok_or_else(|| exit.unwrap_or_else(|error| error.to_string()))
}

#[test]
fn firmware_comes_up_when_it_is_first_asked_for_and_not_on_intel() {
    let host = SimHost::new(Vendor::Amd);
    let (highest, first) = host.psp().unwrap().asids();
    assert_eq!((highest, first), (509, 100));
    assert!(host.psp().unwrap().asid_pools().has_snp());
    assert!(host.pages().is_some() && host.sev_platform().is_some());
    let intel = SimHost::new(Vendor::Intel);
    assert!(intel.psp().is_none() && intel.sev_platform().is_none());
}

#[test]
fn machines_that_make_no_sense_are_refused_with_the_reason() {
    let build = |setup: SevSetup| {
        SimHost::builder(Vendor::Amd)
            .sev(setup)
            .build()
            .unwrap_err()
    };
    let odd = build(Platform::builder().memory(1).into());
    assert_eq!(odd.stage(), BuildStage::Machine, "{odd}");
    assert!(std::error::Error::source(&odd).is_some());
    // No room for the trusted memory region.
    let small = build(Platform::builder().memory(2 << 20).into());
    assert_eq!(small.stage(), BuildStage::Firmware, "{small}");
    let split = build(SevSetup::new(Platform::builder()).ciphertext_hiding(0));
    let cause = std::error::Error::source(&split).and_then(|cause| cause.downcast_ref());
    assert_eq!(cause, Some(&Status::INVALID_PARAM));
}

#[test]
fn a_normal_vm_has_no_encrypted_side() {
    let host = host();
    let vm = host.create_vm(Tech::Svm, &VmParams::new(1)).unwrap();
    assert!(vm.sev().is_none() && vm.td().is_none());
    let faults = outcome(&vm, Action::GhcbMsr { value: 2 });
    assert_eq!(
        faults.unwrap(),
        format!("{:?}", Outcome::Fault(GuestFault::NotOffered))
    );
}

#[test]
fn mappings_are_aligned_to_their_level() {
    let host = host();
    let vm = vm(&host, Tech::SevSnp);
    let pages = host.pages().unwrap();
    let [small, large] = [Level::Size4K, Level::Size2M].map(|level| pages.alloc(level).unwrap());
    let map = |gfn, level, page| {
        let done = vm.map_encrypted(Gfn::new(gfn), level, Some(page));
        done.map_err(|error| error.errno())
    };
    assert_eq!(map(512, Level::Size2M, &large), Ok(()));
    assert_eq!(map(513, Level::Size2M, &large), Err(22));
    assert_eq!(map(512, Level::Size2M, &small), Err(22));
    assert_eq!(map(0, Level::Size1G, &large), Err(22));
}

#[test]
fn the_ghcb_msr_protocol_is_answered_as_kvm_answers_it() {
    let host = host();
    let value = |value: u64| Ok(format!("{:?}", Outcome::Value(value)));
    let event = |msr: u64| {
        let exit = Exit::SystemEvent { kind: 6 };
        Err(format!("{exit:?} {:?}", msr.to_ne_bytes()))
    };
    // Request, answer to an SNP guest, answer to a SEV-ES guest.
    let info = 2 << 48 | 1 << 32 | 51 << 24 | 1;
    let table = [
        (0x002, value(info), value(info)),
        (0x004, value(0x005), value(0x005)),
        (0x010, value(u64::MAX << 12 | 0x011), event(0x010)),
        (0x5012, value(0x5013), event(0x5012)),
        (0x080, value(3 << 12 | 0x081), value(0x081)),
        (0x100, event(0x100), event(0x100)),
        (0x2_1100, event(0x2_1100), event(0x2_1100)),
        (0xabc, value(0xabc), value(0xabc)),
        (
            3 << 52 | 0x014,
            value(1 << 63 | 0x015),
            event(3 << 52 | 0x014),
        ),
    ];
    for (request, snp, es) in table {
        let action = Action::GhcbMsr { value: request };
        assert_eq!(
            outcome(&vm(&host, Tech::SevSnp), action),
            snp,
            "{request:#x}"
        );
        assert_eq!(outcome(&vm(&host, Tech::SevEs), action), es, "{request:#x}");
        let none = Ok(format!("{:?}", Outcome::Fault(GuestFault::NotOffered)));
        assert_eq!(outcome(&vm(&host, Tech::Sev), action), none);
    }
}

#[test]
fn a_page_state_change_by_msr_asks_the_host_and_tells_its_answer() {
    let host = host();
    for (answer, msr) in [(0, 0x015), (22, 1 << 63 | 0x015)] {
        let vm = vm(&host, Tech::SevSnp);
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&told);
        let program = FnProgram(move |last: Outcome<'_>| match last {
            Outcome::Start { .. } => Action::GhcbMsr {
                value: 2 << 52 | 0x7000 | 0x014,
            },
            other => {
                seen.lock().unwrap().push(format!("{other:?}"));
                Action::Shutdown
            }
        });
        common::load(&mut vcpu, program);
        let request = Exit::MapGpaRange {
            gpa: Gpa::new(0x7000),
            pages: 1,
            to: Privacy::Shared,
        };
        assert_eq!(vcpu.vcpu_run(), Ok(request));
        vcpu.answer(Answer::Value(answer)).unwrap();
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
        assert_eq!(
            *told.lock().unwrap(),
            [format!("{:?}", Outcome::Value(msr))]
        );
    }
}

#[test]
fn conversions_that_a_host_refuses_fault_with_its_errno() {
    let host = host();
    for tech in [Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        let vm = vm(&host, tech);
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        let script = Script::new().share(Gpa::new(0x1000), 2).halt();
        common::load(&mut vcpu, script);
        assert!(matches!(vcpu.vcpu_run(), Ok(Exit::MapGpaRange { .. })));
        vcpu.answer(Answer::Value(22)).unwrap();
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Hlt));
    }
    let bad = format!("{:?}", Outcome::Fault(GuestFault::BadOperand));
    for (gpa, pages) in [(1, 1), (0, 0), (0, u64::MAX), (1 << 48, 1), (0, 1 << 37)] {
        let gpa = Gpa::new(gpa);
        let got = outcome(&vm(&host, Tech::SevEs), Action::Share { gpa, pages });
        assert_eq!(got, Ok(bad.clone()), "{gpa} {pages}");
    }
}

struct Answers(NestedFaultAnswer);

impl NestedFaults for Answers {
    fn private_fault(&self, _: Gfn) -> NestedFaultAnswer {
        self.0
    }

    fn shared_fault(&self, _: Gfn) -> NestedFaultAnswer {
        self.0
    }

    fn size_mismatch(&self, _: Gfn) -> NestedFaultAnswer {
        self.0
    }
}

#[test]
fn a_private_fault_leaves_or_fails_as_the_back_end_says() {
    let host = host();
    for tech in [Tech::Sev, Tech::SevEs, Tech::SevSnp] {
        let read = Action::Read {
            gpa: Gpa::new(C | 0x1008),
            len: 1,
        };
        let vm = vm(&host, tech);
        let left = Exit::MemoryFault {
            gpa: Gpa::new(0x1000),
            bytes: 4096,
            access: Privacy::Private,
        };
        assert_eq!(
            outcome(&vm, read),
            Err(format!("{left:?} []")),
            "{tech}: no back end to ask"
        );
        let vm = self::vm(&host, tech);
        let failing = Answers(NestedFaultAnswer::Fail(Error::NoMemory));
        vm.handle_nested_faults(Some(Arc::new(failing))).unwrap();
        assert_eq!(outcome(&vm, read), Err(Error::NoMemory.to_string()));
    }
}

#[test]
fn an_access_through_an_asid_that_no_guest_has_fails_the_run() {
    let host = host();
    let vm = vm(&host, Tech::Sev);
    let page = host.pages().unwrap().alloc(Level::Size4K).unwrap();
    vm.map_encrypted(Gfn::new(1), Level::Size4K, Some(&page))
        .unwrap();
    let (gpa, len) = (Gpa::new(C | 0x1000), 1);
    let error = outcome(&vm, Action::Read { gpa, len }).unwrap_err();
    assert!(error.contains("0x1"), "{error}");
}
