//! An SNP guest goes from one platform to another by its migration agents: it goes on as it was, on exactly one side.

mod common;
mod swap_support;

use common::*;
use kvm_ops_core::guest::{Action, Script};
use kvm_ops_core::{Error, Field, Gfn, Gpa, Level, Privacy, Step, Tech, VcpuOps, VmOps};
use kvm_ops_sev::migrate::{MigrationAgent, SnpImage};
use kvm_ops_sev::{GuestState, SevVm, Status, SwapSlot, SwapStore};
use kvm_ops_sim::SimHost;
use proptest::prelude::*;
use soft_amd_sp::attestation::Report;
use soft_amd_sp::message::GuestChannel;
use swap_support::agent::{Agent, SECRETS, agents, charge_of};
use swap_support::{FileStore, Tampered, contents, leaves_by, status, waiting};

const FIRST: u64 = RAM >> 12;
const PAGES: u64 = 70;

/// Tears down both guests and both agents; the platforms have everything back.
fn all_given_back(vms: [SevVm<SimHost>; 2], agents: [Agent<SimHost>; 2], platforms: [&SimHost; 2]) {
    vms.into_iter().for_each(free_clean);
    agents.into_iter().for_each(Agent::free);
    platforms.into_iter().for_each(nothing_left);
}

/// A report of a guest, by the channel that it has from its secrets page.
fn report(vm: &SevVm<SimHost>, channel: &mut GuestChannel) -> Report {
    let request = channel.report_request(&[3; 64], 0).unwrap();
    let answer = swap_support::agent::send(vm, &request).unwrap();
    let (code, bytes) = channel.open_report(&answer[..]).unwrap();
    assert_eq!(code, 0);
    Report::from_bytes(bytes[..Report::LEN].try_into().unwrap())
}

#[test]
fn a_guest_goes_on_at_another_platform_with_its_memory_and_reports() {
    let (here, there, ram) = (host(21), host(22), Ram::new(1 << 20));
    let other = Ram::new(1 << 20);
    let (mut agent, mut peer) = agents(&here, &there);
    let (vm, mut vcpu) = charge_of(&here, &agent.vm, &ram, PAGES);
    // A shared frame goes along as such; its contents are the embedder's to carry.
    let shared = Gfn::new(FIRST + PAGES);
    assert_eq!(vm.set_memory_attributes(shared, 2, Privacy::Shared), Ok(2));
    let mut channel = swap_support::agent::channel(&here, &vm, SECRETS);
    let before = (
        contents(&here, &vm, PAGES),
        vm.measurement(),
        report(&vm, &mut channel),
    );

    let mut file = FileStore::new();
    let image = vm.depart(&mut file, &mut agent).unwrap();
    let image = SnpImage::decode(&image.encode()).unwrap();
    assert_eq!(image.shared(), [(shared, 2)]);
    assert_eq!(image.totals().pages, PAGES + 2, "its secrets page and VMSA");
    let (to, mut next) = waiting(&there, &other, swap_support::POLICY);
    to.arrive(&image, &mut file, &mut peer).unwrap();
    assert_eq!(
        (to.step(), to.guest_state()),
        (Step::Runnable, GuestState::Running)
    );
    // Neither runs until the source gave it up.
    assert_eq!(vcpu.vcpu_run().err(), Some(Error::Busy));
    assert_eq!(next.vcpu_run().err(), Some(Error::Busy));
    vm.hand_off().unwrap();
    assert_eq!(vcpu.vcpu_run().err(), Some(Error::Poisoned));
    assert_eq!(vm.resume(&mut file), Err(Error::Poisoned));
    to.resume(&mut file).unwrap();

    assert_eq!(
        (contents(&there, &to, PAGES), to.measurement()),
        (before.0, before.1)
    );
    assert_eq!(to.privacy(shared), Privacy::Shared);
    let (was, is) = (before.2, report(&to, &mut channel));
    assert_eq!(is.measurement, was.measurement);
    assert_eq!(
        (is.report_id, is.policy, is.host_data),
        (was.report_id, was.policy, was.host_data)
    );
    assert_eq!(
        (was.report_id_ma, is.report_id_ma),
        (agent.report_id(), peer.report_id())
    );
    assert_ne!(is.chip_id, was.chip_id);
    let read = Action::Read {
        gpa: Gpa::new(C | (RAM + 0x5000)),
        len: 2,
    };
    assert_eq!(outcomes(&to, &mut next, vec![read]), ["Data([5, 5])"]);
    drop((vcpu, next));
    all_given_back([vm, to], [agent, peer], [&here, &there]);
}

#[test]
fn a_guest_that_departed_runs_on_if_it_does_not_arrive() {
    let (here, there, ram) = (host(23), host(24), Ram::new(1 << 20));
    let (mut agent, mut peer) = agents(&here, &there);
    let (vm, mut vcpu) = charge_of(&here, &agent.vm, &ram, 4);
    let before = contents(&here, &vm, 4);
    let [theirs, own] = [50, 60].map(|n| Gfn::new(FIRST + n));
    assert_eq!(vm.set_memory_attributes(theirs, 1, Privacy::Shared), Ok(1));
    let mut file = FileStore::new();
    let image = vm.depart(&mut file, &mut agent).unwrap();
    let (to, next) = waiting(&there, &ram, swap_support::POLICY);
    assert_eq!(to.set_memory_attributes(own, 1, Privacy::Shared), Ok(1));
    // The page of the VMSA is another one's.
    let name = SwapSlot { level: 0, index: 4 };
    let mut other = vec![0; 4096];
    file.get(SwapSlot { level: 0, index: 0 }, &mut other)
        .unwrap();
    let mut hostile = Tampered {
        store: &mut file,
        name,
        lie: Some(other),
    };
    let refused = to.arrive(&image, &mut hostile, &mut peer).unwrap_err();
    assert_eq!(status(&refused), Some(Status::BAD_MEASUREMENT));
    assert_eq!(
        (to.step(), to.account().held(), to.asid()),
        (Step::Initialized, 0, None)
    );
    // What the host shared stays so, and what the image shares does not.
    assert_eq!(
        (to.privacy(own), to.privacy(theirs)),
        (Privacy::Shared, Privacy::Private)
    );
    // The agents' packet is good once.
    assert_eq!(
        to.arrive(&image, &mut file, &mut peer),
        Err(Error::Protected(&swap_support::agent::REFUSED))
    );
    vm.resume(&mut file).unwrap();
    assert_eq!(contents(&here, &vm, 4), before);
    assert!(leaves_by(&mut vcpu, 0x81));

    // And it departs again, and arrives.
    let image = vm.depart(&mut file, &mut agent).unwrap();
    to.arrive(&image, &mut file, &mut peer).unwrap();
    vm.hand_off().unwrap();
    to.resume(&mut file).unwrap();
    assert_eq!(contents(&there, &to, 4), before);
    drop((vcpu, next));
    all_given_back([vm, to], [agent, peer], [&here, &there]);
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let (here, there, ram) = (host(25), host(26), Ram::new(1 << 20));
    let (mut agent, mut peer) = agents(&here, &there);
    let (vm, vcpu) = charge_of(&here, &agent.vm, &ram, 4);
    let mut file = FileStore::new();
    assert_eq!(vm.hand_off(), Err(Error::WrongState(Step::Runnable)));
    let image = vm.depart(&mut file, &mut agent).unwrap();
    let mut refused = |to: &SevVm<SimHost>, expected: Error| {
        assert_eq!(to.arrive(&image, &mut file, &mut peer), Err(expected));
    };
    // Without a slot, without a vCPU, with two, for another technology, launched already.
    let bare = create(&there, Tech::SevSnp, 1);
    refused(&bare, Error::WrongState(Step::Created));
    let mut bare = bare;
    bare.vm_init().unwrap();
    refused(&bare, Error::Invalid(Field::Gfn, FIRST));
    let lonely = with_ram(&there, Tech::SevSnp, 1, &ram);
    refused(&lonely, Error::Invalid(Field::Vcpu, 0));
    [bare, lonely].into_iter().for_each(free_clean);
    let two = with_ram(&there, Tech::SevSnp, 2, &ram);
    let vcpus = [0, 1].map(|id| common::vcpu(&two, id));
    refused(&two, Error::Invalid(Field::VcpuCount, 1));
    let es = with_ram(&there, Tech::SevEs, 1, &ram);
    assert!(matches!(
        es.arrive(&image, &mut FileStore::new(), &mut NoAgent),
        Err(Error::NotOffered(_))
    ));
    drop(vcpus);
    [two, es].into_iter().for_each(free_clean);
    let (mut launched, there_vcpu) = waiting(&there, &ram, swap_support::POLICY);
    launched.add_initial_page(&measured(RAM, &page(1))).unwrap();
    refused(&launched, Error::WrongState(Step::Initialized));
    vm.resume(&mut file).unwrap();
    drop((vcpu, there_vcpu));
    all_given_back([vm, launched], [agent, peer], [&here, &there]);
}

struct NoAgent;

impl MigrationAgent for NoAgent {
    fn export(&mut self, _: kvm_ops_core::Hpa) -> kvm_ops_core::Result<Vec<u8>> {
        Err(Error::Busy)
    }
    fn import(&mut self, _: kvm_ops_core::Hpa, _: &[u8]) -> kvm_ops_core::Result<()> {
        Err(Error::Busy)
    }
}

#[test]
fn a_guest_without_an_agent_stays_and_runs_on() {
    let (here, there, ram) = (host(27), host(28), Ram::new(1 << 20));
    let (mut agent, peer) = agents(&here, &there);
    let (vm, mut vcpu) = swap_support::guest(&here, &ram, 3);
    let mut file = FileStore::new();
    let refused = vm.depart(&mut file, &mut agent);
    assert_eq!(
        refused,
        Err(Error::Protected(&swap_support::agent::REFUSED))
    );
    vm.resume(&mut file).unwrap();
    assert!(leaves_by(&mut vcpu, 0x81));
    drop(vcpu);
    free_clean(vm);
    [agent, peer].into_iter().for_each(Agent::free);
    nothing_left(&here);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// An image of anyone's making is refused, or reads as one that is written the same.
    #[test]
    fn an_image_is_what_it_reads_as(mut bytes in prop::collection::vec(any::<u8>(), 0..300), real in any::<bool>(), at in 0..300usize) {
        if real {
            let mut image = b"kvm-snp\x01".to_vec();
            image.extend_from_slice(&[0; 22 + 49]);
            image.extend_from_slice(&2u32.to_le_bytes());
            image.extend_from_slice(&[1, 9, 0, 0, 0, 0, 0, 0, 0]);
            image.extend_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0, 0]);
            image.extend_from_slice(&[0; 4]);
            if let (Some(to), Some(from)) = (image.get_mut(at), bytes.first()) {
                *to = *from;
            }
            image.append(&mut bytes);
            bytes = image;
        }
        if let Ok(image) = SnpImage::decode(&bytes) {
            prop_assert_eq!(SnpImage::decode(&image.encode()), Ok(image));
        }
    }
}

/// A guest with a large page, which arrives as one.
#[test]
fn large_pages_arrive_as_such() {
    let (here, there, ram) = (host(29), host(30), Ram::new(6 << 20));
    let (mut agent, mut peer) = agents(&here, &there);
    let (vm, mut vcpu) = charge_of(&here, &agent.vm, &ram, 2);
    let large = Gfn::new(FIRST + 512);
    assert_eq!(vm.pre_fault_memory(large, 512), Ok(512));
    let mut file = FileStore::new();
    let image = vm.depart(&mut file, &mut agent).unwrap();
    let (to, mut next) = waiting(&there, &ram, swap_support::POLICY);
    to.arrive(&image, &mut file, &mut peer).unwrap();
    vm.hand_off().unwrap();
    to.resume(&mut file).unwrap();
    let level = to.gmem_max_mapping_level(to.page_of(large).unwrap(), Privacy::Private);
    assert_eq!(level, Level::Size2M);
    load(&mut next, Script::new().output(0x83, &[1]));
    assert!(leaves_by(&mut next, 0x83));
    assert!(vcpu.vcpu_run().is_err());
    drop((vcpu, next));
    all_given_back([vm, to], [agent, peer], [&here, &there]);
}
