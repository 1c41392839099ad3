//! Lives of guests: measured starts that a guest owner would accept, memory that the host cannot
//! read, conversions, large pages, and registers.

mod common;

use common::{C, RAM, Ram, TECHS, host, measured, outcomes, page, params, sp, with_ram};
use kvm_ops_core::guest::{Action, GuestFault, Outcome};
use kvm_ops_core::{
    Backend, Error, Exit, Gfn, Gpa, Host, InitialPage, InitialPageKind, Level, PagePort, Privacy,
    PrivateSpte, Regs, Result, SevParams, SpteChange, Step, Tech, VcpuId, VcpuOps, VmOps,
};
use kvm_ops_sev::command::Command;
use kvm_ops_sev::{Failure, Operation, SevVm, Status};
use soft_amd_sp::crypto::{GuestOwner, PrivateKey};
use soft_amd_sp::measure::{
    ApiVersion, BSP_EIP, IdAuth, IdBlock, InitialVmsa, LaunchMeasure, PageInfo, PageType,
    SevDigest, SnpDigest, VMSA_GPA, Vmm,
};
use soft_amd_sp::{Instruction, PageState};

const fn read(gpa: u64, len: usize) -> Action<'static> {
    Action::Read {
        gpa: Gpa::new(gpa),
        len,
    }
}

const fn write(gpa: u64, data: &'static [u8]) -> Action<'static> {
    Action::Write {
        gpa: Gpa::new(gpa),
        data,
    }
}

fn gfn(gpa: u64) -> Gfn {
    Gfn::new(gpa >> 12)
}

/// The VMSA page of a vCPU after power-on, by the rules of the off-line tool.
fn vmsa(features: u64) -> Box<[u8; 4096]> {
    InitialVmsa {
        eip: BSP_EIP,
        vcpu_sig: 0,
        sev_features: features,
        vmm: Vmm::Qemu,
    }
    .page()
}

#[test]
fn the_snp_launch_digest_is_the_one_that_is_computed_off_line() {
    let (host, ram) = (host(1), Ram::new(0x8000));
    let mut vm = with_ram(&host, Tech::SevSnp, 2, &ram);
    let vcpus = [common::vcpu(&vm, 0), common::vcpu(&vm, 1)];
    let mut expected = SnpDigest::new();
    for (i, (kind, theirs)) in [
        (InitialPageKind::Measured, PageType::Normal),
        (InitialPageKind::Unmeasured, PageType::Unmeasured),
        (InitialPageKind::Zero, PageType::Zero),
        (InitialPageKind::Secrets, PageType::Secrets),
        (InitialPageKind::Cpuid, PageType::Cpuid),
    ]
    .into_iter()
    .enumerate()
    {
        let contents = match kind {
            InitialPageKind::Cpuid => page(0),
            _ => page(0x40 + i as u8),
        };
        let gpa = RAM + i as u64 * 4096;
        let initial = InitialPage {
            gpa: Gpa::new(gpa),
            contents: &contents,
            kind,
        };
        vm.add_initial_page(&initial).unwrap();
        expected.add_page(&PageInfo::new(theirs, gpa), &contents);
    }
    let early = Err(Error::WrongState(Step::Initialized));
    assert_eq!(vm.measurement(), early);
    vm.vm_finalize().unwrap();
    for _ in &vcpus {
        expected.add_page(&PageInfo::new(PageType::Vmsa, VMSA_GPA), &vmsa(1));
    }
    assert_eq!(vm.measurement().unwrap().bytes(), &expected.value());
    let firmware = sp(&host).snapshot().snp_guests[0].launch_digest;
    assert_eq!(firmware, expected.value());
    drop(vcpus);
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn the_guest_owner_of_a_sev_guest_accepts_the_measurement_of_what_was_loaded() {
    for (tech, policy) in [(Tech::Sev, 1_u32), (Tech::SevEs, 5)] {
        let (host, ram) = (host(2), Ram::new(0x8000));
        let platform = sp(&host);
        let mut rng = rand();
        let owner = GuestOwner::new(&platform.pdh_cert(), policy, &mut rng).unwrap();
        let sev = SevParams {
            policy: Some(policy.into()),
            session: Some((
                owner.certificate().as_bytes().to_vec(),
                owner.session().to_bytes().to_vec(),
            )),
            ..SevParams::default()
        };
        let id = host.next_vm_id();
        let mut vm = SevVm::create(&host, id, tech, &params(1, sev)).unwrap();
        vm.vm_init().unwrap();
        vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
        let vcpu = common::vcpu(&vm, 0);
        let mut digest = SevDigest::new();
        for i in 0..3_u8 {
            let contents = page(i);
            vm.add_initial_page(&measured(RAM + u64::from(i) * 4096, &contents))
                .unwrap();
            digest.update(&contents[..]);
        }
        if tech == Tech::SevEs {
            digest.update(&vmsa(0)[..]);
        }
        vm.vm_finalize().unwrap();
        let got = LaunchMeasure::from_bytes(vm.measurement().unwrap().bytes());
        let version = ApiVersion {
            major: 1,
            minor: 55,
            build: 40,
        };
        let tik = owner.keys().tik;
        let mnonce = got.mnonce;
        let wanted = LaunchMeasure::compute(&tik, version, policy, &digest.value(), mnonce);
        assert_eq!(got, wanted, "{tech}");
        drop(vcpu);
        common::free_clean(vm);
    }
}

#[test]
fn an_id_block_is_held_against_the_launch_and_a_wrong_one_can_be_put_right() {
    let (host, policy) = (host(13), 3 << 16);
    let key = PrivateKey::random(&mut rand());
    let finish = |digest: [u8; 48]| {
        let block = IdBlock::new(digest, policy);
        let auth = IdAuth::sign(&block, &key, None);
        let sev = SevParams {
            policy: Some(policy),
            host_data: [7; 32],
            id_block: Some((block.to_bytes().to_vec(), auth.as_bytes().to_vec())),
            ..SevParams::default()
        };
        let id = host.next_vm_id();
        let mut vm = SevVm::create(&host, id, Tech::SevSnp, &params(1, sev)).unwrap();
        vm.vm_init().unwrap();
        let done = vm.vm_finalize();
        let step = vm.step();
        common::free_clean(vm);
        (done, step)
    };
    let refused = Failure {
        operation: Operation::Command(Command::SnpLaunchFinish),
        code: Status::BAD_MEASUREMENT.0,
    };
    assert_eq!(finish([1; 48]), (Err(refused.into()), Step::Initialized));
    // Nothing was measured.
    assert_eq!(finish([0; 48]), (Ok(()), Step::Runnable));
    common::nothing_left(&host);
}

fn rand() -> impl rand_chacha::rand_core::CryptoRngCore {
    use rand_chacha::rand_core::SeedableRng;
    rand_chacha::ChaCha20Rng::seed_from_u64(9)
}

#[test]
fn what_a_guest_writes_privately_the_host_reads_as_ciphertext() {
    for tech in TECHS {
        let (host, ram) = (host(3), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        let contents = page(0x77);
        vm.add_initial_page(&measured(RAM, &contents)).unwrap();
        vm.vm_finalize().unwrap();
        let mut actions = vec![read(C | RAM, 4), write(C | RAM | 8, b"secret")];
        // A private page comes with the first touch; SNP accepts it first.
        if tech == Tech::SevSnp {
            let gpa = Gpa::new(RAM + 0x1000);
            let level = Level::Size4K;
            actions.push(Action::Accept { gpa, level });
        }
        actions.extend([write(C + RAM + 0x1ffe, b"ab"), read(C + RAM + 0x1ffe, 2)]);
        let log = outcomes(&vm, &mut vcpu, actions);
        assert_eq!(log[..2], ["Data([119, 119, 119, 119])", "Done"], "{tech}");
        assert_eq!(log.last().unwrap(), "Data([97, 98])", "{tech} {log:?}");
        let at = vm.page_of(gfn(RAM)).unwrap().base().unwrap();
        let mut seen = [0; 16];
        host.pages().unwrap().read(at, &mut seen).unwrap();
        assert_ne!(seen[8..14], *b"secret");
        assert_eq!(
            ram.read(0, 0x4000),
            vec![0; 0x4000],
            "{tech}: the slot shows nothing"
        );
        let refused = host.pages().unwrap().write(at, &[0]);
        let expected: Result<()> = match tech {
            Tech::SevSnp => Err(Error::Busy),
            _ => Ok(()),
        };
        assert_eq!(refused, expected, "{tech}");
        drop(vcpu);
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn a_page_is_shared_and_made_private_again_as_the_guest_asks() {
    for tech in TECHS {
        let (host, ram) = (host(4), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        vm.add_initial_page(&measured(RAM, &page(1))).unwrap();
        vm.add_initial_page(&measured(RAM + 0x1000, &page(2)))
            .unwrap();
        vm.vm_finalize().unwrap();
        let (gpa, pages) = (Gpa::new(RAM), 1);
        let log = outcomes(
            &vm,
            &mut vcpu,
            vec![
                Action::Share { gpa, pages },
                write(RAM, b"shared"),
                read(C + RAM + 0x1000, 1),
            ],
        );
        assert_eq!(log, ["Done", "Done", "Data([2])"], "{tech}");
        assert_eq!(ram.read(0, 6), b"shared");
        assert_eq!(vm.page_of(gfn(RAM)), None);
        ram.write(0, b"answer");
        let log = outcomes(
            &vm,
            &mut vcpu,
            vec![
                read(RAM, 6),
                Action::Unshare { gpa, pages },
                write(C | RAM, b"hidden"),
                read(C | RAM, 6),
            ],
        );
        let data = |text: &[u8]| format!("{:?}", Outcome::Data(text));
        assert_eq!(
            log,
            [&data(b"answer"), "Done", "Done", &data(b"hidden")],
            "{tech}"
        );
        assert_eq!(ram.read(0, 6), b"answer", "{tech}");
        drop(vcpu);
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn without_snp_a_frame_has_one_memory_and_the_c_bit_says_how_it_is_read() {
    for tech in [Tech::Sev, Tech::SevEs] {
        let (host, ram) = (host(4), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 1, &ram);
        let mut vcpu = common::vcpu(&vm, 0);
        vm.add_initial_page(&measured(RAM, &page(0x77))).unwrap();
        vm.vm_finalize().unwrap();
        let data = |bytes: &[u8]| format!("{:?}", Outcome::Data(bytes));
        let plain = data(&[0x77; 16]);
        // Without the C-bit it finds ciphertext, and nothing is lost by that.
        let log = outcomes(&vm, &mut vcpu, vec![read(RAM, 16)]);
        assert_eq!(log, [data(&ram.read(0, 16))], "{tech}");
        assert_ne!(log[0], plain, "{tech}");
        assert_eq!(vm.privacy(gfn(RAM)), Privacy::Shared);
        let log = outcomes(&vm, &mut vcpu, vec![read(C | RAM, 16)]);
        assert_eq!(log[0], plain, "{tech}");
        assert_eq!(vm.privacy(gfn(RAM)), Privacy::Private);
        // The same for the host.
        ram.write(0, &[0; 16]);
        assert!(vm.show_to_host(gfn(RAM)));
        assert!(![vec![0; 16], vec![0x77; 16]].contains(&ram.read(0, 16)));
        let log = outcomes(&vm, &mut vcpu, vec![read(C | RAM, 16)]);
        assert_eq!(log[0], plain, "{tech}");
        // What is written without the C-bit is for the host, and garbage with it. So is what the host writes.
        let other = RAM + 0x1000;
        let written = vec![write(C | other, b"hidden"), write(other, b"shared")];
        assert_eq!(outcomes(&vm, &mut vcpu, written), ["Done", "Done"]);
        assert_eq!(ram.read(0x1000, 6), b"shared");
        ram.write(0x1000, b"answer");
        let log = outcomes(&vm, &mut vcpu, vec![read(other, 6), read(C | other, 6)]);
        assert_eq!(log[0], data(b"answer"), "{tech}");
        assert!(![data(b"answer"), data(b"hidden")].contains(&log[1]));
        // A conversion gives the page back that is kept for a frame.
        assert!(vm.show_to_host(gfn(RAM)));
        let held = vm.account().held();
        for to in [Privacy::Private, Privacy::Shared] {
            assert_eq!(vm.set_memory_attributes(gfn(RAM), 1, to), Ok(1));
            assert_eq!(vm.account().held(), held - 1);
        }
        // No slot is there.
        assert!(!vm.show_to_host(gfn(0x9000_0000)));
        drop(vcpu);
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn an_snp_guest_that_touches_memory_of_the_other_kind_leaves_as_a_memory_fault() {
    let (host, ram) = (host(5), Ram::new(0x4000));
    let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    let mut vcpu = common::vcpu(&vm, 0);
    vm.vm_finalize().unwrap();
    vm.set_memory_attributes(gfn(RAM + 0x1000), 1, Privacy::Shared)
        .unwrap();
    let fault = |gpa, access| Exit::MemoryFault {
        gpa: Gpa::new(gpa),
        bytes: 4096,
        access,
    };
    for (touch, exit) in [
        (read(RAM + 0x10, 1), fault(RAM, Privacy::Shared)),
        (
            read(C + RAM + 0x1010, 1),
            fault(RAM + 0x1000, Privacy::Private),
        ),
        (
            read(C | 0x9000_0000, 1),
            fault(0x9000_0000, Privacy::Private),
        ),
    ] {
        let (probe, log) = common::Probe::new(vec![touch]);
        common::load(&mut vcpu, probe);
        assert_eq!(vcpu.vcpu_run(), Ok(exit), "{touch:?}");
        assert!(log.lock().unwrap().is_empty());
    }
    // A frame without a slot is MMIO.
    let (probe, _) = common::Probe::new(vec![read(0x9000_0000, 4)]);
    common::load(&mut vcpu, probe);
    assert!(matches!(vcpu.vcpu_run(), Ok(Exit::MmioRead { len: 4, .. })));
    drop(vcpu);
    common::free_clean(vm);
}

#[test]
fn an_snp_guest_cannot_use_what_it_did_not_accept_and_accepts_once() {
    let (host, ram) = (host(6), Ram::new(0x4000));
    let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    let mut vcpu = common::vcpu(&vm, 0);
    vm.vm_finalize().unwrap();
    let (gpa, level) = (Gpa::new(RAM), Level::Size4K);
    let accept = Action::Accept { gpa, level };
    let log = outcomes(
        &vm,
        &mut vcpu,
        vec![read(C | RAM, 1), accept, accept, write(C | RAM, b"x")],
    );
    let fault = |fault| format!("{:?}", Outcome::Fault(fault));
    assert_eq!(
        log,
        [
            fault(GuestFault::NotAccepted(Gpa::new(C | RAM))),
            String::from("Done"),
            fault(GuestFault::Refused(255)),
            String::from("Done"),
        ]
    );
    drop(vcpu);
    common::free_clean(vm);
}

#[test]
fn a_large_page_is_one_rmp_entry_until_part_of_it_goes() {
    let (host, ram) = (host(7), Ram::new(4 << 20));
    let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    let mut vcpu = common::vcpu(&vm, 0);
    vm.vm_finalize().unwrap();
    let first = gfn(RAM);
    assert_eq!(vm.pre_fault_memory(first, 1024), Ok(1024));
    let counts = |instruction| sp(&host).counters().calls(instruction);
    let updates = counts(Instruction::RmpUpdate);
    let large = vm.page_of(first).unwrap();
    assert_eq!(
        vm.gmem_max_mapping_level(large, Privacy::Private),
        Level::Size2M
    );
    assert_eq!(
        vm.pre_fault_memory(first, 1024),
        Ok(1024),
        "nothing is left to do"
    );
    assert_eq!(counts(Instruction::RmpUpdate), updates);

    // The guest accepts the first as a whole, and one page of the second, which splits it.
    let (gpa, level) = (Gpa::new(RAM), Level::Size2M);
    let small = Gpa::new(RAM + (2 << 20) + 0x5000);
    let log = outcomes(
        &vm,
        &mut vcpu,
        vec![
            Action::Accept { gpa, level },
            write(C + RAM + 0x1f_f000, b"end"),
            Action::Accept {
                gpa: small,
                level: Level::Size4K,
            },
            write(C | small.get(), b"small"),
        ],
    );
    assert_eq!(log, ["Done"; 4]);
    assert_eq!(counts(Instruction::Psmash), 1);

    // The part of a page that the guest accepted stays accepted when another part is shared.
    assert_eq!(
        vm.set_memory_attributes(Gfn::new(first.get() + 3), 2, Privacy::Shared),
        Ok(2)
    );
    assert_eq!(counts(Instruction::Psmash), 2);
    assert_eq!(
        vm.gmem_max_mapping_level(large, Privacy::Private),
        Level::Size4K
    );
    let log = outcomes(&vm, &mut vcpu, vec![read(C + RAM + 0x1f_f000, 3)]);
    assert_eq!(log, [format!("{:?}", Outcome::Data(b"end"))]);
    let states = sp(&host).snapshot().pages_by_state();
    let guest = states[&PageState::GuestValid] + states[&PageState::GuestInvalid];
    // Without the two that went, and with the VMSA.
    assert_eq!(guest, 1024 - 2 + 1);
    drop(vcpu);
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn the_hook_takes_changes_that_fit_what_is_there_and_no_others() {
    let (host, ram) = (host(8), Ram::new(4 << 20));
    let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    vm.add_initial_page(&measured(RAM + 0x1000, &page(1)))
        .unwrap();
    vm.vm_finalize().unwrap();
    let pages = host.pages().unwrap();
    let (a, b) = (
        pages.alloc(Level::Size4K).unwrap(),
        pages.alloc(Level::Size4K).unwrap(),
    );
    let change = |at: u64, old, new| {
        // SAFETY: the test owns both pages, and the changes that do not fit are refused.
        let change = unsafe { SpteChange::new(gfn(at), Level::Size4K, old, new) };
        vm.set_private_spte(&change)
    };
    let (absent, on_a, on_b) = (
        PrivateSpte::Absent,
        PrivateSpte::Mapped(a.pfn()),
        PrivateSpte::Mapped(b.pfn()),
    );
    let held = vm.account().held();
    assert_eq!(change(RAM, absent, on_a), Ok(()));
    let before = sp(&host).snapshot();
    for (at, old, new) in [
        (RAM, absent, on_b),          // taken
        (RAM + 0x2000, absent, on_a), // the page is a guest's
        (RAM, on_b, absent),          // not that page
        (RAM + 0x2000, on_a, absent), // not there
        (RAM, on_a, on_b),            // no such change
        (RAM, on_a, PrivateSpte::Blocked(a.pfn())),
        (RAM, on_a, PrivateSpte::Table(a.pfn())),
        (1 << 51, absent, on_b), // beyond the C-bit
    ] {
        assert!(change(at, old, new).is_err(), "{at:#x} {old:?} {new:?}");
    }
    assert_eq!(sp(&host).snapshot(), before);
    assert_eq!(change(RAM, on_a, absent), Ok(()));
    assert_eq!(vm.account().held(), held, "the pages are the test's");
    pages.free(a).unwrap();
    pages.free(b).unwrap();
    common::free_clean(vm);
    common::nothing_left(&host);
}

#[test]
fn registers_are_the_hosts_until_the_launch_makes_them_the_guests() {
    // Bit 1 of RFLAGS is always set in a processor.
    let regs = Regs {
        rax: 0x1234,
        rflags: 2,
        ..Regs::default()
    };
    for tech in TECHS {
        let host = host(9);
        let mut vm = common::create(&host, tech, 2);
        vm.vm_init().unwrap();
        let mut vcpu = common::vcpu(&vm, 0);
        vcpu.set_regs(&regs).unwrap();
        assert_eq!(vcpu.regs(), Ok(regs));
        vm.vm_finalize().unwrap();
        let secret = tech != Tech::Sev;
        assert_eq!(vcpu.is_protected(), secret);
        let sregs = kvm_ops_core::Sregs::default();
        let refused = |done: Result<()>| matches!(done, Err(Error::Protected(_)));
        assert_eq!(refused(vcpu.regs().map(drop)), secret);
        assert_eq!(refused(vcpu.set_regs(&Regs::default())), secret);
        assert_eq!(refused(vcpu.sregs().map(drop)), secret);
        assert_eq!(refused(vcpu.set_sregs(&sregs)), secret);
        assert_eq!(refused(vcpu.msrs(&mut [])), secret);
        assert_eq!(refused(vcpu.set_msrs(&[])), secret);
        assert_eq!(refused(vcpu.events().map(drop)), secret);
        assert_eq!(refused(vcpu.set_cpuid(&[])), secret);
        assert_eq!(refused(vcpu.vcpu_reset(true)), secret);
        // Register state that was not measured cannot come later.
        let late = vm.create_vcpu(VcpuId(1)).err();
        assert_eq!(late, secret.then_some(Error::WrongState(Step::Runnable)));
        drop(vcpu);
        common::free_clean(vm);
    }
}

#[test]
fn start_state_that_was_set_is_what_is_measured() {
    let digest = |rip: Option<u64>| {
        let host = host(10);
        let mut vm = common::create(&host, Tech::SevSnp, 1);
        vm.vm_init().unwrap();
        let mut vcpu = common::vcpu(&vm, 0);
        if let Some(rip) = rip {
            let regs = Regs {
                rip,
                ..vcpu.regs().unwrap()
            };
            vcpu.set_regs(&regs).unwrap();
        }
        vm.vm_finalize().unwrap();
        let digest = *vm.measurement().unwrap().bytes();
        assert_eq!(digest, sp(&host).snapshot().snp_guests[0].launch_digest);
        drop(vcpu);
        common::free_clean(vm);
        digest
    };
    assert_eq!(digest(None), digest(Some(0xfff0)));
    assert_ne!(digest(None), digest(Some(0x1000)));
}

#[test]
fn a_vcpu_whose_vm_is_gone_answers_wrong_state_and_a_running_one_is_stopped() {
    for tech in TECHS {
        let (host, ram) = (host(11), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 2, &ram);
        let mut idle = common::vcpu(&vm, 0);
        let mut busy = common::vcpu(&vm, 1);
        assert_eq!(idle.vcpu_run(), Err(Error::WrongState(Step::Initialized)));
        vm.vm_finalize().unwrap();
        let (inside, ran) = std::sync::mpsc::channel();
        let spin = kvm_ops_core::guest::FnProgram(move |_: Outcome<'_>| {
            let _ = inside.send(());
            read(RAM, 1)
        });
        vm.set_memory_attributes(gfn(RAM), 1, Privacy::Shared)
            .unwrap();
        common::load(&mut busy, spin);
        let thread = std::thread::spawn(move || {
            let first = busy.vcpu_run().map(|exit| exit == Exit::Interrupted);
            (first, busy.vcpu_run().map(drop))
        });
        ran.recv().unwrap();
        let key = vm.mmu_release_hkid().unwrap();
        let gone = Error::WrongState(Step::KeyReleased);
        // Between the kick and the step's change it was busy, not gone.
        let (first, second) = thread.join().unwrap();
        assert_eq!(first, Ok(true));
        assert!(
            [Err(gone), Err(Error::Busy)].contains(&second),
            "{second:?}"
        );
        assert_eq!(idle.vcpu_run(), Err(gone));
        let drained = vm.drain_private(key).unwrap();
        assert!(vm.vm_free(drained).is_clean());
        assert_eq!(idle.vcpu_run(), Err(Error::WrongState(Step::Drained)));
        drop(idle);
        common::nothing_left(&host);
    }
}

#[test]
fn a_deleted_slot_takes_the_private_pages_in_its_place_with_it() {
    for tech in TECHS {
        let (host, ram) = (host(12), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 1, &ram);
        vm.add_initial_page(&measured(RAM, &page(1))).unwrap();
        vm.vm_finalize().unwrap();
        let held = vm.account().held();
        vm.delete_memory_slot(&ram.slot(0, RAM)).unwrap();
        assert_eq!(vm.account().held(), held - 1);
        assert_eq!(vm.page_of(gfn(RAM)), None);
        assert_eq!(
            vm.pre_fault_memory(gfn(RAM), 1).map_err(|e| e.errno()),
            Err(2)
        );
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn attributes_exist_only_where_a_slot_is() {
    for tech in TECHS {
        let (host, ram) = (host(14), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 1, &ram);
        vm.vm_finalize().unwrap();
        let first = gfn(RAM);
        let set = |first: Gfn, pages| vm.set_memory_attributes(first, pages, Privacy::Shared);
        let nothing_at = |gfn: u64| Err(Error::NotFound(kvm_ops_core::Field::Gfn, gfn));
        let past = first.get() + 4;
        assert_eq!(set(Gfn::new(past), 1), nothing_at(past), "{tech}");
        assert_eq!(set(Gfn::new(0), 1), nothing_at(0));
        assert_eq!(set(first, 1 << 30), Ok(4));
        assert_eq!(vm.set_memory_attributes(first, 4, Privacy::Private), Ok(4));
        // Two slots side by side are one range.
        let more = Ram::new(0x2000);
        vm.set_memory_slot(&more.slot(1, RAM + 0x4000)).unwrap();
        assert_eq!(set(Gfn::new(past - 1), 3), Ok(3));
        // A slot goes with its attributes.
        vm.delete_memory_slot(&more.slot(1, RAM + 0x4000)).unwrap();
        vm.set_memory_slot(&more.slot(2, RAM + 0x4000)).unwrap();
        assert_eq!(vm.pre_fault_memory(Gfn::new(past), 2), Ok(2));
        let shared = vm.pre_fault_memory(Gfn::new(past - 1), 1);
        assert_eq!(shared, nothing_at(past - 1));
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn a_slot_of_another_place_is_refused_and_takes_no_private_page_with_it() {
    for tech in TECHS {
        let (host, ram) = (host(15), Ram::new(0x4000));
        let mut vm = with_ram(&host, tech, 1, &ram);
        vm.vm_finalize().unwrap();
        assert_eq!(vm.pre_fault_memory(gfn(RAM), 4), Ok(4));
        let elsewhere = ram.slot(0, RAM + 0x2000);
        let exists = Err(Error::Exists(kvm_ops_core::Field::Slot, 0));
        assert_eq!(vm.set_memory_slot(&elsewhere), exists, "{tech}");
        let unknown = Err(Error::NotFound(kvm_ops_core::Field::Slot, 0));
        assert_eq!(vm.delete_memory_slot(&elsewhere), unknown);
        assert_eq!(vm.pre_fault_memory(gfn(RAM), 4), Ok(4));
        common::free_clean(vm);
        common::nothing_left(&host);
    }
}

#[test]
fn a_conversion_that_fails_leaves_the_attributes_as_they_were() {
    let (host, ram) = (host(16), Ram::new(2 << 20));
    let mut vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    vm.vm_finalize().unwrap();
    let (first, level) = (gfn(RAM), Level::Size2M);
    assert_eq!(vm.pre_fault_memory(first, 512), Ok(512));
    let large = vm.page_of(first).unwrap();
    sp(&host).fail(soft_amd_sp::Failure {
        operation: Instruction::Psmash.into(),
        nth: 1,
        code: 2,
    });
    let part = Gfn::new(first.get() + 1);
    assert!(vm.set_memory_attributes(part, 1, Privacy::Shared).is_err());
    let (old, new) = (PrivateSpte::Mapped(large), PrivateSpte::Absent);
    // SAFETY: the page is the guest's, and the test does not use it afterwards.
    let change = unsafe { SpteChange::new(first, level, old, new) };
    vm.set_private_spte(&change).unwrap();
    // It is private still: a page may come.
    assert_eq!(vm.pre_fault_memory(part, 1), Ok(1));
    assert!(common::free(vm).is_clean());
    assert_eq!(
        host.pages().unwrap().frames_out(),
        512,
        "the large page is the test's"
    );
}
