//! Memory that changes between private and shared.

use kvm_ops::{Error, Field, Gfn, Privacy, Tech, VmOps};

use crate::common::{again, inside};
use crate::guest::*;

const NAME: &str = "conversions::each_way_gives_up_the_memory_of_the_other_kind";

#[test]
fn each_way_gives_up_the_memory_of_the_other_kind() {
    let Some(log) = again(NAME, "amd") else {
        return convert();
    };
    let attributes = log.matches("KVM_SET_MEMORY_ATTRIBUTES").count();
    assert_eq!(attributes, 4, "one for the slot, three conversions: {log}");
}

fn convert() {
    let memory = memory();
    let vm = launched(&host(), Tech::SevSnp, &memory);
    let first = Gfn::new(START / 4096);
    // SAFETY: the page is mapped, and the guest does not run.
    let shared = || unsafe { memory.as_ptr().add(4096).read_volatile() };
    // SAFETY: as above.
    unsafe { memory.as_ptr().add(4096).write_volatile(9) };
    let second = Gfn::new(first.get() + 1);
    assert_eq!(vm.set_memory_attributes(second, 1, Privacy::Shared), Ok(1));
    assert_eq!(
        (vm.back_end().privacy(first), vm.back_end().privacy(second)),
        (Privacy::Private, Privacy::Shared)
    );
    assert_eq!(shared(), 9);
    assert_eq!(vm.set_memory_attributes(second, 1, Privacy::Private), Ok(1));
    assert_eq!(shared(), 0, "given back to the system");
    let pages = BYTES / 4096;
    let whole = vm.set_memory_attributes(first, pages + 5, Privacy::Shared);
    assert_eq!(whole, Ok(pages), "the frames of the slot");
    let outside = Gfn::new(first.get() + pages);
    assert_eq!(
        vm.set_memory_attributes(outside, 1, Privacy::Shared),
        Err(Error::NotFound(Field::Gfn, outside.get()))
    );
    assert!(vm.destroy().is_clean());
}

#[test]
fn frames_are_mapped_before_they_are_touched_and_shared_ones_are_refused() {
    if !inside("conversions::frames_are_mapped_before_they_are_touched_and_shared_ones_are_refused")
    {
        return;
    }
    let memory = memory();
    let first = Gfn::new(START / 4096);
    let mut vm = kvm_ops::create(&host(), &config(Tech::SevSnp, Default::default())).unwrap();
    vm.set_memory_slot(slot(&memory)).unwrap();
    let vcpu = vm.create_vcpu(kvm_ops::VcpuId(0)).unwrap();
    add_pages(&mut vm);
    vm.finalize().unwrap();
    assert_eq!(vm.pre_fault_memory(first, 8), Ok(8));
    vm.set_memory_attributes(Gfn::new(first.get() + 4), 1, Privacy::Shared)
        .unwrap();
    assert_eq!(vm.pre_fault_memory(first, 8), Ok(4), "up to the shared one");
    let shared = first.get() + 4;
    assert_eq!(
        vm.pre_fault_memory(Gfn::new(shared), 1),
        Err(Error::NotFound(Field::Gfn, shared))
    );
    drop(vcpu);
}
