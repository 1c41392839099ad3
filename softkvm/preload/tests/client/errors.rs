//! Refusals: each becomes an error that names the call, and a text that says what the kernel or firmware wants.

use kvm_ops::held::HeldVm;
use kvm_ops::{
    AnyVm, Call, CreateError, EncCmd, Error, Field, Gpa, Host, InitialPage, InitialPageKind,
    MemSlot, Missing, Result, SevParams, SlotFlags, SlotId, Step, Tech, Vendor, Vm, VmParams,
    create,
};

use crate::common::{again, inside};
use crate::guest::*;

pub(crate) type Guest = Vm<AnyVm<kvm_ops::kvm::KvmHost>>;

fn guest(tech: Tech, params: SevParams) -> Result<Guest, CreateError> {
    create(&host(), &config(tech, params))
}

fn page(gpa: u64, kind: InitialPageKind) -> (Gpa, [u8; 4096], InitialPageKind) {
    (Gpa::new(gpa), [1; 4096], kind)
}

fn add(vm: &mut Guest, (gpa, contents, kind): (Gpa, [u8; 4096], InitialPageKind)) -> Result<()> {
    let contents = &contents;
    vm.add_initial_page(&InitialPage {
        gpa,
        contents,
        kind,
    })
}

#[test]
fn a_machine_of_the_other_vendor_says_so() {
    let name = "errors::a_machine_of_the_other_vendor_says_so";
    if again(name, "intel").is_some() {
        return;
    }
    assert_eq!(host().vendor(), Vendor::Intel);
    for tech in TECHS {
        let refused = guest(tech, SevParams::default()).unwrap_err();
        assert_eq!(refused.error, Error::unsupported(Missing::Vendor, tech));
    }
}

#[test]
fn init2_is_refused_with_its_name() {
    if !inside("errors::init2_is_refused_with_its_name") {
        return;
    }
    for (tech, params) in [
        (
            Tech::SevSnp,
            SevParams {
                vmsa_features: 1 << 63,
                ..SevParams::default()
            },
        ),
        (
            Tech::SevEs,
            SevParams {
                ghcb_version: 3,
                ..SevParams::default()
            },
        ),
        (
            Tech::SevSnp,
            SevParams {
                ghcb_version: 1,
                ..SevParams::default()
            },
        ),
    ] {
        let refused = guest(tech, params).unwrap_err();
        assert_eq!(refused.error, Error::Sys(Call::SevInit2, libc::EINVAL));
        assert!(refused.report.unwrap().is_clean());
        let why = refused.diagnosis.unwrap().to_string();
        assert!(why.contains("KVM_SEV_INIT2 failed with errno 22"), "{why}");
    }
}

#[test]
fn a_machine_without_free_asids_says_so() {
    if !inside("errors::a_machine_without_free_asids_says_so") {
        return;
    }
    let movable = SevParams {
        movable: true,
        ..SevParams::default()
    };
    let mut guests = Vec::new();
    let refused = loop {
        match guest(Tech::Sev, SevParams::default()) {
            Ok(guest) => guests.push(guest),
            Err(refused) => break refused,
        }
        assert!(guests.len() < 2000);
    };
    for refused in [refused, guest(Tech::Sev, movable).unwrap_err()] {
        assert_eq!(refused.error, Error::NoKeyId);
        let why = refused.diagnosis.unwrap().to_string();
        assert!(
            why.contains("the kernel demands that an ASID is free"),
            "{why}"
        );
    }
    drop(guests.pop());
    assert!(guest(Tech::Sev, SevParams::default()).is_ok());
}

#[test]
fn a_launch_that_firmware_refuses_names_command_and_status() {
    if !inside("errors::a_launch_that_firmware_refuses_names_command_and_status") {
        return;
    }
    let memory = memory();
    let params = SevParams {
        session: Some((vec![0; 64], vec![0; 128])),
        ..SevParams::default()
    };
    let mut vm = guest(Tech::Sev, params).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let refused = add(&mut vm, page(FIRST, InitialPageKind::Measured)).unwrap_err();
    assert!(matches!(refused, Error::Firmware(_)), "{refused}");
    let why = vm.explain(refused).to_string();
    assert!(why.contains("LAUNCH_START answered "), "{why}");
    assert!(vm.destroy().is_clean());
}

#[test]
fn a_policy_that_the_kernel_refuses_names_the_command() {
    if !inside("errors::a_policy_that_the_kernel_refuses_names_the_command") {
        return;
    }
    let memory = memory();
    for (tech, policy, expected) in [
        (Tech::SevSnp, 0, Error::Sys(Call::SnpLaunchStart, 22)),
        (
            Tech::SevSnp,
            SNP_POLICY | 1 << 40,
            Error::Sys(Call::SnpLaunchStart, 22),
        ),
        (Tech::Sev, 1 << 32, Error::Invalid(Field::Policy, 1 << 32)),
    ] {
        let params = SevParams {
            policy: Some(policy),
            ..SevParams::default()
        };
        let mut vm = guest(tech, params).unwrap();
        vm.set_memory_slot(slot(&memory)).unwrap();
        assert_eq!(vm.finalize(), Err(expected));
        assert_eq!(vm.step(), Step::Initialized);
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn pages_in_no_slot_or_of_a_kind_that_is_not_known_are_refused() {
    if !inside("errors::pages_in_no_slot_or_of_a_kind_that_is_not_known_are_refused") {
        return;
    }
    for tech in TECHS {
        let memory = memory();
        let mut vm = guest(tech, SevParams::default()).unwrap();
        vm.set_memory_slot(slot(&memory)).unwrap();
        let outside = add(&mut vm, page(0x1000, InitialPageKind::Measured));
        assert_eq!(outside, Err(Error::NotFound(Field::Gpa, 0x1000)));
        let odd = add(&mut vm, page(FIRST + 8, InitialPageKind::Measured));
        assert_eq!(odd, Err(Error::Invalid(Field::Gpa, FIRST + 8)));
        for kind in [
            InitialPageKind::Unmeasured,
            InitialPageKind::Zero,
            InitialPageKind::Secrets,
        ] {
            let added = add(&mut vm, page(FIRST, kind));
            match tech {
                Tech::SevSnp if kind == InitialPageKind::Unmeasured => assert_eq!(added, Ok(())),
                // The page is the guest's already.
                Tech::SevSnp => assert!(added.is_err()),
                _ => assert!(matches!(added, Err(Error::NotOffered(_))), "{added:?}"),
            }
        }
        assert!(vm.destroy().is_clean());
    }
}

#[test]
fn commands_reach_memory_of_slots_and_their_own_data_only() {
    if !inside("errors::commands_reach_memory_of_slots_and_their_own_data_only") {
        return;
    }
    let memory = memory();
    let mut vm = guest(Tech::Sev, SevParams::default()).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let mut run = |id, data: &mut [u8]| {
        let mut cmd = EncCmd {
            id,
            flags: 0,
            data,
            firmware_status: 0,
        };
        vm.mem_enc_op(&mut cmd)
    };
    // LAUNCH_UPDATE_DATA of memory that no slot lends.
    let mut own = [0_u8; 16];
    let address = own.as_ptr() as u64;
    own[..8].copy_from_slice(&address.to_le_bytes());
    own[8] = 16;
    assert_eq!(run(3, &mut own), Err(Error::NoMemory));
    // One byte beyond the slot.
    let last = memory.as_ptr() as u64 + BYTES - 16;
    own[..8].copy_from_slice(&last.to_le_bytes());
    own[8] = 17;
    assert_eq!(run(3, &mut own), Err(Error::NoMemory));
    // A structure that is cut off, and a blob outside of the data.
    assert_eq!(
        run(2, &mut [0; 39]),
        Err(Error::Invalid(Field::BufferLength, 39))
    );
    let mut start = [0; 40];
    (start[8], start[16]) = (40, 1);
    assert_eq!(
        run(2, &mut start),
        Err(Error::Invalid(Field::BufferLength, 40))
    );
    // Commands that are not passed on, of which some have addresses.
    for id in [0, 1, 10, 14, 19, 23, 99, 104, 0x4b4f_0000, u32::MAX] {
        assert!(
            matches!(run(id, &mut [0; 128]), Err(Error::NotOffered(_))),
            "{id}"
        );
    }
    // INIT2 again; it was taken by `create`.
    let again = Error::Sys(Call::SevInit2, libc::EINVAL);
    assert_eq!(run(22, &mut [0; 48]), Err(again));
    // Of an SNP guest, on a guest that is none.
    let other = Error::Sys(Call::SnpLaunchStart, libc::ENOTTY);
    assert_eq!(run(100, &mut [0; 64]), Err(other));
    assert!(vm.destroy().is_clean());
}

#[test]
fn a_launch_by_commands_is_the_same_launch() {
    if !inside("errors::a_launch_by_commands_is_the_same_launch") {
        return;
    }
    let memory = memory();
    let mut vm = guest(Tech::Sev, SevParams::default()).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let run = |vm: &mut Guest, id, data: &mut [u8]| {
        let mut cmd = EncCmd {
            id,
            flags: 0,
            data,
            firmware_status: 0,
        };
        let done = vm.mem_enc_op(&mut cmd);
        (done, cmd.firmware_status)
    };
    let mut start = [0; 40];
    assert_eq!(run(&mut vm, 2, &mut start), (Ok(()), 0));
    add_pages(&mut vm);
    // The query: INVALID_LEN, and the length.
    let mut measure = [0; 64];
    let (asked, status) = run(&mut vm, 6, &mut measure[..16]);
    assert_eq!((asked.map_err(|e| e.errno()), status), (Err(5), 4));
    assert_eq!(measure[8], 48);
    measure[0] = 16;
    assert_eq!(run(&mut vm, 6, &mut measure), (Ok(()), 0));
    assert_eq!(measure[0], 16, "an offset, as it was");
    assert_eq!(vm.measurement().unwrap().bytes()[..], measure[16..]);
    let mut status = [0; 12];
    assert_eq!(run(&mut vm, 16, &mut status), (Ok(()), 0));
    assert_eq!(status[8], 2, "the state is: secrets may come");
    assert_eq!(vm.step(), Step::Initialized);
    assert_eq!(run(&mut vm, 7, &mut []), (Ok(()), 0));
    assert_eq!(vm.step(), Step::Runnable);
    assert_eq!(vm.finalize(), Err(Error::WrongState(Step::Runnable)));
    // The host reads guest memory where the policy allows it.
    let mut read = [0; 24 + 32];
    let page = memory.as_ptr() as u64 + (FIRST - START);
    read[..8].copy_from_slice(&page.to_le_bytes());
    (read[8], read[16]) = (24, 32);
    assert_eq!(run(&mut vm, 17, &mut read), (Ok(()), 0));
    assert_eq!(read[24..], contents(0)[..32]);
    assert!(vm.destroy().is_clean());
}

#[test]
fn slots_that_the_kernel_does_not_take_are_refused_and_leave_nothing() {
    if !inside("errors::slots_that_the_kernel_does_not_take_are_refused_and_leave_nothing") {
        return;
    }
    let memory = memory();
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let plain = slot(&memory);
    let flagged = |read_only, log_dirty| MemSlot {
        flags: SlotFlags {
            read_only,
            log_dirty,
        },
        ..plain
    };
    let mut vm = guest(Tech::SevSnp, SevParams::default()).unwrap();
    let before = files();
    for bad in [
        flagged(true, false),
        flagged(false, true),
        MemSlot {
            id: SlotId(40_000),
            ..plain
        },
        MemSlot {
            gpa: Gpa::new(1 << 51),
            ..plain
        },
    ] {
        assert!(vm.set_memory_slot(bad).is_err(), "{bad:?}");
        assert_eq!(files(), before);
    }
    vm.set_memory_slot(plain).unwrap();
    assert_eq!(files(), before + 1, "its guest_memfd");
    vm.delete_memory_slot(plain.id).unwrap();
    assert_eq!(files(), before);
    assert!(vm.destroy().is_clean());
}

#[test]
fn a_snp_guest_is_asked_for_its_measurement_and_not_the_host() {
    if !inside("errors::a_snp_guest_is_asked_for_its_measurement_and_not_the_host") {
        return;
    }
    let memory = memory();
    let vm = launched(&host(), Tech::SevSnp, &memory);
    assert!(matches!(vm.measurement(), Err(Error::NotOffered(_))));
    let other = VmParams {
        enc: kvm_ops::EncParams::Td(Box::default()),
        ..VmParams::new(1)
    };
    let host = host();
    let refused = HeldVm::create(&host, host.next_vm_id(), Tech::Sev, &other);
    assert_eq!(refused.err(), Some(Error::Invalid(Field::Policy, 0)));
    assert!(vm.destroy().is_clean());
}
