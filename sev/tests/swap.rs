//! Pages of an SNP guest in a file: the guest goes on as it was, and no page that the host touched comes back.

mod common;
mod swap_support;

use common::*;
use kvm_ops_core::guest::{Action, Script};
use kvm_ops_core::{
    Backend, Error, Exit, Gfn, Gpa, Host, Level, Privacy, Step, Tech, VcpuOps, VmOps,
};
use kvm_ops_sev::{SevVm, Status, SwapSlot, SwapStore};
use kvm_ops_sim::SimHost;
use proptest::prelude::*;
use soft_amd_sp::RmpEntry;
use swap_support::{FileStore, Tampered, contents, guest, guest_of, leaves_by, status};

const FIRST: u64 = RAM >> 12;

fn frames_out(host: &SimHost) -> u64 {
    host.pages().unwrap().frames_out()
}

/// The guest's entries of the RMP but for the places of its pages, and their number.
fn entries(host: &SimHost) -> Vec<String> {
    let ranges = sp(host).snapshot().rmp;
    let guests = ranges.iter().filter(|range| range.entry.asid != 0);
    let mut all: Vec<String> = guests
        .flat_map(|range| (0..range.pages as u64).map(move |n| (range.entry, n)))
        .map(|(entry, n)| {
            let gpa = entry.gpa + n * PAGE;
            format!("{:?}", RmpEntry { gpa, ..entry })
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_guest_lies_in_a_file_and_goes_on_as_it_was() {
    // With one page of records, with several, and with two levels of them.
    for pages in [3, 64, 200] {
        let (host, ram) = (host(1), Ram::new(1 << 20));
        let (vm, mut vcpu) = guest(&host, &ram, pages);
        let before = contents(&host, &vm, pages);
        let (account, rmp) = (vm.account().held(), entries(&host));
        let facts = (vm.measurement(), vm.context_facts(), vm.guest_status());

        let mut file = FileStore::new();
        let out = vm.suspend(&mut file).unwrap();
        assert_eq!(out.pages, pages + 1, "and the VMSA");
        assert_eq!(
            out.records,
            [1, 3, 5][[3, 64, 200].iter().position(|n| *n == pages).unwrap()]
        );
        assert_eq!(
            (vm.account().held(), frames_out(&host)),
            (1, 1),
            "the context"
        );
        assert_eq!(vcpu.vcpu_run().err(), Some(Error::Busy));
        assert!(
            file.bytes()
                .chunks(16)
                .all(|block| block.iter().any(|b| *b != block[0]))
        );

        vm.resume(&mut file).unwrap();
        assert_eq!(contents(&host, &vm, pages), before);
        assert_eq!((vm.account().held(), entries(&host)), (account, rmp));
        assert_eq!(
            (vm.measurement(), vm.context_facts(), vm.guest_status()),
            facts
        );
        assert!(leaves_by(&mut vcpu, 0x81));
        drop(vcpu);
        free_clean(vm);
        nothing_left(&host);
    }
}

#[test]
fn pages_of_a_guest_that_runs_leave_and_come_when_they_are_touched() {
    let (host, ram) = (host(2), Ram::new(1 << 20));
    let (vm, mut vcpu) = guest(&host, &ram, 8);
    let read = Action::Read {
        gpa: Gpa::new(C | (RAM + 0x3000)),
        len: 4,
    };
    let (probe, log) = Probe::new(vec![read]);
    load(&mut vcpu, probe);
    let mut file = FileStore::new();
    let third = Gfn::new(FIRST + 3);
    let before = frames_out(&host);
    assert_eq!(vm.swap_out(Gfn::new(FIRST + 2), 4, &mut file), Ok(4));
    assert!(vm.is_swapped_out(third) && vm.page_of(third).is_none());
    assert_eq!(frames_out(&host), before - 4 + 1, "a page of records");
    // No fresh page takes its place.
    assert_eq!(
        vm.pre_fault_memory(third, 1),
        Err(Error::Exists(kvm_ops_core::Field::Gfn, third.get()))
    );
    for _ in 0..2 {
        let exit = vcpu.vcpu_run().unwrap();
        assert!(
            matches!(exit, Exit::MemoryFault { gpa, access: Privacy::Private, .. } if Gfn::containing(gpa) == third),
            "{exit:?}"
        );
    }
    assert_eq!(vm.swap_in(third, 1, &mut file), Ok(1));
    assert_eq!(vm.swap_in(third, 1, &mut file), Ok(0), "it is back");
    run(&vm, &mut vcpu);
    assert_eq!(*log.lock().unwrap(), ["Data([3, 3, 3, 3])"]);
    // It leaves again, and all come.
    assert_eq!(vm.swap_out(third, 1, &mut file), Ok(1));
    assert_eq!(vm.swap_in(Gfn::new(0), 1 << 30, &mut file), Ok(4));
    assert_eq!(frames_out(&host), before);
    assert_eq!(
        contents(&host, &vm, 8),
        (0..8).map(|n| vec![n; 4096]).collect::<Vec<_>>()
    );
    drop(vcpu);
    free_clean(vm);
    nothing_left(&host);
}

#[test]
fn large_pages_leave_and_come_as_such_unless_a_part_of_them_does() {
    let (host, ram) = (host(3), Ram::new(6 << 20));
    let (mut vm, vcpu) = (with_ram(&host, Tech::SevSnp, 1, &ram), ());
    let vcpu = (vcpu, common::vcpu(&vm, 0)).1;
    vm.vm_finalize().unwrap();
    let large = Gfn::new(FIRST + 512);
    assert_eq!(vm.pre_fault_memory(large, 512), Ok(512));
    let level = |vm: &SevVm<SimHost>| {
        vm.gmem_max_mapping_level(vm.page_of(large).unwrap(), Privacy::Private)
    };
    let mut file = FileStore::new();
    let out = vm.suspend(&mut file).unwrap();
    assert_eq!((out.pages, out.records), (513, 1));
    vm.resume(&mut file).unwrap();
    assert_eq!(level(&vm), Level::Size2M);
    assert_eq!(vm.swap_out(Gfn::new(large.get() + 7), 1, &mut file), Ok(1));
    assert_eq!(level(&vm), Level::Size4K);
    assert_eq!(vm.swap_in(large, 512, &mut file), Ok(1));
    drop(vcpu);
    free_clean(vm);
    nothing_left(&host);
}

#[test]
fn a_frame_that_is_converted_or_loses_its_slot_while_it_is_out_is_given_up() {
    let (host, ram) = (host(4), Ram::new(1 << 20));
    let (vm, vcpu) = guest(&host, &ram, 8);
    let mut file = FileStore::new();
    assert_eq!(vm.swap_out(Gfn::new(FIRST), 8, &mut file), Ok(8));
    let second = Gfn::new(FIRST + 1);
    assert_eq!(vm.set_memory_attributes(second, 2, Privacy::Shared), Ok(2));
    assert!(!vm.is_swapped_out(second));
    // A record whose page was given up is of no use, and the others are.
    assert_eq!(vm.swap_in(Gfn::new(FIRST), 8, &mut file), Ok(6));
    assert_eq!(vm.swap_out(Gfn::new(FIRST), 8, &mut file), Ok(6));
    assert_eq!(vm.delete_memory_slot(&ram.slot(0, RAM)), Ok(()));
    assert_eq!(vm.swap_in(Gfn::new(FIRST), 8, &mut file), Ok(0));
    drop(vcpu);
    free_clean(vm);
    nothing_left(&host);
}

#[test]
fn a_guest_ends_wherever_its_pages_are() {
    for suspended in [false, true] {
        let (host, ram) = (host(5), Ram::new(1 << 20));
        let (vm, vcpu) = guest(&host, &ram, 70);
        let mut file = FileStore::new();
        match suspended {
            true => drop(vm.suspend(&mut file).unwrap()),
            false => drop(vm.swap_out(Gfn::new(FIRST), 66, &mut file).unwrap()),
        }
        drop(vcpu);
        free_clean(vm);
        nothing_left(&host);
    }
}

#[test]
fn a_guest_moves_with_its_pages_that_are_out_but_not_while_it_is_suspended() {
    let (host, ram) = (host(6), Ram::new(1 << 20));
    let (mut vm, vcpu) = guest(&host, &ram, 8);
    let mut to = with_ram(&host, Tech::SevSnp, 1, &ram);
    let there = common::vcpu(&to, 0);
    let mut file = FileStore::new();
    vm.suspend(&mut file).unwrap();
    assert_eq!(SevVm::move_context(&mut vm, &mut to), Err(Error::Busy));
    vm.resume(&mut file).unwrap();
    assert_eq!(vm.swap_out(Gfn::new(FIRST), 5, &mut file), Ok(5));
    SevVm::move_context(&mut vm, &mut to).unwrap();
    assert_eq!(vm.suspend(&mut file), Err(Error::Poisoned));
    assert_eq!(to.swap_in(Gfn::new(FIRST), 8, &mut file), Ok(5));
    assert_eq!(
        contents(&host, &to, 8),
        (0..8).map(|n| vec![n; 4096]).collect::<Vec<_>>()
    );
    drop((vcpu, there));
    free_clean(vm);
    free_clean(to);
    nothing_left(&host);
}

#[test]
fn only_a_guest_of_snp_that_runs_and_whose_policy_allows_it_is_swapped() {
    for tech in [Tech::Sev, Tech::SevEs] {
        let (host, ram) = (host(7), Ram::new(1 << 20));
        let mut vm = with_ram(&host, tech, 1, &ram);
        vm.vm_finalize().unwrap();
        let refused = vm.suspend(&mut FileStore::new()).unwrap_err();
        assert!(matches!(refused, Error::NotOffered(_)), "{refused}");
        free_clean(vm);
    }
    let (host, ram) = (host(7), Ram::new(1 << 20));
    let vm = with_ram(&host, Tech::SevSnp, 1, &ram);
    let early = vm.suspend(&mut FileStore::new());
    assert_eq!(early, Err(Error::WrongState(Step::Initialized)));
    free_clean(vm);

    let features = soft_amd_sp::Features {
        page_swap_disable: true,
        ..Default::default()
    };
    let host = host_from(kvm_ops_sim::SevSetup::new(platform(8).features(features)));
    let policy = 1 << 25 | 1 << 17 | 1 << 16;
    let (vm, mut vcpu) = guest_of(&host, &ram, 3, policy);
    let mut file = FileStore::new();
    let refused = vm.suspend(&mut file).unwrap_err();
    assert_eq!(status(&refused), Some(Status::POLICY_FAILURE));
    vm.resume(&mut file).unwrap();
    assert!(leaves_by(&mut vcpu, 0x81));
    drop(vcpu);
    free_clean(vm);
    nothing_left(&host);
}

/// What a hostile host gives in place of a page.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// One bit is another.
    Flipped(usize),
    /// What lay there when the guest was suspended before.
    Older,
    /// Another page.
    Swapped(usize),
    /// Nothing.
    Missing,
}

fn lies() -> impl Strategy<Value = Lie> {
    prop_oneof![
        (0..4096 * 8usize).prop_map(Lie::Flipped),
        Just(Lie::Older),
        (1..100usize).prop_map(Lie::Swapped),
        Just(Lie::Missing),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    /// Whatever page the host changes, of the guest or of its records: firmware refuses it, nothing comes in its place, and with the
    /// right page the guest goes on.
    #[test]
    fn no_page_comes_back_but_the_one_that_left(pages in 2..80u64, which in 0..100usize, lie in lies()) {
        let (host, ram) = (host(9), Ram::new(1 << 20));
        let (vm, mut vcpu) = guest(&host, &ram, pages);
        let before = contents(&host, &vm, pages);
        let mut first = FileStore::new();
        vm.suspend(&mut first).unwrap();
        vm.resume(&mut first).unwrap();
        let mut file = FileStore::new();
        vm.suspend(&mut file).unwrap();

        let names = file.names();
        let name = names[which % names.len()];
        let mut page = vec![0; 4096];
        let (expected, lie) = match lie {
            Lie::Flipped(bit) => {
                file.get(name, &mut page).unwrap();
                page[bit / 8] ^= 1 << (bit % 8);
                (Some(Status::BAD_MEASUREMENT), Some(page))
            }
            Lie::Older => {
                first.get(name, &mut page).unwrap();
                (Some(Status::BAD_MEASUREMENT), Some(page))
            }
            Lie::Swapped(by) => {
                let other = names[(which + by) % names.len()];
                prop_assume!(other != name);
                file.get(other, &mut page).unwrap();
                (Some(Status::BAD_MEASUREMENT), Some(page))
            }
            Lie::Missing => (None, None),
        };
        let mut hostile = Tampered { store: &mut file, name, lie };
        let refused = vm.resume(&mut hostile).unwrap_err();
        prop_assert_eq!(status(&refused), expected, "{} {}", name.level, name.index);
        if expected.is_none() {
            prop_assert_eq!(refused, Error::NotFound(kvm_ops_core::Field::Page, name.index.into()));
        }
        prop_assert_eq!(vcpu.vcpu_run().err(), Some(Error::Busy));
        prop_assert_eq!(vm.leaks().len(), 0);
        vm.resume(&mut file).unwrap();
        prop_assert_eq!(contents(&host, &vm, pages), before);
        prop_assert!(leaves_by(&mut vcpu, 0x81));
        drop(vcpu);
        free_clean(vm);
        nothing_left(&host);
    }

    /// Any history of pages that leave and come, while the guest is there, keeps its contents and the books.
    #[test]
    fn the_guest_is_the_same_after_any_history(
        steps in prop::collection::vec((0..4u8, 0..24u64, 1..24u64), 1..20)
    ) {
        let (host, ram) = (host(10), Ram::new(1 << 20));
        let pages = 24;
        let (vm, mut vcpu) = guest(&host, &ram, pages);
        let before = contents(&host, &vm, pages);
        let held = vm.account().held();
        let mut file = FileStore::new();
        let mut out = std::collections::BTreeSet::new();
        for (what, first, count) in steps {
            let count = count.min(pages - first);
            let range = first..first + count;
            let at = Gfn::new(FIRST + first);
            match what {
                0 | 1 => {
                    let new = range.clone().filter(|n| !out.contains(n)).count() as u64;
                    prop_assert_eq!(vm.swap_out(at, count, &mut file), Ok(new));
                    out.extend(range);
                }
                2 => {
                    let back = range.clone().filter(|n| out.contains(n)).count() as u64;
                    prop_assert_eq!(vm.swap_in(at, count, &mut file), Ok(back));
                    out.retain(|n| !range.contains(n));
                }
                _ => {
                    vm.suspend(&mut file).unwrap();
                    vm.resume(&mut file).unwrap();
                    out.clear();
                }
            }
            for n in 0..pages {
                prop_assert_eq!(vm.is_swapped_out(Gfn::new(FIRST + n)), out.contains(&n));
            }
            let records = vm.account().held() + out.len() as u64 - held;
            prop_assert!(records <= 1);
        }
        vm.swap_in(Gfn::new(FIRST), pages, &mut file).unwrap();
        prop_assert_eq!(vm.account().held(), held);
        prop_assert_eq!(contents(&host, &vm, pages), before);
        load(&mut vcpu, Script::new().output(0x82, &[1]));
        prop_assert!(leaves_by(&mut vcpu, 0x82));
        drop(vcpu);
        free_clean(vm);
        nothing_left(&host);
    }
}

/// A store without room keeps the page in memory; the guest runs on.
#[test]
fn a_store_that_refuses_loses_nothing() {
    struct Full<'a>(&'a mut FileStore, usize);
    impl SwapStore for Full<'_> {
        fn put(&mut self, at: SwapSlot, page: &[u8]) -> kvm_ops_core::Result<()> {
            match self.1.checked_sub(1) {
                Some(left) => {
                    self.1 = left;
                    self.0.put(at, page)
                }
                None => Err(Error::NoMemory),
            }
        }
        fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> kvm_ops_core::Result<()> {
            self.0.get(at, page)
        }
    }
    // 70 pages, the VMSA, two pages of records and the last one.
    for room in [0, 1, 63, 69, 70, 71, 72, 73] {
        let (host, ram) = (host(11), Ram::new(1 << 20));
        let (vm, mut vcpu) = guest(&host, &ram, 70);
        let (before, held) = (contents(&host, &vm, 70), vm.account().held());
        let mut file = FileStore::new();
        assert_eq!(
            vm.suspend(&mut Full(&mut file, room)),
            Err(Error::NoMemory),
            "{room}"
        );
        assert_eq!(vcpu.vcpu_run().err(), Some(Error::Busy));
        // With room it goes on where it was.
        if room % 2 == 0 {
            vm.suspend(&mut file).unwrap();
            assert_eq!(frames_out(&host), 1);
        }
        vm.resume(&mut file).unwrap();
        assert_eq!(
            (contents(&host, &vm, 70), vm.account().held()),
            (before, held)
        );
        assert!(leaves_by(&mut vcpu, 0x81));
        drop(vcpu);
        free_clean(vm);
        nothing_left(&host);
    }
}
