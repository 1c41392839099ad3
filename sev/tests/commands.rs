//! `KVM_MEMORY_ENCRYPT_OP` beyond the plain launch: secrets, debugging, reports, and what is refused
//! with which errno.

mod common;

use common::{C, RAM, Ram, TECHS, host, measured, page, params, sp, with_ram};
use kvm_ops_core::guest::Action;
use kvm_ops_core::{Backend, EncCmd, EncRegion, Error, Gpa, Host, SevParams, Step, Tech, VmOps};
use kvm_ops_sev::kvm::layout::{
    SevAttestation, SevDbg, SevLaunchSecret, SevLaunchStart, SevRange, SnpLaunchFinish,
    SnpLaunchStart, SnpLaunchUpdate,
};
use kvm_ops_sev::{SevVm, rules};
use kvm_ops_sim::SimHost;
use proptest::prelude::*;
use soft_amd_sp::crypto::GuestOwner;
use soft_amd_sp::measure::LaunchMeasure;
use soft_amd_sp::{Command, Status};
use zerocopy::{Immutable, IntoBytes};

/// Errno and the firmware's status.
fn ioctl(vm: &mut SevVm<SimHost>, id: u32, data: &mut [u8]) -> (i32, u64) {
    let mut cmd = EncCmd {
        id,
        flags: 0,
        data,
        firmware_status: u64::MAX,
    };
    let done = vm.mem_enc_op(&mut cmd);
    (
        done.map_or_else(|error| error.errno(), |()| 0),
        cmd.firmware_status,
    )
}

/// A structure with blobs behind it.
fn with_blobs(head: &(impl IntoBytes + Immutable), blobs: &[&[u8]]) -> Vec<u8> {
    let mut data = head.as_bytes().to_vec();
    blobs.iter().for_each(|blob| data.extend_from_slice(blob));
    data
}

#[test]
fn the_owners_secret_arrives_where_it_was_sent_and_a_forged_one_does_not() {
    for (tech, policy) in [(Tech::Sev, 0_u32), (Tech::SevEs, 4)] {
        use rand_chacha::rand_core::SeedableRng;
        let (host, ram) = (host(1), Ram::new(0x4000));
        let mut rng = rand_chacha::ChaCha20Rng::seed_from_u64(1);
        let owner = GuestOwner::new(&sp(&host).pdh_cert(), policy, &mut rng).unwrap();
        let mut vm = with_ram(&host, tech, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        // The session through the command.
        let (cert, session) = (owner.certificate().as_bytes(), owner.session().to_bytes());
        let start = SevLaunchStart {
            policy: policy.into(),
            dh: 40.into(),
            dh_len: (cert.len() as u32).into(),
            session: (40 + cert.len() as u64).into(),
            session_len: (session.len() as u32).into(),
            ..SevLaunchStart::default()
        };
        assert_eq!(
            ioctl(&mut vm, 2, &mut with_blobs(&start, &[cert, &session])),
            (0, 0)
        );
        for at in [RAM, RAM + common::PAGE] {
            vm.add_initial_page(&measured(at, &page(0))).unwrap();
        }
        if tech == Tech::SevEs {
            assert_eq!(ioctl(&mut vm, 4, &mut []), (0, 0));
            assert_eq!(ioctl(&mut vm, 4, &mut []).0, 22, "protected already");
        }
        let range = SevRange {
            uaddr: 16.into(),
            len: 48.into(),
            ..SevRange::default()
        };
        let mut measure = with_blobs(&range, &[&[0; 48]]);
        assert_eq!(ioctl(&mut vm, 6, &mut measure), (0, 0));
        let measure = LaunchMeasure::from_bytes(measure[16..].try_into().unwrap());
        let mut secret = *b"a disk key, 16 B plus 16 more...";
        let header = owner.seal_secret(&mut secret, [3; 16], &measure).to_bytes();
        let command = SevLaunchSecret {
            hdr: 48.into(),
            hdr_len: (header.len() as u32).into(),
            // Over two pages.
            guest: (ram.address() + 0xff0).into(),
            guest_len: 32.into(),
            trans: (48 + header.len() as u64).into(),
            trans_len: 32.into(),
            ..SevLaunchSecret::default()
        };
        let short = SevLaunchSecret {
            guest_len: 16.into(),
            ..command
        };
        assert_eq!(
            ioctl(&mut vm, 5, &mut with_blobs(&short, &[&header, &secret])),
            (5, Status::INVALID_LEN.0.into())
        );
        let mut forged = secret;
        forged[0] ^= 1;
        let bad = (5, Status::BAD_MEASUREMENT.0.into());
        assert_eq!(
            ioctl(&mut vm, 5, &mut with_blobs(&command, &[&header, &forged])),
            bad
        );
        assert_eq!(
            ioctl(&mut vm, 5, &mut with_blobs(&command, &[&header, &secret])),
            (0, 0)
        );
        assert_eq!(ioctl(&mut vm, 7, &mut []), (0, 0));
        let gpa = Gpa::new(C | RAM | 0xff0);
        let log = common::outcomes(&vm, &mut vcpu, vec![Action::Read { gpa, len: 32 }]);
        assert_eq!(
            log,
            [format!("Data({:?})", b"a disk key, 16 B plus 16 more...")]
        );
        drop(vcpu);
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn a_secret_for_pages_that_do_not_follow_each_other_is_einval() {
    let (host, ram) = (host(9), Ram::new(0x4000));
    let mut vm = with_ram(&host, Tech::Sev, 1, &ram);
    for at in [RAM + common::PAGE, RAM] {
        vm.add_initial_page(&measured(at, &page(0))).unwrap();
    }
    let secret = |offset: u64| SevLaunchSecret {
        hdr: 48.into(),
        hdr_len: 52.into(),
        guest: (ram.address() + offset).into(),
        guest_len: 32.into(),
        trans: 100.into(),
        trans_len: 32.into(),
        ..SevLaunchSecret::default()
    };
    let blobs: [&[u8]; 1] = [&[0; 84]];
    let scattered = ioctl(&mut vm, 5, &mut with_blobs(&secret(0xff0), &blobs));
    assert_eq!(scattered, (22, 0));
    let one = ioctl(&mut vm, 5, &mut with_blobs(&secret(0xfe0), &blobs));
    assert_eq!(one, (5, Status::INVALID_GUEST_STATE.0.into()));
    common::free_clean(vm);
    common::nothing_left(&host);
}

fn launched(host: &SimHost, tech: Tech, policy: u64, ram: &Ram) -> SevVm<SimHost> {
    let sev = SevParams {
        policy: Some(policy),
        ..SevParams::default()
    };
    let mut vm = SevVm::create(host, host.next_vm_id(), tech, &params(1, sev)).unwrap();
    vm.vm_init().unwrap();
    vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    vm.add_initial_page(&measured(RAM, &page(0x42))).unwrap();
    vm.vm_finalize().unwrap();
    vm
}

#[test]
fn a_debugged_guest_is_read_and_written_and_one_that_forbids_it_is_not() {
    let (host, ram) = (host(2), Ram::new(0x4000));
    let mut vm = launched(&host, Tech::Sev, 0, &ram);
    let dbg = |src: u64, dst: u64| SevDbg {
        src: src.into(),
        dst: dst.into(),
        len: 32.into(),
        ..SevDbg::default()
    };
    let mut write = with_blobs(
        &dbg(24, ram.address() + 16),
        &[b"written by the host, 32 bytes..."],
    );
    assert_eq!(ioctl(&mut vm, 18, &mut write), (0, 0));
    let mut read = with_blobs(&dbg(ram.address() + 16, 24), &[&[0; 32]]);
    assert_eq!(ioctl(&mut vm, 17, &mut read), (0, 0));
    assert_eq!(read[24..], *b"written by the host, 32 bytes...");
    for (at, len) in [(0, 8_u32), (8, 16), (0, 0), (0xff0, 32), (0x4000, 16)] {
        let bad = SevDbg {
            src: (ram.address() + at).into(),
            dst: 24.into(),
            len: len.into(),
            ..SevDbg::default()
        };
        let errno = ioctl(&mut vm, 17, &mut with_blobs(&bad, &[&[0; 64]])).0;
        assert_eq!(errno, if at == 0x4000 { 12 } else { 22 }, "{at:#x} {len}");
    }
    common::free_clean(vm);
    let mut vm = launched(&host, Tech::Sev, 1, &ram);
    let forbidden = (5, Status::POLICY_FAILURE.0.into());
    assert_eq!(ioctl(&mut vm, 17, &mut read), forbidden);
    assert_eq!(ioctl(&mut vm, 18, &mut write), forbidden);
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn an_attestation_report_carries_the_nonce_and_its_length_can_be_asked() {
    let (host, ram) = (host(3), Ram::new(0x4000));
    let mut vm = launched(&host, Tech::Sev, 0, &ram);
    let mut query = SevAttestation::default();
    let too_short = (5, Status::INVALID_LEN.0.into());
    assert_eq!(ioctl(&mut vm, 20, query.as_mut_bytes()), too_short);
    assert_eq!(query.len.get(), 0xd0);
    let command = SevAttestation {
        mnonce: [9; 16],
        uaddr: 32.into(),
        ..query
    };
    let mut data = with_blobs(&command, &[&[0; 0xd0]]);
    assert_eq!(ioctl(&mut vm, 20, &mut data), (0, 0));
    assert_eq!(data[32..48], [9; 16]);
    common::free_clean(vm);
}

/// A structure or blob that is missing, too short or out of place gives the kernel's errno, and the VM
/// is as it was.
#[test]
fn truncated_structures_and_blobs_out_of_bounds_are_efault() {
    let (host, ram) = (host(4), Ram::new(0x4000));
    for tech in TECHS {
        let mut vm = with_ram(&host, tech, 1, &ram);
        let ids: &[u32] = match tech {
            Tech::SevSnp => &[100, 101, 102],
            _ => &[2, 3, 5, 6, 17, 18, 20],
        };
        for id in ids {
            for len in [0, 1, 11] {
                assert_eq!(
                    ioctl(&mut vm, *id, &mut vec![0; len]),
                    (14, 0),
                    "{tech} {id} {len}"
                );
            }
        }
        assert_eq!(sp(&host).snapshot().guests.len(), 0);
        common::free_clean(vm);
    }
    let mut vm = with_ram(&host, Tech::Sev, 1, &ram);
    for (at, len) in [(40, 1), (u64::MAX, 2), (0, 41), (41, 0)] {
        let start = SevLaunchStart {
            dh: at.into(),
            dh_len: (len as u32).into(),
            ..SevLaunchStart::default()
        };
        assert_eq!(
            ioctl(&mut vm, 2, &mut with_blobs(&start, &[])),
            (14, 0),
            "{at:#x}"
        );
    }
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn launch_updates_of_what_is_no_memory_of_the_guest_are_refused() {
    let (host, ram) = (host(5), Ram::new(0x4000));
    let mut vm = with_ram(&host, Tech::Sev, 1, &ram);
    let range = |uaddr: u64, len: u32| SevRange {
        uaddr: uaddr.into(),
        len: len.into(),
        ..SevRange::default()
    };
    let early = ioctl(&mut vm, 3, range(ram.address(), 0x1000).as_mut_bytes());
    assert_eq!(early, (22, 0), "before LAUNCH_START");
    assert_eq!(
        ioctl(&mut vm, 2, SevLaunchStart::default().as_mut_bytes()),
        (0, 0)
    );
    let (address, length) = (Status::INVALID_ADDRESS, Status::INVALID_LEN);
    for (uaddr, len, errno, status) in [
        (ram.address(), 0, 22, Status::SUCCESS),
        (ram.address() + 8, 0x1000, 5, address),
        (ram.address(), 0x18, 5, length),
        (!0xfff, 0x2000, 22, Status::SUCCESS),
        (ram.address() + 0x4000, 0x1000, 12, Status::SUCCESS),
    ] {
        let got = ioctl(&mut vm, 3, range(uaddr, len).as_mut_bytes());
        assert_eq!(got, (errno, status.0.into()), "{uaddr:#x} {len:#x}");
        assert_eq!(vm.account().held(), 0, "{uaddr:#x} {len:#x}");
    }
    // The first page stays done, and may be encrypted once more.
    for (uaddr, len, errno) in [
        (ram.address() + 0x3000, 0x2000, 12),
        (ram.address() + 0x3000, 0x1000, 0),
    ] {
        let got = ioctl(&mut vm, 3, range(uaddr, len).as_mut_bytes());
        assert_eq!(got, (errno, 0), "{uaddr:#x} {len:#x}");
        assert_eq!(vm.account().held(), 1, "{uaddr:#x} {len:#x}");
    }
    common::free_clean(vm);

    let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    let first = RAM >> 12;
    let update = |gfn: u64, len: u64, kind: u8, flags: u16| {
        let head = SnpLaunchUpdate {
            gfn_start: gfn.into(),
            uaddr: 64.into(),
            len: len.into(),
            kind,
            flags: flags.into(),
            ..SnpLaunchUpdate::default()
        };
        with_blobs(&head, &[&[0; 0x1000]])
    };
    let early = ioctl(&mut vm, 101, &mut update(first, 0x1000, 1, 0));
    assert_eq!(early, (22, 0), "before SNP_LAUNCH_START");
    for (policy, flags) in [
        (0, 0_u16),
        (1 << 16, 0),
        (3 << 16 | 1 << 40, 0),
        (3 << 16, 1),
    ] {
        let mut start = SnpLaunchStart {
            policy: u64::to_le(policy).into(),
            flags: flags.into(),
            ..SnpLaunchStart::default()
        };
        assert_eq!(
            ioctl(&mut vm, 100, start.as_mut_bytes()),
            (22, 0),
            "{policy:#x}"
        );
    }
    let mut start = SnpLaunchStart {
        policy: (3 << 16).into(),
        ..SnpLaunchStart::default()
    };
    assert_eq!(ioctl(&mut vm, 100, start.as_mut_bytes()), (0, 0));
    assert_eq!(
        ioctl(&mut vm, 100, start.as_mut_bytes()),
        (22, 0),
        "a context exists"
    );
    for (gfn, len, kind, flags) in [
        (first, 0, 1, 0),
        (first, 0x800, 1, 0),
        (first, 0x1000, 2, 0),
        (first, 0x1000, 7, 0),
        (first, 0x1000, 1, 1),
        (first + 4, 0x1000, 1, 0),
        (u64::MAX, 0x1000, 1, 0),
    ] {
        let got = ioctl(&mut vm, 101, &mut update(gfn, len, kind, flags));
        assert_eq!(got, (22, 0), "{gfn:#x} {len:#x} {kind} {flags}");
    }
    assert_eq!(
        ioctl(&mut vm, 101, &mut update(first, 0x2000, 1, 0)),
        (14, 0)
    );
    assert_eq!(
        ioctl(&mut vm, 101, &mut update(first, 0x1000, 1, 0)),
        (0, 0)
    );
    // Not in its initial state any more.
    assert_eq!(
        ioctl(&mut vm, 101, &mut update(first, 0x1000, 1, 0)),
        (5, 0)
    );
    let mut finish = SnpLaunchFinish {
        flags: 1.into(),
        ..SnpLaunchFinish::default()
    };
    assert_eq!(ioctl(&mut vm, 102, finish.as_mut_bytes()), (22, 0));
    common::free_clean(vm);
    common::nothing_left(&host);
}

/// Firmware keeps the launch's state machine; its refusals arrive as EIO with the status.
#[test]
fn commands_out_of_order_are_refused_by_the_firmware_or_before() {
    let (host, ram) = (host(6), Ram::new(0x4000));
    let mut vm = with_ram(&host, Tech::Sev, 1, &ram);
    let bad_state = (5, Status::INVALID_GUEST_STATE.0.into());
    for id in [7, 16] {
        assert_eq!(
            ioctl(&mut vm, id, &mut [0; 16]),
            (22, 0),
            "{id} without a guest"
        );
    }
    assert_eq!(
        ioctl(&mut vm, 2, SevLaunchStart::default().as_mut_bytes()),
        (0, 0)
    );
    assert_eq!(
        ioctl(&mut vm, 2, SevLaunchStart::default().as_mut_bytes()),
        (5, Status::ASID_OWNED.0.into()),
        "twice"
    );
    assert_eq!(sp(&host).snapshot().guests.len(), 1, "the second one went");
    let mut query = SevRange::default();
    assert_eq!(
        ioctl(&mut vm, 7, &mut []),
        bad_state,
        "FINISH before MEASURE"
    );
    assert_eq!(vm.step(), Step::Initialized);
    vm.vm_finalize().unwrap();
    assert_eq!(ioctl(&mut vm, 6, query.as_mut_bytes()), bad_state);
    assert_eq!(query.len.get(), 0, "no length is told");
    let mut update = SevRange {
        uaddr: ram.address().into(),
        len: 0x1000.into(),
        ..SevRange::default()
    };
    assert_eq!(ioctl(&mut vm, 3, update.as_mut_bytes()), bad_state);
    assert_eq!(
        vm.account().held(),
        0,
        "nothing is kept of a page that was refused"
    );
    let wrong = SevLaunchStart {
        policy: 4.into(),
        ..SevLaunchStart::default()
    };
    let mut es_policy = with_ram(&host, Tech::Sev, 1, &ram);
    assert_eq!(
        ioctl(&mut es_policy, 2, &mut with_blobs(&wrong, &[])),
        (5, Status::INVALID_ASID.0.into())
    );
    common::free_clean(es_policy);
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn a_foreign_handle_to_share_a_key_with_is_the_firmwares_to_judge() {
    let (host, ram) = (host(7), Ram::new(0x4000));
    let mut vm = with_ram(&host, Tech::Sev, 1, &ram);
    let share = |handle: u32| SevLaunchStart {
        handle: handle.into(),
        ..SevLaunchStart::default()
    };
    let unknown = (5, Status::INVALID_GUEST.0.into());
    assert_eq!(ioctl(&mut vm, 2, share(0x1234).as_mut_bytes()), unknown);
    let mut other = launched(&host, Tech::Sev, 2, &ram);
    let mut status = [0; 12];
    assert_eq!(ioctl(&mut other, 16, &mut status), (0, 0));
    let handle = u32::from_le_bytes(status[..4].try_into().unwrap());
    let no_sharing = (5, Status::POLICY_FAILURE.0.into());
    assert_eq!(ioctl(&mut vm, 2, share(handle).as_mut_bytes()), no_sharing);
    // Refused or not, the VM can be launched.
    assert_eq!(ioctl(&mut vm, 2, share(0).as_mut_bytes()), (0, 0));
    common::free_clean(other);
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn regions_are_accounted_where_there_is_a_guest() {
    let host = host(8);
    for tech in TECHS {
        let mut vm = common::create(&host, tech, 1);
        let region = EncRegion {
            address: 0x1000,
            bytes: 0x1001,
        };
        let errno = |done: kvm_ops_core::Result<()>| done.map_or_else(|e| e.errno(), |()| 0);
        assert_eq!(errno(vm.mem_enc_register_region(region)), 25, "not SEV yet");
        vm.vm_init().unwrap();
        assert_eq!(errno(vm.mem_enc_register_region(region)), 0);
        assert_eq!(
            errno(vm.mem_enc_register_region(region)),
            0,
            "twice, as in Linux"
        );
        assert_eq!(vm.locked_pages(), 4);
        vm.limit_locked_pages(5);
        assert_eq!(errno(vm.mem_enc_register_region(region)), 12);
        let inside = EncRegion {
            bytes: 0x1000,
            ..region
        };
        assert_eq!(
            errno(vm.mem_enc_unregister_region(inside)),
            22,
            "not exactly so"
        );
        assert_eq!(errno(vm.mem_enc_unregister_region(region)), 0);
        assert_eq!(vm.locked_pages(), 2);
        common::free_clean(vm);
    }
}

#[test]
fn a_poisoned_vm_takes_no_command_but_its_teardown() {
    let (host, ram) = (host(9), Ram::new(0x4000));
    let mut vm = launched(&host, Tech::SevSnp, 3 << 16, &ram);
    // The page stays in Guest state: RMPUPDATE is refused for good.
    sp(&host).fail(soft_amd_sp::Failure {
        operation: soft_amd_sp::Instruction::RmpUpdate.into(),
        nth: 1,
        code: 2,
    });
    let gfn = kvm_ops_core::Gfn::new(RAM >> 12);
    let shared = kvm_ops_core::Privacy::Shared;
    assert!(vm.set_memory_attributes(gfn, 1, shared).is_err());
    assert_eq!(vm.step(), Step::Poisoned);
    assert_eq!(ioctl(&mut vm, 102, &mut [0; 88]).0, Error::Poisoned.errno());
    assert_eq!(
        vm.create_vcpu(kvm_ops_core::VcpuId(0)).err(),
        Some(Error::Poisoned)
    );
    let report = common::free(vm);
    assert_eq!((report.leaks.len(), report.keys_freed), (1, 1));
    assert_eq!(host.pages().unwrap().frames_out(), 1);
}

#[test]
fn an_asid_that_is_not_to_be_had_is_ebusy() {
    let host = host(10);
    let vms: Vec<_> = (0..3)
        .map(|_| {
            let mut vm = common::create(&host, Tech::SevEs, 1);
            vm.vm_init().unwrap();
            vm
        })
        .collect();
    let mut late = common::create(&host, Tech::SevSnp, 1);
    assert_eq!(ioctl(&mut late, 22, &mut [0; 48]), (16, 0));
    assert_eq!(late.vm_init(), Err(Error::NoKeyId));
    vms.into_iter().for_each(common::free_clean);
    // Never bound, never used up: no flush was needed.
    assert_eq!(ioctl(&mut late, 22, &mut [0; 48]), (0, 0));
    let flushes = |command: Command| sp(&host).counters().calls(command);
    assert_eq!(flushes(Command::SNP_DF_FLUSH), 1, "the platform's own");
    common::free_clean(late);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever the bytes: an answer, and nothing lost.
    #[test]
    fn random_commands_with_random_bytes_lose_nothing(
        tech in 0..3usize,
        commands in proptest::collection::vec(
            (0..110u32, proptest::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..200)),
            1..25,
        ),
    ) {
        let (host, ram) = (host(11), Ram::new(0x4000));
        let mut vm = with_ram(&host, TECHS[tech], 1, &ram);
        for (id, mut data) in commands {
            let _ = ioctl(&mut vm, id, &mut data);
        }
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn every_rule_that_allows_a_command_leads_to_one_or_says_that_it_is_not_offered() {
    let (host, ram) = (host(12), Ram::new(0x4000));
    for tech in TECHS {
        let mut vm = with_ram(&host, tech, 1, &ram);
        for rule in rules::RULES {
            let errno = ioctl(&mut vm, rule.id, &mut []).0;
            let refused = [1, 14, 16, 22, 25, 95].contains(&errno);
            assert!(refused || errno == 0, "{tech} {}: {errno}", rule.name);
        }
        common::free_clean(vm);
    }
}
