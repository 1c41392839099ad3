//! Tests of the wrapper around guest programs.

use super::*;
use kvm_ops::VcpuId;
use kvm_ops::guest::Script;

const BIT: u64 = 1 << 47;

fn memory() -> Arc<GuestMemory> {
    let ranges = vec![0..0x10_0000, 0xffff_c000..1 << 32];
    Arc::new(GuestMemory::new(ranges, std::iter::once(0xffff_c000)))
}

fn started(script: Script) -> InConfidence {
    InConfidence::new(Box::new(script), memory())
}

fn start() -> Outcome<'static> {
    Outcome::Start {
        vcpu: VcpuId(0),
        mask: SharedMask::shared_bit(47).unwrap(),
    }
}

fn accept(gpa: u64) -> Action<'static> {
    Action::Accept {
        gpa: Gpa::new(gpa),
        level: Level::Size4K,
    }
}

#[test]
fn a_page_is_accepted_once_before_its_first_use_and_an_access_may_have_two() {
    let at = Gpa::new(0x1ffe);
    let mut guest = started(Script::new().write(at, b"1234").read(at, 4));
    assert_eq!(guest.step(start()), accept(0x1000));
    assert_eq!(guest.step(Outcome::Done), accept(0x2000));
    let data = b"1234";
    assert_eq!(guest.step(Outcome::Done), Action::Write { gpa: at, data });
    assert_eq!(guest.step(Outcome::Done), Action::Read { gpa: at, len: 4 });
    assert_eq!(guest.step(Outcome::Data(data)), Action::Shutdown);
}

#[test]
fn pages_of_the_launch_are_there() {
    let gpa = Gpa::new(0xffff_c010);
    let mut guest = started(Script::new().read(gpa, 4));
    assert_eq!(guest.step(start()), Action::Read { gpa, len: 4 });
}

#[test]
fn an_sev_guest_clears_what_it_takes_into_use() {
    let start = |vcpu| Outcome::Start {
        vcpu: VcpuId(vcpu),
        mask: SharedMask::private_bit(51).unwrap(),
    };
    let private = |gpa: u64| Gpa::new(1 << 51 | gpa);
    let mut guest = started(Script::new().read(Gpa::new(0x1008), 1));
    assert_eq!(guest.step(start(0)), accept(0x1000));
    let clear = Action::Write {
        gpa: private(0x1000),
        data: &[0; 4096],
    };
    assert_eq!(guest.step(Outcome::Fault(GuestFault::NotOffered)), clear);
    // Meanwhile the other vCPU reads elsewhere.
    let script = Script::new().read(Gpa::new(0x1010), 1);
    let mut other = InConfidence::new(Box::new(script), Arc::clone(&guest.memory));
    let elsewhere = Action::Read {
        gpa: private(0xffff_c000),
        len: 1,
    };
    assert_eq!(other.step(start(1)), elsewhere);
    assert_eq!(other.step(Outcome::Data(&[0])), elsewhere);
    let gpa = private(0x1008);
    assert_eq!(guest.step(Outcome::Done), Action::Read { gpa, len: 1 });
    let gpa = private(0x1010);
    assert_eq!(
        other.step(Outcome::Data(&[0])),
        Action::Read { gpa, len: 1 }
    );
}

#[test]
fn an_acceptance_that_fails_is_the_programs_fault_to_deal_with() {
    let mut guest = started(Script::new().read(Gpa::new(0x1000), 1).halt());
    assert_eq!(guest.step(start()), accept(0x1000));
    let fault = Outcome::Fault(GuestFault::Refused(7 << 32));
    assert_eq!(guest.step(fault), Action::Halt);
}

#[test]
fn devices_are_touched_through_shared_addresses() {
    let mut guest = started(Script::new().read(Gpa::new(0xe000_0004), 4));
    let gpa = Gpa::new(BIT | 0xe000_0004);
    assert_eq!(guest.step(start()), Action::Read { gpa, len: 4 });
}

#[test]
fn what_was_converted_is_touched_as_what_it_became() {
    let at = Gpa::new(0x5008);
    let page = Gpa::new(0x5000);
    let mut guest = started(
        Script::new()
            .share(page, 1)
            .read(at, 1)
            .unshare(page, 1)
            .read(at, 1),
    );
    assert_eq!(
        guest.step(start()),
        Action::Share {
            gpa: page,
            pages: 1
        }
    );
    let gpa = Gpa::new(BIT | 0x5008);
    assert_eq!(guest.step(Outcome::Done), Action::Read { gpa, len: 1 });
    let unshare = Action::Unshare {
        gpa: page,
        pages: 1,
    };
    assert_eq!(guest.step(Outcome::Data(&[0])), unshare);
    assert_eq!(guest.step(Outcome::Done), Action::Read { gpa: at, len: 1 });
}

#[test]
fn a_conversion_that_failed_changed_nothing() {
    let page = Gpa::new(0x5000);
    let mut guest = started(Script::new().share(page, 1).read(page, 1));
    assert_eq!(
        guest.step(start()),
        Action::Share {
            gpa: page,
            pages: 1
        }
    );
    let fault = Outcome::Fault(GuestFault::Refused(1));
    assert_eq!(guest.step(fault), accept(0x5000));
}
