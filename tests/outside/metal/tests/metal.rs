//! What the bare-metal hypervisor does is tested where tests run. Its build for
//! x86_64-unknown-none shows that it needs no operating system.

use kvm_ops::Vendor;
use kvm_ops_tdvf::{Attributes, Section, SectionKind, compose};
use metal::Metal;

#[test]
fn a_normal_vm_runs_over_the_own_host() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        assert_eq!(metal::console(&Metal::new(vendor)).unwrap(), "metal\n");
    }
}

#[test]
fn a_host_without_ports_creates_no_confidential_vm() {
    for vendor in [Vendor::Intel, Vendor::Amd] {
        assert_eq!(metal::confidential(vendor), 0);
    }
}

#[test]
fn an_image_is_measured_and_what_is_none_is_refused() {
    let mut image = vec![0x90; 4096];
    let firmware = Section {
        kind: SectionKind::Bfv,
        data_offset: 0,
        raw_size: 4096,
        memory_address: 0xffff_f000,
        memory_size: 4096,
        attributes: Attributes {
            extend: true,
            aug: false,
        },
    };
    compose(&mut image, &[firmware]).unwrap();
    assert_ne!(metal::mrtd(&image).unwrap(), [0; 48]);
    assert!(metal::mrtd(&[0; 4096]).is_err());
}

#[test]
fn the_processor_runs_code() {
    let mut code = [0xf4; 16]; // hlt
    code[..2].copy_from_slice(&[0xb0, 42]); // mov al, 42
    assert_eq!(metal::halts_after(code), Some(2));
}
