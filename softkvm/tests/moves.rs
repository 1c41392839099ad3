//! Contexts that move and are copied between VMs, also by several threads at once.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::World;
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::Kernel;
use kvm_ops_uapi::checks::{init_any, move_};
use kvm_ops_uapi::sev::{self, SevInit};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::{Errno, cap, ioctl};
use zerocopy::FromZeros;

fn move_to(w: &World, to: i32, from: i32) -> common::Answer {
    w.enable(to, cap::VM_MOVE_ENC_CONTEXT_FROM, from as u64)
}

fn with_vcpus(w: &World, vcpus: u64) -> i32 {
    let vm = w.vm(vm_type::DEFAULT);
    for id in 0..vcpus {
        w.vcpu(vm, id);
    }
    vm
}

#[test]
fn a_context_wanders_through_vms_that_have_vcpus_and_kills_each_that_it_leaves() {
    let host = SimHost::new(Vendor::Amd);
    let w = World::of(&Kernel::new(host.clone()));
    for es in [false, true] {
        let first = if es {
            w.measured(4)
        } else {
            w.late_guest(false)
        };
        let mut holder = first;
        let mut vms = vec![first];
        for _ in 0..3 {
            let next = with_vcpus(&w, 4);
            move_to(&w, next, holder).unwrap();
            let dead = w.ioctl(holder, ioctl::KVM_CHECK_EXTENSION, 0);
            assert_eq!(dead.unwrap_err().errno(), Errno::EIO);
            holder = next;
            vms.push(next);
        }
        assert_eq!(move_to(&w, first, holder).unwrap_err().errno(), Errno::EIO);
        // The descriptor of the launch does not move along.
        assert_eq!(
            w.bare(holder, sev::GUEST_STATUS).unwrap_err().errno(),
            Errno::EBADF
        );
        vms.into_iter().for_each(|vm| w.task.close(vm).unwrap());
    }
    // vCPU files are left of each VM: close the process.
    drop(w);
    assert_eq!(host.live_vms(), 0);
}

#[test]
fn mirrors_move_and_outlive_their_owners_files() {
    let host = SimHost::new(Vendor::Amd);
    let w = World::of(&Kernel::new(host.clone()));
    for owner_first in [false, true] {
        let owner = w.late_guest(false);
        w.launch(owner, 0);
        let mirror = w.vm(vm_type::DEFAULT);
        w.enable(mirror, cap::VM_COPY_ENC_CONTEXT_FROM, owner as u64)
            .unwrap();
        let moved = w.vm(vm_type::DEFAULT);
        let to = w.vm(vm_type::DEFAULT);
        let (mirror_to, owner_to) = (moved, to);
        move_to(&w, mirror_to, mirror).unwrap();
        move_to(&w, owner_to, owner).unwrap();
        let mut files = [owner, mirror, mirror_to, owner_to];
        if owner_first {
            files.reverse();
        }
        files.into_iter().for_each(|vm| w.task.close(vm).unwrap());
        assert_eq!(host.live_vms(), 0, "owner first: {owner_first}");
    }
}

#[test]
fn a_guest_moves_where_no_asid_is_free() {
    let w = World::of(&Kernel::new(SimHost::new(Vendor::Amd)));
    w.task.limit_descriptors(4096);
    let first = w.late_guest(false);
    let all = |w: &World| {
        let vm = w.vm(vm_type::DEFAULT);
        w.bare(vm, sev::INIT).is_err()
    };
    assert!(
        (0..2000).any(|_| all(&w)),
        "the machine has no end of ASIDs"
    );
    let to = w.vm(vm_type::DEFAULT);
    move_to(&w, to, first).unwrap();
}

#[test]
fn a_guest_without_an_asid_is_busy_and_gets_one_when_another_ends() {
    let w = World::of(&Kernel::new(SimHost::new(Vendor::Amd)));
    w.task.limit_descriptors(4096);
    let mut guests = Vec::new();
    let refusal = loop {
        let vm = w.vm(vm_type::SEV);
        match w.command(vm, sev::INIT2, &SevInit::new_zeroed()).0 {
            Ok(_) => guests.push(vm),
            Err(refusal) => break refusal,
        }
        assert!(guests.len() < 2000, "the machine has no end of ASIDs");
    };
    assert_eq!(refusal.check(), Some(init_any::ASID));
    w.task.close(guests.pop().unwrap()).unwrap();
    w.guest(vm_type::SEV);
}

/// Threads that move contexts in all directions: at every moment one VM has each context, calls answer
/// with errnos of the table alone, and nothing is left.
#[test]
fn moves_of_several_threads_neither_lock_up_nor_lose_a_context() {
    const THREADS: usize = 3;
    const ROUNDS: usize = 2000;
    let host = SimHost::new(Vendor::Amd);
    let w = Arc::new(World::of(&Kernel::new(host.clone())));
    w.task.limit_descriptors(1 << 20);
    let guests: Vec<i32> = (0..THREADS).map(|_| w.late_guest(false)).collect();
    let moved = AtomicU64::new(0);
    let vms: Vec<i32> = (0..6)
        .map(|_| w.vm(vm_type::DEFAULT))
        .chain(guests)
        .collect();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (w, vms, moved) = (&w, &vms, &moved);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let at = round * 7 + thread * 5;
                    let (to, from) = (vms[at % vms.len()], vms[(at * 3 + 1) % vms.len()]);
                    match move_to(w, to, from) {
                        Ok(_) => drop(moved.fetch_add(1, Ordering::Relaxed)),
                        Err(refusal) => {
                            let known = [Errno::EIO, Errno::EINVAL, Errno::EBUSY];
                            assert!(known.contains(&refusal.errno()), "{refusal}");
                        }
                    }
                }
            });
        }
    });
    assert_ne!(moved.into_inner(), 0);
    let live = vms
        .iter()
        .filter(|vm| w.bare(**vm, sev::GUEST_STATUS).map_err(|r| r.errno()) == Err(Errno::EBADF));
    assert_eq!(live.count(), THREADS, "as many guests as there were");
    vms.into_iter().for_each(|vm| w.task.close(vm).unwrap());
    assert_eq!(host.live_vms(), 0);
}

/// A claim is an answer, not a wait: two threads that ask for opposite moves meet in it.
#[test]
fn opposite_moves_are_refused_or_done_and_never_wait_for_each_other() {
    let w = World::amd();
    for _ in 0..200 {
        let pair = [w.late_guest(false), w.vm(vm_type::DEFAULT)];
        let answers = thread::scope(|scope| {
            let w = &w;
            let other = scope.spawn(move || move_to(w, pair[0], pair[1]));
            let own = move_to(w, pair[1], pair[0]);
            [own, other.join().unwrap()]
        });
        let known = [move_::IDLE.errno, Errno::EINVAL, Errno::EIO];
        for refusal in answers.iter().filter_map(|answer| answer.err()) {
            assert!(known.contains(&refusal.errno()), "{refusal}");
        }
        pair.into_iter().for_each(|vm| w.task.close(vm).unwrap());
    }
}
