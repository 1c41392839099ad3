//! The kernel's own cases: `sev_init2_tests` (I) and `sev_smoke_test` (K), by the numbers that
//! docs/sev.md lists them under.

mod common;

use common::{C, RAM, Ram, TECHS, create, host, host_from, page, platform, with_ram};
use kvm_ops_core::guest::{Action, Script};
use kvm_ops_core::{
    EncCmd, Exit, Gpa, Host, PspPort, Result, SnpAsids, Step, Tech, VcpuOps, VmOps,
};
use kvm_ops_sev::kvm::layout::{
    SevGuestStatus, SevInit, SevLaunchStart, SevRange, SnpLaunchFinish, SnpLaunchStart,
    SnpLaunchUpdate,
};
use kvm_ops_sev::{GuestState, SevVm, rules};
use kvm_ops_sim::{SevSetup, SimHost};
use zerocopy::{FromBytes, IntoBytes};

const EINVAL: i32 = 22;

/// Runs a command and answers errno and the firmware's status.
fn ioctl(vm: &mut SevVm<SimHost>, id: u32, data: &mut [u8]) -> (i32, u64) {
    let mut cmd = EncCmd {
        id,
        flags: 0,
        data,
        firmware_status: u64::MAX,
    };
    let done: Result<()> = vm.mem_enc_op(&mut cmd);
    (
        done.map_or_else(|error| error.errno(), |()| 0),
        cmd.firmware_status,
    )
}

fn init2(vm: &mut SevVm<SimHost>, mut init: SevInit) -> (i32, u64) {
    ioctl(vm, 22, init.as_mut_bytes())
}

/// I1: what the processor can is what is offered; I3: other types of VM have no INIT2.
#[test]
fn i1_i3_what_cpuid_says_is_offered_and_nothing_else() {
    let range = |host: &SimHost, tech| host.psp().unwrap().asid_pools().range(tech);
    for (setup, snp) in [
        (SevSetup::new(platform(1)), SnpAsids::Shared),
        (SevSetup::new(platform(1)).without_snp(), SnpAsids::Off),
        (
            SevSetup::new(platform(1)).ciphertext_hiding(2),
            SnpAsids::UpTo(2),
        ),
        (SevSetup::new(platform(1).asids(1, 4)), SnpAsids::Shared),
    ] {
        let host = host_from(setup);
        let has_es = *host.psp().unwrap().asid_pools().range(Tech::SevEs).start() <= 3;
        for tech in TECHS {
            let offered = match (tech, snp) {
                (Tech::Sev, _) => true,
                (Tech::SevEs, _) => !range(&host, tech).is_empty() && has_es,
                _ => snp != SnpAsids::Off && !range(&host, tech).is_empty(),
            };
            let params = kvm_ops_core::VmParams::new(1);
            let created = SevVm::create(&host, host.next_vm_id(), tech, &params);
            assert_eq!(created.is_ok(), offered, "{tech} {snp:?}");
        }
        // I3: no VM of another type is made here at all.
        for tech in [Tech::Svm, Tech::Vmx, Tech::Tdx] {
            let params = kvm_ops_core::VmParams::new(1);
            assert!(SevVm::create(&host, host.next_vm_id(), tech, &params).is_err());
        }
    }
}

/// I2, I7: INIT2 with nothing set succeeds on each type, and the firmware's status is 0.
#[test]
fn i2_i7_init2_succeeds_once_on_each_type_with_status_zero() {
    let host = host(2);
    for tech in TECHS {
        let mut vm = create(&host, tech, 1);
        assert_eq!(init2(&mut vm, SevInit::default()), (0, 0), "{tech}");
        assert_eq!(vm.step(), Step::Initialized);
        let again = if tech == Tech::SevSnp { 1 } else { EINVAL };
        assert_eq!(init2(&mut vm, SevInit::default()), (again, 0), "{tech}");
        common::free_clean(vm);
    }
    common::nothing_left(&host);
}

/// I4: each flag alone is refused.
#[test]
fn i4_every_flag_of_init2_is_refused() {
    let host = host(3);
    for tech in TECHS {
        let mut vm = create(&host, tech, 1);
        for bit in 0..32 {
            let flags = (1_u32 << bit).into();
            let init = SevInit {
                flags,
                ..SevInit::default()
            };
            assert_eq!(init2(&mut vm, init), (EINVAL, 0), "{tech} bit {bit}");
        }
        assert_eq!(vm.step(), Step::Created);
        common::free_clean(vm);
    }
}

/// I5, I6: features that are not supported are refused, DEBUG_SWAP is not where it is.
#[test]
fn i5_i6_vmsa_features_are_those_that_are_supported() {
    let host = host(4);
    for tech in TECHS {
        for bit in 0..64 {
            let mut vm = create(&host, tech, 1);
            let vmsa_features = (1_u64 << bit).into();
            let init = SevInit {
                vmsa_features,
                ..SevInit::default()
            };
            let supported = rules::supported_features(tech) & 1 << bit != 0;
            assert_eq!(supported, tech != Tech::Sev && bit == 5);
            let expected = if supported { 0 } else { EINVAL };
            assert_eq!(init2(&mut vm, init), (expected, 0), "{tech} bit {bit}");
            common::free_clean(vm);
        }
        for version in 0..5_u16 {
            let mut vm = create(&host, tech, 1);
            let init = SevInit {
                ghcb_version: version.into(),
                ..SevInit::default()
            };
            let good = match tech {
                Tech::Sev => version == 0,
                Tech::SevEs => version <= 2,
                _ => version == 0 || version == 2,
            };
            let expected = if good { 0 } else { EINVAL };
            assert_eq!(init2(&mut vm, init).0, expected, "{tech} GHCB {version}");
            common::free_clean(vm);
        }
    }
    common::nothing_left(&host);
}

fn status(vm: &mut SevVm<SimHost>) -> SevGuestStatus {
    let mut data = [0; 12];
    assert_eq!(ioctl(vm, 16, &mut data), (0, 0));
    SevGuestStatus::read_from_bytes(&data).unwrap()
}

/// A launch by the kernel's commands, with the states that the kernel's test looks at.
fn launch(vm: &mut SevVm<SimHost>, tech: Tech, policy: u32, ram: &Ram) {
    let mut start = SevLaunchStart {
        policy: policy.into(),
        ..SevLaunchStart::default()
    };
    assert_eq!(ioctl(vm, 2, start.as_mut_bytes()), (0, 0));
    let at = status(vm);
    assert_eq!(at.policy.get(), policy);
    assert_eq!(at.handle.get(), start.handle.get());
    assert_eq!(at.state.get(), GuestState::LaunchUpdate as u32);
    let mut data = SevRange {
        uaddr: ram.address().into(),
        len: 0x2000.into(),
        ..SevRange::default()
    };
    assert_eq!(ioctl(vm, 3, data.as_mut_bytes()), (0, 0));
    if tech == Tech::SevEs {
        assert_eq!(ioctl(vm, 4, &mut []), (0, 0));
    }
    // A query of the length first, as the kernel's test does.
    let mut query = SevRange::default();
    assert_eq!(ioctl(vm, 6, query.as_mut_bytes()), (5, 4));
    assert_eq!(query.len.get(), 48);
    let mut measure = [0; 16 + 48];
    let range = SevRange {
        uaddr: 16.into(),
        len: 48.into(),
        ..SevRange::default()
    };
    range.write_to_prefix(&mut measure).unwrap();
    assert_eq!(ioctl(vm, 6, &mut measure), (0, 0));
    assert_eq!(vm.measurement().unwrap().bytes()[..], measure[16..]);
    assert_eq!(status(vm).state.get(), GuestState::LaunchSecret as u32);
    assert_eq!(ioctl(vm, 7, &mut []), (0, 0));
    assert_eq!(status(vm).state.get(), GuestState::Running as u32);
    assert_eq!(vm.step(), Step::Runnable);
}

/// K1: a SEV guest, debugging forbidden and not, is launched, runs, and is done.
#[test]
fn k1_a_sev_guest_is_launched_and_runs() {
    let (host, ram) = (host(5), Ram::new(0x4000));
    for policy in [1, 0] {
        let mut vm = with_ram(&host, Tech::Sev, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        ram.write(0, &page(0x11)[..]);
        launch(&mut vm, Tech::Sev, policy, &ram);
        let read = Action::Read {
            gpa: Gpa::new(C | RAM),
            len: 4,
        };
        let log = common::outcomes(&vm, &mut vcpu, vec![read]);
        assert_eq!(log, ["Data([17, 17, 17, 17])"]);
        assert!(!vcpu.is_protected());
        drop(vcpu);
        common::free_clean(vm);
    }
    common::nothing_left(&host);
}

/// The guest of the kernel's test is done by asking for its termination.
#[track_caller]
fn terminates(vcpu: &mut impl VcpuOps) {
    let request = Script::new().ghcb_msr(0x100);
    common::load(vcpu, request);
    assert_eq!(vcpu.vcpu_run(), Ok(Exit::SystemEvent { kind: 6 }));
    assert_eq!(vcpu.exit_data(), 0x100_u64.to_ne_bytes());
}

/// K2: SEV-ES, with a VMSA; the guest terminates itself. K4: a guest that crashes shuts down.
#[test]
fn k2_k4_a_sev_es_guest_is_launched_and_terminates_or_shuts_down() {
    let (host, ram) = (host(6), Ram::new(0x4000));
    for policy in [4 | 1, 4] {
        let mut vm = with_ram(&host, Tech::SevEs, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        assert!(!vcpu.is_protected());
        launch(&mut vm, Tech::SevEs, policy, &ram);
        assert!(vcpu.is_protected());
        terminates(&mut vcpu);
        common::load(&mut vcpu, Script::new());
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
        drop(vcpu);
        common::free_clean(vm);
    }
    common::nothing_left(&host);
}

/// K3, K4: SNP by its own commands, with the debug policy and without.
#[test]
fn k3_k4_an_snp_guest_is_launched_and_terminates_or_shuts_down() {
    let (host, ram) = (host(7), Ram::new(0x4000));
    for policy in [3 << 16 | 1 << 19, 3 << 16] {
        let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        let mut start = SnpLaunchStart {
            policy: policy.into(),
            ..SnpLaunchStart::default()
        };
        assert_eq!(ioctl(&mut vm, 100, start.as_mut_bytes()), (0, 0));
        let mut update = vec![0; 64 + 0x2000];
        update[64..].fill(0x33);
        let head = SnpLaunchUpdate {
            gfn_start: (RAM >> 12).into(),
            uaddr: 64.into(),
            len: 0x2000.into(),
            kind: 1,
            ..SnpLaunchUpdate::default()
        };
        head.write_to_prefix(&mut update).unwrap();
        assert_eq!(ioctl(&mut vm, 101, &mut update), (0, 0));
        let (done, _) = SnpLaunchUpdate::read_from_prefix(&update).unwrap();
        let left = (done.gfn_start.get(), done.uaddr.get(), done.len.get());
        assert_eq!(left, ((RAM >> 12) + 2, 64 + 0x2000, 0));
        let mut finish = SnpLaunchFinish::default();
        assert_eq!(ioctl(&mut vm, 102, finish.as_mut_bytes()), (0, 0));
        let status = vm.guest_status().unwrap();
        assert_eq!((status.policy, status.state), (policy, 2));
        let read = Action::Read {
            gpa: Gpa::new(C | RAM),
            len: 2,
        };
        assert_eq!(
            common::outcomes(&vm, &mut vcpu, vec![read]),
            ["Data([51, 51])"]
        );
        terminates(&mut vcpu);
        common::load(&mut vcpu, Script::new());
        assert_eq!(vcpu.vcpu_run(), Ok(Exit::Shutdown));
        drop(vcpu);
        common::free_clean(vm);
    }
    common::nothing_left(&host);
}
