//! What a mirror's guest finds: the contents of its own slots' memory, whatever the owner shows of it.

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use kvm_ops_core::guest::{Action, FnProgram, Outcome};
use kvm_ops_core::*;
use kvm_ops_sev::{SevVcpu, SevVm};
use kvm_ops_sim::SimHost;
use proptest::prelude::*;

const PAGES: u64 = 4;

/// A VM with one vCPU.
struct Guest {
    vm: SevVm<SimHost>,
    vcpu: SevVcpu<SimHost>,
}

/// The byte that the guest finds with the C-bit, or `None` if it leaves with a memory fault.
fn read(vcpu: &mut SevVcpu<SimHost>, gpa: u64) -> Option<u8> {
    let found = Arc::new(Mutex::new(0));
    let told = Arc::clone(&found);
    load(
        vcpu,
        FnProgram(move |last: Outcome<'_>| match last {
            Outcome::Data(data) => {
                *told.lock().unwrap() = data[0];
                Action::Shutdown
            }
            _ => Action::Read {
                gpa: Gpa::new(C | gpa),
                len: 1,
            },
        }),
    );
    match vcpu.vcpu_run().unwrap() {
        Exit::Shutdown => Some(*found.lock().unwrap()),
        Exit::MemoryFault { .. } => None,
        other => panic!("{other:?}"),
    }
}

fn write(vcpu: &mut SevVcpu<SimHost>, gpa: u64, byte: u8) {
    load(
        vcpu,
        FnProgram(move |last: Outcome<'_>| match last {
            Outcome::Done => Action::Shutdown,
            _ => Action::Write {
                gpa: Gpa::new(C | gpa),
                data: match byte {
                    0 => &[0],
                    1 => &[1],
                    2 => &[2],
                    _ => &[3],
                },
            },
        }),
    );
    assert!(matches!(vcpu.vcpu_run(), Ok(Exit::Shutdown)));
}

/// An owner without slots, and a mirror with the memory at `at`.
fn pair(host: &SimHost, ram: &Ram, at: u64) -> (Guest, Guest) {
    let mut owner = create(host, Tech::Sev, 1);
    owner.vm_init().unwrap();
    let vcpu = vcpu(&owner, 0);
    owner.vm_finalize().unwrap();
    let mut owner = Guest { vm: owner, vcpu };
    let mut mirror = create(host, Tech::Sev, 1);
    SevVm::copy_context(&mut owner.vm, &mut mirror).unwrap();
    mirror.set_memory_slot(&ram.slot(0, at)).unwrap();
    let vcpu = common::vcpu(&mirror, 0);
    (owner, Guest { vm: mirror, vcpu })
}

fn end(guest: Guest) {
    drop(guest.vcpu);
    free_clean(guest.vm);
}

#[test]
fn a_mirror_reaches_its_memory_after_the_owners_slot_is_gone_and_the_owner_finds_its_writes() {
    let (host, ram) = (host(3), Ram::new(PAGES * PAGE));
    let at = RAM + (8 << 20);
    let (mut owner, mut mirror) = pair(&host, &ram, at);
    owner.vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    write(&mut owner.vcpu, RAM + PAGE, 1);
    assert_eq!(read(&mut mirror.vcpu, at + PAGE), Some(1));
    owner.vm.delete_memory_slot(&ram.slot(0, RAM)).unwrap();
    assert_eq!(read(&mut mirror.vcpu, at + PAGE), Some(1));
    write(&mut mirror.vcpu, at + PAGE, 2);
    write(&mut mirror.vcpu, at, 3);
    let elsewhere = RAM + (4 << 20);
    owner.vm.set_memory_slot(&ram.slot(0, elsewhere)).unwrap();
    assert_eq!(read(&mut owner.vcpu, elsewhere + PAGE), Some(2));
    assert_eq!(read(&mut owner.vcpu, elsewhere), Some(3));
    end(owner);
    assert_eq!(read(&mut mirror.vcpu, at + PAGE), Some(2), "its owner went");
    write(&mut mirror.vcpu, at + 2 * PAGE, 1);
    assert_eq!(read(&mut mirror.vcpu, at + 2 * PAGE), Some(1));
    end(mirror);
    nothing_left(&host);
}

#[test]
fn a_mirror_without_a_slot_any_more_has_no_mapping_of_its_owners_pages() {
    let (host, ram) = (host(4), Ram::new(PAGES * PAGE));
    let at = RAM + (8 << 20);
    let (mut owner, mut mirror) = pair(&host, &ram, at);
    owner.vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    write(&mut owner.vcpu, RAM, 1);
    assert_eq!(read(&mut mirror.vcpu, at), Some(1));
    mirror.vm.delete_memory_slot(&ram.slot(0, at)).unwrap();
    assert_eq!(read(&mut mirror.vcpu, at), None);
    assert_eq!(read(&mut owner.vcpu, RAM), Some(1));
    end(mirror);
    end(owner);
    nothing_left(&host);
}

#[test]
fn memory_that_the_embedder_took_away_costs_no_page_until_it_is_used_again() {
    let (host, ram) = (host(5), Ram::new(PAGES * PAGE));
    let at = RAM + (8 << 20);
    let (owner, mut mirror) = pair(&host, &ram, at);
    write(&mut mirror.vcpu, at, 1);
    let memory = EncRegion {
        address: ram.address(),
        bytes: PAGES * PAGE,
    };
    mirror.vm.delete_memory_slot(&ram.slot(0, at)).unwrap();
    let held = host.pages().unwrap().frames_out();
    owner.vm.forget_memory(memory);
    assert_eq!(host.pages().unwrap().frames_out(), held - 1);
    mirror.vm.set_memory_slot(&ram.slot(0, at)).unwrap();
    write(&mut mirror.vcpu, at, 2);
    assert_eq!(host.pages().unwrap().frames_out(), held);
    end(mirror);
    end(owner);
    nothing_left(&host);
}

#[derive(Clone, Copy, Debug)]
enum Change {
    /// The owner shows the memory at one of three places, or nowhere.
    Show(Option<u64>),
    /// The mirror's slot goes to another place.
    Shift(u64),
    OwnerWrites(u64, u8),
    MirrorWrites(u64, u8),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        proptest::option::of(0..3u64).prop_map(Change::Show),
        (0..3u64).prop_map(Change::Shift),
        (0..PAGES, 0..4u8).prop_map(|(page, byte)| Change::OwnerWrites(page, byte)),
        (0..PAGES, 0..4u8).prop_map(|(page, byte)| Change::MirrorWrites(page, byte)),
    ]
}

const fn place(n: u64) -> u64 {
    RAM + n * (4 << 20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// As long as one of the two shows the memory, its contents are those of an array, from wherever they are seen.
    #[test]
    fn contents_are_the_memorys(
        changes in proptest::collection::vec(change(), 1..40),
        owner_first in any::<bool>(),
    ) {
        let (host, ram) = (host(6), Ram::new(PAGES * PAGE));
        let (mut owner, mut mirror) = pair(&host, &ram, place(0));
        // The mirror's memory is seen twice while the slot shifts, so that it stays.
        let (mut shown, mut mirrored) = (None, 0);
        let mut model = [0; PAGES as usize];
        for page in 0..PAGES {
            write(&mut mirror.vcpu, place(0) + page * PAGE, 0);
        }
        for change in changes {
            match change {
                Change::Show(to) => {
                    if let Some(at) = shown {
                        owner.vm.delete_memory_slot(&ram.slot(0, place(at))).unwrap();
                    }
                    if let Some(at) = to {
                        owner.vm.set_memory_slot(&ram.slot(0, place(at))).unwrap();
                    }
                    shown = to;
                }
                Change::Shift(to) if to != mirrored => {
                    let id = to as u32;
                    mirror.vm.set_memory_slot(&ram.slot(id, place(to))).unwrap();
                    let old = ram.slot(mirrored as u32, place(mirrored));
                    mirror.vm.delete_memory_slot(&old).unwrap();
                    prop_assert_eq!(read(&mut mirror.vcpu, place(mirrored)), None);
                    mirrored = to;
                }
                Change::Shift(_) => {}
                Change::OwnerWrites(page, byte) => {
                    if let Some(at) = shown {
                        write(&mut owner.vcpu, place(at) + page * PAGE, byte);
                        model[page as usize] = byte;
                    }
                }
                Change::MirrorWrites(page, byte) => {
                    write(&mut mirror.vcpu, place(mirrored) + page * PAGE, byte);
                    model[page as usize] = byte;
                }
            }
            for (page, byte) in (0..).zip(model) {
                let at = place(mirrored) + page * PAGE;
                prop_assert_eq!(read(&mut mirror.vcpu, at), Some(byte));
                if let Some(at) = shown {
                    let at = place(at) + page * PAGE;
                    prop_assert_eq!(read(&mut owner.vcpu, at), Some(byte));
                }
            }
        }
        if owner_first {
            end(owner);
            for (page, byte) in (0..).zip(model) {
                let at = place(mirrored) + page * PAGE;
                prop_assert_eq!(read(&mut mirror.vcpu, at), Some(byte));
            }
            end(mirror);
        } else {
            end(mirror);
            end(owner);
        }
        nothing_left(&host);
    }
}
